"""The training loop and its counters; what happens around the steps is in the callbacks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wmtp.components.base import Component
from wmtp.components.data import MicroBatches, to_device
from wmtp.components.data.examples import Batch
from wmtp.components.data.workers import explained_worker_deaths
from wmtp.components.optimizer import OptimizerBundle
from wmtp.components.scorer.base import Scorer, ScorerContext
from wmtp.components.trainer.agreement import any_rank
from wmtp.components.trainer.callbacks.base import Callback
from wmtp.components.trainer.evidence import UpdateEvidence, gradient_norms
from wmtp.components.trainer.step import StepResult, TrainStep
from wmtp.components.trainer.weighting import StepWeighting, StepWeights
from wmtp.modeling import MTPModel, MTPOutput
from wmtp.settings import Recipe


@dataclass(slots=True)
class TrainerContext:
    """What a trainer works on.

    Attributes:
        modules: name -> trained module; `model` is the `MTPModel`, `value_head` the critic's.
        optimizer: optimizer and schedule over these modules.
        data: the training micro-batches.
        scorer: where the weights come from; None for uniform weights.
        callbacks: called in this order; closed in reverse.
        device: where the modules are.
        precision: dtype of the forward; float32 turns autocast off.
        state: state of a checkpoint to continue from.
    """

    modules: dict[str, nn.Module]
    optimizer: OptimizerBundle
    data: MicroBatches
    scorer: Scorer | None = None
    callbacks: Sequence[Callback] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: torch.dtype = torch.float32
    state: dict[str, Any] | None = None

    @property
    def model(self) -> MTPModel:
        """The model being trained."""
        model = self.modules["model"]
        assert isinstance(model, MTPModel)
        return model


@dataclass(slots=True)
class TrainingRun:
    """The counters of a run and its parts, as callbacks see them.

    Attributes:
        step: finished updates.
        num_tokens: real tokens seen.
        data_wait_s: seconds spent waiting for data.
        grad_norm: norm of the model's gradient of the last step, before clipping.
        is_nonfinite: 1.0 where the last step's loss or gradient was not finite and its update was suppressed.
        update: gradient norms and learning rates of the last step.
        stop_reason: set by a callback to end the run after the present step.
        save_requested: set by a callback before `CheckpointCallback`, which saves this step and resets it.
        metrics: values that validation and the like leave for the next log line.
    """

    context: TrainerContext
    max_steps: int
    micro_batches_per_step: int
    train_step: TrainStep
    weighting: StepWeighting | None = None
    step: int = 0
    num_tokens: int = 0
    data_wait_s: float = 0.0
    grad_norm: Tensor | None = None
    is_nonfinite: Tensor | None = None
    update: UpdateEvidence | None = None
    stop_reason: str | None = None
    save_requested: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    _data_state: dict[str, Any] | None = None

    @property
    def num_consumed(self) -> int:
        """Micro-batches that finished steps have consumed."""
        return self.step * self.micro_batches_per_step

    def batches(self) -> Iterator[Batch]:
        """The micro-batches that have not been consumed, from where a resumed run was saved."""
        return self.context.data.batches(self.num_consumed, self._data_state)

    def state_dict(self) -> dict[str, Any]:
        """JSON state of the loop: counters, position in the data, schedule, weighting."""
        weighting = self.weighting
        return {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "data": self.context.data.state_at(self.num_consumed),
            "scheduler": self.context.optimizer.scheduler.state_dict(),
            "weighting": None if weighting is None else weighting.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.step = int(state["step"])
        self.num_tokens = int(state["num_tokens"])
        self._data_state = state["data"]
        self.context.optimizer.scheduler.load_state_dict(state["scheduler"])
        if self.weighting is not None and state["weighting"] is not None:
            self.weighting.load_state_dict(state["weighting"], self.context.device)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended."""

    step: int
    stop_reason: str | None


