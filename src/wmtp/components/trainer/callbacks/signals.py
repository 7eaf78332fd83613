"""Ends a run on request: finish the step, save, leave with exit code 4."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from wmtp.components.trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from wmtp.components.trainer.base import TrainingRun
    from wmtp.components.trainer.step import StepResult

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class SignalCallback(Callback):
    """Turns SIGTERM, SIGINT and SIGUSR1 into a stop after the present step; a second SIGINT quits at once."""

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, run: TrainingRun) -> None:
        """Take the signals over. Only the main thread may; elsewhere the caller's own handling stays."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def on_step_end(self, run: TrainingRun, result: StepResult) -> None:
        """Ask the loop to stop when a signal has come."""
        if self._received is not None:
            run.stop_reason = self._received

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
