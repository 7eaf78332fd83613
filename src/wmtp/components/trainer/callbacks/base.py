"""The moments of a training run at which others may act."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun
    from wmtp.components.trainer.step import StepResult


class Callback:
    """Called by the loop; each method does nothing unless overridden.

    `run.step` counts finished updates: 0 in `on_train_start` of a fresh run, 1 in the first `on_step_end`.
    """

    def on_train_start(self, run: TrainingRun) -> None:
        """Before the first step; the state of a resumed run is already loaded."""

    def on_step_start(self, run: TrainingRun) -> None:
        """Before a step's batches are used."""

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """After the update."""

    def on_train_end(self, run: TrainingRun) -> None:
        """After the last step, also when the run was stopped before `max_steps`; not after an error."""

    def close(self) -> None:
        """Last of all, also after an error: give back what is held."""
