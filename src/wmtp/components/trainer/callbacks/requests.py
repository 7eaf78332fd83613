"""What is asked of a run from outside, agreed over ranks: stop after this step, save after this step."""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.components.trainer.agreement import RankAgreement
from wmtp.components.trainer.callbacks.base import Callback
from wmtp.components.trainer.callbacks.signals import StopSignals

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun
    from wmtp.components.trainer.step import StepResult

logger = logging.getLogger(__name__)

# Touching this file in a run's folder of checkpoints saves one after the present step.
SAVE_FILE_NAME = "SAVE"

_LOOK_EVERY_S = 1.0


class RequestCallback(Callback):
    """Ends the run when a signal came to any rank, and saves when a file was touched; before the checkpoints.

    All ranks do either after the same step: one small collective a step among the hosts.

    Args:
        signals: what was received; the caller enters and defers it.
        save_file: touched by whoever wants a checkpoint; removed once that is made. Looked for at the ends of
            steps, at most once a second.
    """

    def __init__(self, signals: StopSignals, save_file: Path) -> None:
        self.signals = signals
        self.save_file = save_file
        self._agreement: RankAgreement | None = None
        self._next_look = 0.0
        self._seen_ns: int | None = None
        self._answered_ns: int | None = None

    def on_train_start(self, run: TrainingRun) -> None:
        """Make the folder in which the file is to be touched."""
        self.save_file.parent.mkdir(parents=True, exist_ok=True)
        self._agreement = RankAgreement()

    def on_step_start(self, run: TrainingRun) -> None:
        """The save of the step before has been made."""
        self._remove_answered(run)

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Agree with the other ranks, then ask the loop to stop and the checkpoints to save."""
        assert self._agreement is not None
        received = self.signals.received
        number, is_save = self._agreement.largest(received or 0, int(self._is_save_asked()))
        if number:
            run.stop_reason = signal.Signals(number).name
        if is_save:
            logger.info("step %d: a checkpoint was asked for by %s", run.step, self.save_file)
            run.save_requested = True

    def on_train_end(self, run: TrainingRun) -> None:
        """The last step's save has been made."""
        self._remove_answered(run)

    def _is_save_asked(self) -> bool:
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + _LOOK_EVERY_S
        try:
            self._seen_ns = self.save_file.stat().st_mtime_ns
        except FileNotFoundError:
            self._seen_ns = None
        return self._seen_ns is not None and self._seen_ns != self._answered_ns

    def _remove_answered(self, run: TrainingRun) -> None:
        """Remove the file, unless it was touched again since."""
        if self._seen_ns is None or self._seen_ns == self._answered_ns or run.save_requested:
            return
        self._answered_ns = self._seen_ns
        try:
            if self.save_file.stat().st_mtime_ns == self._seen_ns:
                self.save_file.unlink()
        except FileNotFoundError:
            return  # another rank was faster
        except OSError as error:
            logger.warning("%s cannot be removed: %s; touch it again to save again", self.save_file, error)
            return
        logger.info("the checkpoint is taken and %s removed", self.save_file)
