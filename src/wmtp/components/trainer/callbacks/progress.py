"""Shows a run on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wmtp.components.trainer.callbacks.base import Callback
from wmtp.components.trainer.callbacks.metrics import MetricsCallback
from wmtp.tracking import ProgressDisplay

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun
    from wmtp.components.trainer.step import StepResult


class ProgressCallback(Callback):
    """Passes the latest logged numbers on to a display; comes after `MetricsCallback`."""

    def __init__(self, display: ProgressDisplay, metrics: MetricsCallback) -> None:
        self.display = display
        self.metrics = metrics

    def on_train_start(self, run: TrainingRun) -> None:
        """Start at the step a resumed run is at."""
        self.display.start(run.max_steps, initial_step=run.step)

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Move on; numbers change when they are logged."""
        latest = self.metrics.latest
        self.display.update(
            run.step,
            loss=latest.get("train/loss"),
            tokens_per_second=latest.get("train/tokens_per_second"),
            memory_gib=latest.get("train/memory_peak_gib"),
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.display.close()
