"""Saves the whole state of a run, and puts it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from wmtp.components.loader import LoadedCheckpoint
from wmtp.components.loader.training_state import ARCHITECTURE_KEY, describe_architecture
from wmtp.components.trainer.callbacks.base import Callback
from wmtp.distributed.checkpoint_optimizer import (
    flatten_optimizer_state,
    make_optimizer_tensor,
    restore_optimizer_state,
)
from wmtp.distributed.checkpoint_reading import CheckpointInfo
from wmtp.distributed.checkpoint_rng import capture_rng_state, restore_rng_state
from wmtp.distributed.checkpoint_saver import CheckpointSaver, SaveRequest
from wmtp.modeling.lora import check_same_base
from wmtp.modeling.trainable import checkpoint_tensors

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainerContext, TrainingRun
    from wmtp.components.trainer.step import StepResult


class CheckpointCallback(Callback):
    """Saves every `every_steps` updates and at the end, also at an end that was asked for by a signal.

    Args:
        saver: takes the checkpoints.
        every_steps: save interval in updates; None saves at the end only.
        run_state: JSON that goes into every checkpoint beside the loop's own (MLflow run id, recipe, ...).
        score: step -> the metric that the best checkpoints are chosen by; None where it was not measured
            there.
        on_saving: called as a part of each save, see `SaveRequest.before`.
        on_saved: called between steps with each checkpoint that was committed, and again with one that was
            brought from the fallback to its place.
    """

    def __init__(
        self,
        saver: CheckpointSaver,
        *,
        every_steps: int | None,
        run_state: dict[str, Any],
        score: Callable[[int], float | None],
        on_saving: Callable[[], None],
        on_saved: Callable[[CheckpointInfo], None],
    ) -> None:
        self.saver = saver
        self.every_steps = every_steps
        self.run_state = run_state
        self.score = score
        self.on_saving = on_saving
        self.on_saved = on_saved
        self._saved_step = -1

    @property
    def latest(self) -> str | None:
        """Where the checkpoint is that was saved last."""
        return None if self.saver.latest is None else self.saver.latest.uri

    def on_train_start(self, run: TrainingRun) -> None:
        """A resumed run's own checkpoint needs no second save; one in the fallback goes to its place."""
        if self.saver.latest is not None:
            self._saved_step = run.step
        self.saver.bring_back(self.on_saving)
        self._report()

    def on_step_start(self, run: TrainingRun) -> None:
        """Raise what a save that went on beside the last step raised."""
        self.saver.raise_if_failed()

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Save when it is time."""
        is_due = self.every_steps is not None and run.step % self.every_steps == 0
        if is_due or run.save_requested:
            self._save(run)
            run.save_requested = False
        self._report()

    def on_train_end(self, run: TrainingRun) -> None:
        """Save the end of the run, wait until it is saved, and leave nothing in the fallback if possible."""
        self._save(run)
        self.saver.wait()
        self.saver.bring_back(self.on_saving)
        self._report()

    def close(self) -> None:
        """Wait for a save under way."""
        self.saver.close()
        self._report()

    def _save(self, run: TrainingRun) -> None:
        if self._saved_step == run.step:
            return
        context = run.context
        # Asked for first: a callback may know that this state must not become a checkpoint.
        callbacks = {type(callback).__name__: callback.state_dict() for callback in context.callbacks}
        moments, optimizer_state = flatten_optimizer_state(
            context.optimizer.optimizer, _named_parameters(context.modules)
        )
        tensors: dict[str, dict[str, Tensor]] = {
            **{name: checkpoint_tensors(module) for name, module in context.modules.items()},
            "optimizer": moments,
            "rng": {f"{_rank()}.{name}": state for name, state in capture_rng_state().items()},
        }
        state = {
            **self.run_state,
            "step": run.step,
            "epoch": context.data.epoch_at(run.num_consumed),
            "training": run.state_dict(),
            "callbacks": callbacks,
            "optimizer": optimizer_state,
            ARCHITECTURE_KEY: describe_architecture(context.model),
            # With LoRA the frozen tensors are left out: this says whose they are.
            "base": None if context.model.lora is None else context.model.lora.base,
        }
        self.saver.save(SaveRequest(run.step, tensors, state, self.score(run.step), self.on_saving))
        self._saved_step = run.step

    def _report(self) -> None:
        for info in self.saver.take_committed():
            self.on_saved(info)


def restore_training_state(context: TrainerContext, loaded: LoadedCheckpoint) -> None:
    """Load a checkpoint into the modules, the optimizer, the random generators and the callbacks of a run.

    Raises:
        CheckpointError: the checkpoint is of a run with other modules or other shapes, or a file is damaged.
        ModelLoadError: its LoRA adapters were trained on another base model.
    """
    checkpoint, state = loaded.checkpoint, loaded.state
    check_same_base(context.model, state["base"])
    checkpoint.load_into({name: checkpoint_tensors(module) for name, module in context.modules.items()})
    parameters = dict(_named_parameters(context.modules))
    moments = checkpoint.read("optimizer", make=make_optimizer_tensor(parameters))
    optimizer: Optimizer = context.optimizer.optimizer
    restore_optimizer_state(optimizer, parameters.items(), moments, state["optimizer"])
    random_states = checkpoint.read("rng")
    # A rank that there was not before goes on with the first one's.
    rank = _rank() if any(name.startswith(f"{_rank()}.") for name in random_states) else 0
    restore_rng_state(
        {
            name.removeprefix(f"{rank}."): value
            for name, value in random_states.items()
            if name.startswith(f"{rank}.")
        }
    )
    for callback in context.callbacks:
        # A resumed run may have callbacks that there were not before: validation, for one.
        if type(callback).__name__ in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][type(callback).__name__])
    context.state = state["training"]


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _named_parameters(modules: dict[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{module_name}.{name}", parameter)
        for module_name, module in modules.items()
        for name, parameter in module.named_parameters()
    ]
