"""Watches one candidate: what it writes, how long it takes, how it ends. Used by the supervisor only."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
from typing import Any, Literal

from wmtp.execution.candidate import EXIT_ASSERTION, EXIT_MEMORY
from wmtp.execution.sandbox import Sandbox, anonymous_file

MAX_OUTPUT_BYTES = 16 << 20  # of stdout and of stderr; a program that writes more is killed
MAX_STDERR_BYTES = 1 << 20  # of stderr in a result
_START_S = 60.0  # for the sandbox to stand, on a machine with too much to do
_DRAIN_S = 1.0  # to read what is left in the pipes of a dead program
_NUM_PROCESSES = 64
_NUM_OPEN_FILES = 64
_FILE_BYTES = 16 << 20
_NUM_FILES = 10_000  # in /tmp
_COUNT_FILES_S = 0.1  # between two looks; a program can make some thousand files meanwhile

Outcome = Literal["verdict", "exited", "timeout", "flood", "files", "orphaned"]


class InfrastructureError(Exception):
    """The sandbox itself did not work, so nothing can be said about the program."""


class Candidate:
    """One program in its sandbox.

    Args:
        sandbox: how to start it.
        job: the fields of a `ProgramJob`.
        source: the program.
        wake_fd: becomes readable when a child process ends.
        channel: descriptors for the candidate's end of the channel; None runs the program as a script.

    Attributes:
        verdict: what came over the tester's pipe.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        job: dict[str, Any],
        source: str,
        wake_fd: int,
        channel: tuple[int, int] | None = None,
    ) -> None:
        self.verdict = b""
        self._wake_fd = wake_fd
        self._poll = select.poll()
        self._poll.register(wake_fd, select.POLLIN)
        self._poll.register(0, 0)  # only its hang-up: the library's process is gone
        self._open: dict[int, bytearray] = {}
        self._start_time = time.monotonic()
        pipes = [os.pipe() for _ in range(3)]
        self._stdout, self._stderr, self._started = (self._collected(read_end) for read_end, _ in pipes)
        started_fd = pipes[2][1]
        config: dict[str, Any] = {
            "entry": "main",
            "source": source,
            "mode": "script",
            "started_fd": started_fd,
            "limits": _candidate_limits(job, is_isolated=sandbox.is_isolated),
        }
        descriptors = [started_fd]
        if channel is not None:
            config |= {"mode": "serve", "read_fd": channel[0], "write_fd": channel[1]}
            descriptors += channel
        try:
            with anonymous_file(job["stdin"].encode("utf-8", "surrogatepass")) as stdin:
                self._process = sandbox.start(
                    ("wire", "peer", "candidate"),
                    config,
                    descriptors=descriptors,
                    streams=(stdin.fileno(), pipes[0][1], pipes[1][1]),
                    allow_processes=not sandbox.is_isolated,
                )
        finally:
            for _, write_end in pipes:
                os.close(write_end)

    def _collected(self, descriptor: int) -> bytearray:
        self._poll.register(descriptor, select.POLLIN)
        self._open[descriptor] = bytearray()
        return self._open[descriptor]

    def watch(self, limit_s: float, verdict_fd: int | None = None) -> Outcome:
        """Collect output until something ends.

        Args:
            limit_s: seconds from when the sandbox stands; from now when it stood before.
            verdict_fd: the tester's pipe, whose end to wait for; without it, the end of the program.
        """
        if verdict_fd is not None:
            self._poll.register(verdict_fd, select.POLLIN)
        verdict = bytearray()
        stood = bool(self._started)
        deadline = time.monotonic() + (limit_s if stood else _START_S)
        while verdict_fd is not None or self._process.process.poll() is None:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return "timeout"
            for descriptor, _ in self._poll.poll(max(1.0, min(remaining_s, _COUNT_FILES_S) * 1000)):
                if descriptor == 0:
                    return "orphaned"
                if descriptor == self._wake_fd:
                    with contextlib.suppress(BlockingIOError):
                        os.read(descriptor, 4096)
                elif descriptor == verdict_fd:
                    part = os.read(descriptor, 1 << 16)
                    verdict += part
                    if not part:
                        self._poll.unregister(descriptor)
                        self.verdict = bytes(verdict)
                        return "verdict"
                else:
                    self._collect(descriptor)
            if max(len(self._stdout), len(self._stderr)) > MAX_OUTPUT_BYTES:
                return "flood"
            if stood and (self._process.num_files() or 0) > _NUM_FILES:
                return "files"
            if not stood and self._started:
                stood = True
                deadline = time.monotonic() + limit_s
        return "exited"

    def _collect(self, descriptor: int) -> None:
        part = os.read(descriptor, 1 << 16)
        self._open[descriptor] += part
        if not part:
            self._poll.unregister(descriptor)
            del self._open[descriptor]
            os.close(descriptor)

    def close(self) -> None:
        """Kill everything of the sandbox, wait until it is gone, and read what is left in the pipes."""
        self._process.close()
        deadline = time.monotonic() + _DRAIN_S
        while self._open and time.monotonic() < deadline:
            if max(len(self._stdout), len(self._stderr)) > MAX_OUTPUT_BYTES:
                break
            for descriptor, _ in self._poll.poll(100):
                if descriptor in self._open:
                    self._collect(descriptor)
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    def judge(self, outcome: Outcome) -> tuple[str, str]:
        """Status and message from how the program ended, for a program that is closed."""
        if outcome == "orphaned":
            return "killed", "the run was given up"
        if not self._started:
            raise InfrastructureError(f"the sandbox did not start: {last_line(self._stderr) or outcome}")
        if outcome == "timeout":
            return "timeout", "the time limit was reached"
        if outcome == "flood":
            return "killed", f"more than {MAX_OUTPUT_BYTES >> 20} MiB of output"
        if outcome == "files":
            return "killed", f"more than {_NUM_FILES} files"
        code = self._process.process.returncode
        last_words = self._stderr[-2000:].decode("utf-8", "replace").strip()
        if code == 0:
            return "passed", ""
        if code == EXIT_MEMORY:
            return "memory", last_words
        if code == EXIT_ASSERTION:
            return "failed", last_words
        number = -code if code < 0 else code - 128  # bubblewrap reports signals like a shell
        if number == signal.SIGXCPU:
            return "timeout", "the limit of processor time was reached"
        if number in {int(known) for known in signal.Signals}:
            return "killed", f"the program died of {signal.Signals(number).name}"
        return "error", last_words or f"exit status {code}"

    def result(self, status: str, message: str) -> dict[str, Any]:
        """The frame of a result."""
        return {
            "status": status,
            "message": message,
            "stdout": self._stdout[:MAX_OUTPUT_BYTES].decode("utf-8", "replace"),
            "stderr": self._stderr[:MAX_STDERR_BYTES].decode("utf-8", "replace"),
            "asserts_passed": 0,
            "asserts_total": 0,
        }


def last_line(text: bytes | bytearray) -> str:
    """The last line of what a process wrote: the message of bubblewrap, or the error of a traceback."""
    return text.decode("utf-8", "replace").strip().rpartition("\n")[2][-500:]


def _candidate_limits(job: dict[str, Any], *, is_isolated: bool) -> list[tuple[str, int]]:
    """Limits the candidate sets on itself before it reads the program; without privileges they stay."""
    limits = {
        "RLIMIT_AS": job["memory_mib"] << 20,
        "RLIMIT_CPU": int(job["timeout_s"]) + 2,
        "RLIMIT_FSIZE": _FILE_BYTES,
        "RLIMIT_NOFILE": _NUM_OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    if is_isolated:
        # Since Linux 5.14 this counts per user namespace, so sandboxes of one user do not starve each other.
        # Outside a sandbox it would count all processes of this user.
        limits["RLIMIT_NPROC"] = _NUM_PROCESSES
    return [(name, _bounded(name, value)) for name, value in limits.items()]


def _bounded(name: str, value: int) -> int:
    """A limit that does not exceed the one already in force."""
    hard = resource.getrlimit(vars(resource)[name])[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)
