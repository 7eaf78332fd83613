"""The moments of a training run at which others may act."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

    def state_dict(self) -> dict[str, Any]:
        """JSON state that a resumed run needs; kept in every checkpoint under the name of the class.

        Asked for before anything of a checkpoint is written. May wait for the device.

        Raises:
            TrainingDivergedError: the run is over, and this state must not become a checkpoint.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; called before `on_train_start`, on a resumed run only."""
