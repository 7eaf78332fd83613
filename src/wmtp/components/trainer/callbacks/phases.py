"""Heads first, then everything: the change of `model.trainable: heads_then_all`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from wmtp.components.trainer.callbacks.base import Callback
from wmtp.modeling import LateParameters

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun

logger = logging.getLogger(__name__)


class PhaseCallback(Callback):
    """Keeps parameters frozen until their first step.

    A function of the step alone, so a resumed run is in the phase it was in.
    """

    def __init__(self, late: LateParameters) -> None:
        self.late = late

    def on_train_start(self, run: TrainingRun) -> None:
        """Freeze them, or not where the run goes on in the second phase."""
        self.late.set_learning(run.step)

    def on_step_start(self, run: TrainingRun) -> None:
        """Free them when it is time."""
        if run.step == self.late.first_step:
            logger.info("step %d: from here on everything learns, not the heads alone", run.step + 1)
            self.late.set_learning(run.step)
