"""Saves the whole state of a run, and puts it back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from wmtp.components.loader.training_state import ARCHITECTURE_KEY, describe_architecture
from wmtp.components.trainer.callbacks.base import Callback
from wmtp.distributed.checkpoint import save_checkpoint
from wmtp.distributed.checkpoint_optimizer import flatten_optimizer_state, restore_optimizer_state
from wmtp.distributed.checkpoint_rng import capture_rng_state, restore_rng_state
from wmtp.exceptions import CheckpointError
from wmtp.modeling.lora import check_same_base
from wmtp.modeling.trainable import checkpoint_tensors, load_checkpoint_tensors

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainerContext, TrainingRun
    from wmtp.components.trainer.step import StepResult


class CheckpointCallback(Callback):
    """Saves every `every_steps` updates and at the end, also at an end that was asked for by a signal.

    Args:
        run_dir: folder of the run's `step-N` folders.
        every_steps: save interval in updates; None saves at the end only.
        keep_last: how many checkpoints stay on disk.
        run_state: JSON that goes into every checkpoint beside the loop's own (MLflow run id, recipe, ...).
    """

    def __init__(
        self, run_dir: Path, *, every_steps: int | None, keep_last: int, run_state: dict[str, Any]
    ) -> None:
        self.run_dir = run_dir
        self.every_steps = every_steps
        self.keep_last = keep_last
        self.run_state = run_state
        self.latest: Path | None = None
        self._saved_step = -1

    def on_train_start(self, run: TrainingRun) -> None:
        """A resumed run's own checkpoint needs no second save."""
        if run.context.state is not None:
            self._saved_step = run.step

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Save when it is time."""
        is_due = self.every_steps is not None and run.step % self.every_steps == 0
        if is_due or run.save_requested:
            self._save(run)
            run.save_requested = False

    def on_train_end(self, run: TrainingRun) -> None:
        """Save the end of the run."""
        self._save(run)

    def _save(self, run: TrainingRun) -> None:
        if self._saved_step == run.step:
            return
        context = run.context
        moments, optimizer_state = flatten_optimizer_state(
            context.optimizer.optimizer, _named_parameters(context.modules)
        )
        tensors: dict[str, dict[str, Tensor]] = {
            **{name: checkpoint_tensors(module) for name, module in context.modules.items()},
            "optimizer": moments,
            "rng": capture_rng_state(),
        }
        state = {
            **self.run_state,
            "step": run.step,
            "epoch": context.data.epoch_at(run.num_consumed),
            "training": run.state_dict(),
            "optimizer": optimizer_state,
            ARCHITECTURE_KEY: describe_architecture(context.model),
            # With LoRA the frozen tensors are left out: this says whose they are.
            "base": None if context.model.lora is None else context.model.lora.base,
        }
        self.latest = save_checkpoint(
            self.run_dir, run.step, tensors=tensors, state=state, keep_last=self.keep_last
        )
        self._saved_step = run.step


def restore_training_state(
    context: TrainerContext, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> None:
    """Load a checkpoint into the modules, the optimizer and the random generators of a run.

    Raises:
        CheckpointError: the checkpoint is of a run with other modules or other shapes.
        ModelLoadError: its LoRA adapters were trained on another base model.
    """
    check_same_base(context.model, state.get("base"))
    for name, module in context.modules.items():
        if name not in tensors:
            raise CheckpointError(
                f"the checkpoint has no {name!r}; it holds {', '.join(sorted(tensors))}",
                remedy="resume with the recipe the run was started with",
            )
        try:
            load_checkpoint_tensors(module, tensors[name])
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint's {name!r} does not fit this recipe: {error}",
                remedy="resume with the recipe the run was started with",
            ) from error
    optimizer: Optimizer = context.optimizer.optimizer
    restore_optimizer_state(
        optimizer, _named_parameters(context.modules), tensors["optimizer"], state["optimizer"]
    )
    restore_rng_state(tensors["rng"])
    context.state = state["training"]


def _named_parameters(modules: dict[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{module_name}.{name}", parameter)
        for module_name, module in modules.items()
        for name, parameter in module.named_parameters()
    ]
