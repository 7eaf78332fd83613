"""Sending to a tracking store from a thread of its own, so that training never waits for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

# An entry that fails this often while the next one gets through is what is wrong, not the store.
_MAX_ATTEMPTS = 5
# A log step's metrics take about 3 kB, so this is a bound of 300 MB; a run has seldom more log steps.
_MAX_WAITING = 100_000


@dataclass(slots=True, eq=False)
class _Entry:
    send: Callable[[], None]
    num_attempts: int = 0


class Delivery:
    """Calls what it is given, in order, until each call has succeeded.

    After a failure everything waits `retry_s` seconds and is tried again from the failed entry on. An entry
    that fails five times although the next one succeeds is dropped, so that one bad entry cannot block the
    rest. Beyond 100,000 entries the oldest are dropped.

    Args:
        retry_s: seconds between attempts after a failure.
    """

    def __init__(self, *, retry_s: float) -> None:
        self.retry_s = retry_s
        self.num_dropped = 0
        self.first_error: Exception | None = None
        self._waiting: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._next_attempt = 0.0
        self._num_rounds = 0
        self._is_closing = False
        self._is_done = False
        # A daemon: a call that hangs for good must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="wmtp-tracking", daemon=True)
        self._thread.start()

    def put(self, send: Callable[[], None]) -> None:
        """Have `send` called after all that was given before it."""
        with self._changed:
            if len(self._waiting) >= _MAX_WAITING:
                # The first two may be on their way at this moment.
                del self._waiting[2]
                self.num_dropped += 1
            self._waiting.append(_Entry(send))
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything given so far was sent, or a call failed; whether nothing is left."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._waiting and time.monotonic() >= self._next_attempt:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            return not self._waiting

    def close(self, patience_s: float) -> int:
        """Try once more to send what is left; give up at the first failure, or when nothing has got through
        for `patience_s` seconds. Return how many entries were never sent.
        """
        with self._changed:
            self._is_closing = True
            self._next_attempt = 0.0
            self._changed.notify_all()
            while not self._is_done:
                before = (len(self._waiting), self._num_rounds)
                self._changed.wait(patience_s)
                if before == (len(self._waiting), self._num_rounds):
                    break
            return len(self._waiting) + self.num_dropped

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._has_work():
                    if self._is_closing:
                        self._is_done = True
                        self._changed.notify_all()
                        return
                    self._changed.wait(self._seconds_to_wait())
                entry = self._waiting[0]
                following = self._waiting[1] if len(self._waiting) > 1 else None
                # Set by close(): a call that was under way before it gets another chance.
                is_last_round = self._is_closing
            self._try(entry, following, is_last_round)

    def _has_work(self) -> bool:
        return bool(self._waiting) and time.monotonic() >= self._next_attempt

    def _seconds_to_wait(self) -> float | None:
        return max(0.0, self._next_attempt - time.monotonic()) if self._waiting else None

    def _try(self, entry: _Entry, following: _Entry | None, is_last_round: bool) -> None:
        error = self._call(entry)
        is_bad_entry = (
            error is not None
            and (is_last_round or entry.num_attempts >= _MAX_ATTEMPTS)
            and following is not None
            and self._call(following) is None
        )
        with self._changed:
            self._num_rounds += 1
            if error is None or is_bad_entry:
                self._waiting.remove(entry)
                if is_bad_entry and following is not None:
                    self._waiting.remove(following)
                    self.num_dropped += 1
                self._next_attempt = 0.0
            elif is_last_round:
                self._next_attempt = float("inf")
            else:
                self._next_attempt = 0.0 if self._is_closing else time.monotonic() + self.retry_s
            self._changed.notify_all()

    def _call(self, entry: _Entry) -> Exception | None:
        try:
            entry.send()
        # Whatever the other side raises (network, database, a bug of its own), training must go on.
        except Exception as error:
            entry.num_attempts += 1
            self.first_error = self.first_error or error
            return error
        return None
