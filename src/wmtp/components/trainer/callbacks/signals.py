"""Signals that ask a process to end: at once, or after the step, as whoever runs decides."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# What a shell reports of a process that SIGINT ended.
_EXIT_CODE_SIGINT = 128 + signal.SIGINT


class RunStopped(KeyboardInterrupt):
    """A signal came while nothing has to be finished first.

    No `Exception`, so that code which survives errors of any kind does not survive this one.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class StopSignals:
    """Takes SIGTERM, SIGINT and SIGUSR1 over while it is entered.

    The first one raises `RunStopped` in the main thread, or, within `deferred()`, is kept in `received` for
    whoever asks. A second SIGINT ends the process with exit code 130, whatever it is waiting for: a thread of
    its own sees to that. Only the main thread can take signals over; elsewhere entering changes nothing.
    Processes forked meanwhile leave SIGINT and SIGUSR1 to this one and have SIGTERM's default back.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_deferred = False
        self._previous: dict[signal.Signals, Any] = {}
        self._wakeup: tuple[int, int, int] | None = None  # reading end, writing end, the fd before

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            threading.Thread(target=_quit_at_second_sigint, args=(reader,), daemon=True).start()
            before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            self._wakeup = (reader, writer, before)
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
            _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._wakeup is None:
            return
        _entered.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        _, writer, before = self._wakeup
        signal.set_wakeup_fd(before)
        # The thread sees the end of the pipe and closes its own side.
        os.close(writer)
        self._wakeup = None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let what runs meanwhile be finished; a signal is kept in `received`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def check(self) -> None:
        """Raise `RunStopped` where a deferred signal has been kept."""
        if self.received is not None:
            raise RunStopped(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first, self.received = self.received is None, self.received or signal.Signals(number)
        # Only the first: what it unwinds must not be unwound again.
        if is_first and not self._is_deferred:
            raise RunStopped(self.received)


_entered: list[StopSignals] = []


def _quit_at_second_sigint(reader: int) -> None:
    """Count SIGINTs, which C's handler writes into the pipe also while Python waits for something."""
    num_sigint = 0
    while numbers := os.read(reader, 64):
        num_sigint += numbers.count(signal.SIGINT)
        if num_sigint >= 2:
            # A progress line may have hidden the cursor of the terminal.
            os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"\n")
            os.write(2, b"second SIGINT: quitting at once, nothing more is saved\n")
            os._exit(_EXIT_CODE_SIGINT)
    os.close(reader)


def _hold_signals() -> None:
    """Before a fork: a signal waits until the new process has its own handlers."""
    if _entered:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _release_signals() -> None:
    """After a fork, in the process that forked."""
    if _entered:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _leave_signals_to_the_parent() -> None:
    """After a fork, in the new process: the parent decides when to stop, and its pipe hears of it alone."""
    if _entered:
        _entered.clear()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


os.register_at_fork(
    before=_hold_signals, after_in_parent=_release_signals, after_in_child=_leave_signals_to_the_parent
)
