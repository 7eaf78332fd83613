"""Stops, or goes on within a bound, when loss or gradient is not finite."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from wmtp.components.trainer.callbacks.base import Callback
from wmtp.exceptions import TrainingDivergedError
from wmtp.settings.recipe_train import TrainSettings

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun
    from wmtp.components.trainer.step import StepResult

logger = logging.getLogger(__name__)


class FiniteCallback(Callback):
    """Reads the finite flag of a step one step later, so that the device need not be waited for.

    The update of such a step was already suppressed on the device: parameters and moments are as before it.
    """

    def __init__(self, train: TrainSettings) -> None:
        self.train = train
        self.num_skipped = 0
        self._previous: tuple[int, Tensor, StepResult] | None = None

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Look at the step before this one."""
        self._look()
        assert run.is_nonfinite is not None
        self._previous = (run.step, run.is_nonfinite, result)

    def on_train_end(self, run: TrainingRun) -> None:
        """Look at the last step."""
        self._look()

    def _look(self) -> None:
        if self._previous is None:
            return
        step, flag, result = self._previous
        self._previous = None
        if not bool(flag):
            return
        self.num_skipped += 1
        bad_heads = [h for h, ce in enumerate(result.ce_sum_H.tolist()) if not -1e30 < ce < 1e30]
        where = f"cross entropy of heads {bad_heads}" if bad_heads else "gradient"
        message = f"step {step}: the {where} is NaN or infinite (loss {float(result.loss)})"
        if self.train.on_nonfinite == "stop" or self.num_skipped > self.train.max_nonfinite_steps:
            raise TrainingDivergedError(
                message,
                remedy="lower optim.lr, set optim.grad_clip, or look at the data of this step; the last "
                "checkpoint is unharmed, the update of the bad step was not applied",
            )
        logger.warning("%s; the update was skipped (%d so far)", message, self.num_skipped)
