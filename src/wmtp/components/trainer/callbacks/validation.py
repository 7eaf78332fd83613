"""Losses and accuracies on held-out data while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from wmtp.components.trainer.callbacks.base import Callback
from wmtp.tracking import Tracker

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun
    from wmtp.components.trainer.step import StepResult


class ValidationCallback(Callback):
    """Logs what `measure` returns (`val/...`) every `every_steps` updates and after the last."""

    def __init__(self, measure: Callable[[], dict[str, float]], tracker: Tracker, every_steps: int) -> None:
        self.measure = measure
        self.tracker = tracker
        self.every_steps = every_steps
        self._last_step = -1
        self._latest: dict[str, float] = {}

    def measured(self, step: int, metric: str) -> float | None:
        """A metric as measured at a step; None where it was not measured there."""
        return self._latest.get(metric) if step == self._last_step else None

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Measure when it is time."""
        if run.step % self.every_steps == 0:
            self._validate(run)

    def on_train_end(self, run: TrainingRun) -> None:
        """Measure the finished model, unless the last step just did."""
        if run.stop_reason is None and self._last_step != run.step:
            self._validate(run)

    def state_dict(self) -> dict[str, Any]:
        """The step that was measured last."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._last_step = int(state["last_step"])

    def _validate(self, run: TrainingRun) -> None:
        self._last_step = run.step
        self._latest = self.measure()
        self.tracker.log_metrics(self._latest, run.step)
