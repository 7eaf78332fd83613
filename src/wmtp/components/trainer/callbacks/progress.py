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
    """A progress line with the latest logged numbers; comes after `MetricsCallback`.

    Args:
        metrics: has the latest numbers.
        title: what is being trained.
    """

    def __init__(self, metrics: MetricsCallback, title: str) -> None:
        self.metrics = metrics
        self.title = title
        self._display: ProgressDisplay | None = None

    def on_train_start(self, run: TrainingRun) -> None:
        """Start at the step a resumed run is at."""
        self._display = ProgressDisplay(run.max_steps, title=self.title, start_step=run.step)
        self._display.__enter__()

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Move on; the numbers change when they are logged."""
        assert self._display is not None
        is_logged = self.metrics.latest_step == run.step
        self._display.update(run.step, self.metrics.latest if is_logged else None)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._display is not None:
            self._display.__exit__(None, None, None)