class BaseWmtpTrainer(Component[TrainerContext, TrainResult]):
    """The loop all algorithms share; they differ in `compute_head_weights` and `compute_auxiliary_loss`."""

    uses_scorer = True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._run: TrainingRun | None = None

    def setup(self, context: TrainerContext) -> None:
        """Build the step and, when resuming, take back the state."""
        scorer = context.scorer if self.uses_scorer else None
        weighting = None if scorer is None else StepWeighting(self.recipe.loss, scorer, context.model.offsets)
        train_step = TrainStep(
            context.model,
            self.recipe.loss,
            compute_head_weights=self.compute_head_weights,
            auxiliary_loss=self.compute_auxiliary_loss if self.has_auxiliary_loss(context) else None,
            autocast=autocast_factory(context.device, context.precision),
        )
        self._run = TrainingRun(
            context,
            self.recipe.train.max_steps,
            self.recipe.train.gradient_accumulation_steps,
            train_step,
            weighting,
        )
        if context.state is not None:
            self._run.load_state_dict(context.state)

    @property
    def training_run(self) -> TrainingRun:
        """The run's counters and parts; `setup` makes them."""
        assert self._run is not None, "setup() comes before run()"
        return self._run

    def run(self, context: TrainerContext) -> TrainResult:
        """Train until `train.max_steps`, or until a callback asks to stop."""
        run = self.training_run
        callbacks = context.callbacks
        try:
            set_training(context.modules)
            for callback in callbacks:
                callback.on_train_start(run)
            # Closed before the last save: the processes that prepare data end with it.
            with explained_worker_deaths(), contextlib.closing(self._steps(run)) as steps:
                for batches in steps:
                    for callback in callbacks:
                        callback.on_step_start(run)
                    result = self.run_step(batches)
                    for callback in callbacks:
                        callback.on_step_end(run, result)
                    if run.stop_reason is not None:
                        break
            for callback in callbacks:
                callback.on_train_end(run)
        finally:
            with contextlib.ExitStack() as stack:
                for callback in callbacks:
                    stack.callback(callback.close)
        return TrainResult(run.step, run.stop_reason)

    def run_step(self, batches: Sequence[Batch]) -> StepResult:
        """Forward, backward and update on the micro-batches of one step."""
        run = self.training_run
        result = run.train_step(batches)
        self._update(run, result)
        run.step += 1
        return result

    @torch.no_grad()
    def compute_head_weights(
        self, batches: Sequence[Batch], outputs: Sequence[MTPOutput] = ()
    ) -> StepWeights | None:
        """Weights of every head at every position of a step; None means uniform.

        Args:
            batches: all micro-batches of the step.
            outputs: the model's forwards on them where they exist already; else a scorer that reads the model
                costs a forward of head 0 more.
        """
        run = self.training_run
        if run.weighting is None:
            return None
        scorer = run.weighting.scorer
        scores = []
        for index, batch in enumerate(batches):
            output = None
            if scorer.needs_output:
                output = outputs[index].detach() if outputs else run.train_step.forward(batch, num_heads=1)
            with run.train_step.autocast():
                scores.append(scorer.run(ScorerContext(batch, output, run.weighting.needed_tokens(batch))))
        return run.weighting.step_weights(batches, scores)

    def has_auxiliary_loss(self, context: TrainerContext) -> bool:
        """Whether `compute_auxiliary_loss` adds anything in this run."""
        return False

    def compute_auxiliary_loss(
        self, batch: Batch, output: MTPOutput, batches: Sequence[Batch]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A further loss on a micro-batch, normalised over the step's `batches`, and metrics that add up."""
        raise NotImplementedError(f"{type(self).__name__} has no auxiliary loss")

    def _steps(self, run: TrainingRun) -> Generator[list[Batch]]:
        """The micro-batches of each remaining step, on the device, fetched before the step begins."""
        per_step = run.micro_batches_per_step
        batches = run.batches()
        while run.step < run.max_steps:
            began = time.perf_counter()
            step_batches = [to_device(next(batches), run.context.device) for _ in range(per_step)]
            run.data_wait_s += time.perf_counter() - began
            yield step_batches

    def _update(self, run: TrainingRun, result: StepResult) -> None:
        """Apply the gradients, unless the loss or one of them is not finite.

        A suppressed update leaves parameters, moments and running statistics as they were. The step still
        counts: its number, the learning-rate schedule, the data and random draws move on.
        """
        context, optimizer = run.context, run.context.optimizer.optimizer
        # Each module is clipped by its own norm: a critic's gradient must not shrink the model's update.
        norms = {name: gradient_norms(module, context.device) for name, module in context.modules.items()}
        limit = self.recipe.optim.grad_clip
        for gradients in norms.values():
            if limit is not None and gradients.parameters:
                nn.utils.clip_grads_with_norm_(gradients.parameters, limit, gradients.total)
        totals = [gradients.total for gradients in norms.values()]
        is_finite = torch.stack([result.loss, *totals]).isfinite().all()
        # The fused kernel leaves parameters and moments alone where this flag is set; the host need not look.
        run.is_nonfinite = any_rank((~is_finite).float())
        rates = [float(rate) for rate in context.optimizer.scheduler.get_last_lr()]
        run.update = UpdateEvidence(norms, rates)
        run.grad_norm = norms["model"].total
        if run.weighting is not None:
            run.weighting.settle(run.is_nonfinite == 0)
        optimizer.found_inf = run.is_nonfinite  # type: ignore[attr-defined]
        optimizer.step()
        context.optimizer.scheduler.step()
        optimizer.zero_grad(set_to_none=True)


def autocast_factory(
    device: torch.device, precision: torch.dtype
) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """A maker of autocast contexts for a precision; float32 needs none."""
    if precision == torch.float32:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=precision)


def set_training(modules: dict[str, nn.Module], mode: bool = True) -> None:
    """Put all modules into training (or evaluation) mode."""
    for module in modules.values():
        module.train(mode)
