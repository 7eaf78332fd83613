"""The process between the library and the sandboxes: starts them, watches them, ends them.

One supervisor serves one worker. It is small and single-threaded, which the library's own process is not:
starting a process from there would copy the page tables of a whole model, and bubblewrap's
`--die-with-parent` would follow the thread that started it. It keeps one warm tester (`tester`), and starts
one cold candidate (`candidate`) a program.

Frames on stdin and stdout: four bytes of length, then JSON. The first frame is the configuration, each
further one a job; every frame is answered by one. The end of stdin ends the supervisor and everything below
it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from wmtp.execution.candidate import EXIT_ASSERTION, EXIT_MEMORY
from wmtp.execution.sandbox import Sandbox, anonymous_file

MAX_OUTPUT_BYTES = 16 << 20  # of stdout and of stderr; a program that writes more is killed
_GRACE_S = 0.5  # for a candidate to flush its output once the verdict is there
_TESTER_START_S = 30.0
_TESTER_MEMORY_MIB = 2048
_MAX_STDERR_CHARS = 1 << 20
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


class InfrastructureError(Exception):
    """The sandbox itself did not work, so nothing can be said about the program."""


def main() -> None:
    """Serve jobs until stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    config = read_frame(requests)
    if config is None:
        return
    worker = _Worker(config)
    try:
        while (job := read_frame(requests)) is not None:
            try:
                answer = worker.run(job)
            except (InfrastructureError, OSError) as error:
                answer = {"infrastructure": str(error)}
            write_frame(answers, answer)
    finally:
        worker.close()


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one frame; None at the end of the stream."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    body = stream.read(int.from_bytes(head, "big"))
    frame: dict[str, Any] = json.loads(body)
    return frame


def write_frame(stream: BinaryIO, frame: dict[str, Any]) -> None:
    """Write one frame."""
    body = json.dumps(frame).encode()
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


class _Worker:
    """Runs jobs one after the other."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._sandbox = Sandbox(config)
        self._tester: _Tester | None = None
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        if not self._sandbox.is_isolated and sys.platform == "linux":
            # What a program leaves behind becomes this process's child and can be found and ended.
            ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)

    def close(self) -> None:
        """End the tester."""
        if self._tester is not None:
            self._tester.close()
            self._tester = None

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run one job and give its result as a frame."""
        started = time.monotonic()
        if job["tests"] is None:
            result = self._run_script(job, job["source"])
        else:
            result = self._run_tested(job)
            if result["status"] == "unverified":
                result = self._run_inside(job, result)
        result["wall_s"] = time.monotonic() - started
        result["isolation"] = "bubblewrap" if self._sandbox.is_isolated else "process-limits"
        return result

    def _run_script(self, job: dict[str, Any], source: str) -> dict[str, Any]:
        candidate = _Candidate(self._sandbox, job, source, self._wake_read)
        try:
            outcome = candidate.watch(None, time.monotonic() + job["timeout_s"])
        finally:
            candidate.close(self._own_children())
        status, message = candidate.judge(outcome)
        return candidate.result(status, message)

    def _run_inside(self, job: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """Run program and tests together: what fails there has failed, what passes is only a claim."""
        source = "\n".join((job["source"], job["setup"], job["tests"]))
        inside = self._run_script(job, source)
        if inside["status"] == "passed":
            inside["status"] = "unverified"
            inside["message"] = f"the tests cannot be run from outside the sandbox: {result['message']}"
        inside["asserts_total"] = result["asserts_total"]
        return inside

    def _run_tested(self, job: dict[str, Any]) -> dict[str, Any]:
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        verdict_read, verdict_write = os.pipe()
        deadline = time.monotonic() + job["timeout_s"]
        theirs = [request_read, reply_write]
        ours = [request_write, reply_read, verdict_write]
        candidate = None
        try:
            candidate = _Candidate(
                self._sandbox, job, job["source"], self._wake_read, channel=(request_read, reply_write)
            )
            while theirs:
                os.close(theirs.pop())
            self._send_to_tester(job, ours)
            while ours:
                os.close(ours.pop())
            outcome = candidate.watch(verdict_read, deadline)
            if outcome == "verdict":
                candidate.watch(None, time.monotonic() + _GRACE_S)
            else:
                self.close()
        finally:
            if candidate is not None:
                candidate.close(self._own_children())
            for descriptor in (*theirs, *ours, verdict_read):
                os.close(descriptor)
        if outcome != "verdict":
            return candidate.result(*candidate.judge(outcome))
        return self._conclude(candidate)

    def _conclude(self, candidate: _Candidate) -> dict[str, Any]:
        try:
            verdict = json.loads(candidate.verdict)
        except ValueError:  # the tests ended their own process
            self.close()
            return candidate.result("error", "the tests ended without a verdict")
        status, message = verdict["status"], verdict["message"]
        if status == "lost":
            status, message = candidate.judge("exited")
            if status == "passed":
                status, message = "error", "the program ended before its tests did"
        result = candidate.result(status, message)
        result.update(asserts_passed=verdict["asserts_passed"], asserts_total=verdict["asserts_total"])
        return result

    def _send_to_tester(self, job: dict[str, Any], descriptors: list[int]) -> None:
        limits = [
            ("RLIMIT_AS", _TESTER_MEMORY_MIB << 20),
            ("RLIMIT_CPU", int(job["timeout_s"]) + 2),
            ("RLIMIT_CORE", 0),
        ]
        payload = {key: job[key] for key in ("tests", "setup", "stop_at_failure")} | {"limits": limits}
        request_write, reply_read, verdict_write = descriptors
        with anonymous_file(json.dumps(payload).encode()) as file:
            for attempt in (1, 2):  # the tester may have died since its last job
                if self._tester is None:
                    self._tester = _Tester(self._sandbox)
                try:
                    self._tester.send([file.fileno(), reply_read, request_write, verdict_write])
                    return
                except OSError:
                    self.close()
                    if attempt == 2:
                        raise

    def _own_children(self) -> set[int]:
        return set() if self._tester is None else {self._tester.process.pid}


class _Tester:
    """The warm process that executes tests."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._control, theirs = socket.socketpair()
        self._stderr = anonymous_file(b"")
        with theirs:
            self.process = sandbox.start(
                ("wire", "tester"),
                {"entry": "serve", "control_fd": theirs.fileno()},
                descriptors=[theirs.fileno()],
                streams=(subprocess.DEVNULL, subprocess.DEVNULL, self._stderr.fileno()),
                allow_processes=True,
            )
        self._control.settimeout(_TESTER_START_S)
        try:
            greeting = self._control.recv(1)
        except TimeoutError:
            greeting = b""
        if greeting != b"1":
            self.close()
            self._stderr.seek(0)
            text = self._stderr.read().decode("utf-8", "replace").strip()
            raise InfrastructureError(f"the tester did not start: {text[-500:] or 'no message'}")

    def send(self, descriptors: list[int]) -> None:
        """Hand over one job."""
        socket.send_fds(self._control, [b"j"], descriptors)

    def close(self) -> None:
        """End the process and what it forked."""
        self._control.close()
        self.process.kill()
        self.process.wait()


class _Candidate:
    """One program in its sandbox, with what it writes."""

    def __init__(
        self,
        sandbox: Sandbox,
        job: dict[str, Any],
        source: str,
        wake_fd: int,
        channel: tuple[int, int] | None = None,
    ) -> None:
        self._is_isolated = sandbox.is_isolated
        self._wake_fd = wake_fd
        self._poll = select.poll()
        self._buffers: dict[int, bytearray] = {}
        pipes = {name: os.pipe() for name in ("stdout", "stderr", "started", "info")}
        self._stdout, self._stderr, self._started, self._info = (
            self._watched(pipes[name][0]) for name in pipes
        )
        self._is_flooded = False
        self.verdict = b""
        config: dict[str, Any] = {
            "entry": "main",
            "source": source,
            "mode": "script" if channel is None else "serve",
            "started_fd": pipes["started"][1],
            "limits": _candidate_limits(job, sandbox),
        }
        descriptors = [pipes["started"][1], pipes["info"][1]]
        if channel is not None:
            config["read_fd"], config["write_fd"] = channel
            descriptors += channel
        try:
            with anonymous_file(job["stdin"].encode("utf-8", "surrogatepass")) as stdin:
                self.process = sandbox.start(
                    ("wire", "candidate"),
                    config,
                    descriptors=descriptors,
                    streams=(stdin.fileno(), pipes["stdout"][1], pipes["stderr"][1]),
                    allow_processes=not sandbox.is_isolated,
                    info_fd=pipes["info"][1],
                )
        finally:
            for _, write_end in pipes.values():
                os.close(write_end)

    def _watched(self, descriptor: int) -> bytearray:
        self._poll.register(descriptor, select.POLLIN)
        self._buffers[descriptor] = bytearray()
        return self._buffers[descriptor]

    def watch(self, verdict_fd: int | None, deadline: float) -> str:
        """Collect output until something ends.

        Returns:
            `verdict`, `exited` (only where no verdict is waited for), `flood`, `timeout`, or `orphaned` when
            the library's process is gone.
        """
        self._poll.register(self._wake_fd, select.POLLIN)
        self._poll.register(0, 0)  # only its hang-up
        if verdict_fd is not None:
            self._poll.register(verdict_fd, select.POLLIN)
        verdict = bytearray()
        while True:
            if verdict_fd is None and self.process.poll() is not None:
                return "exited"
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return "timeout"
            for descriptor, _ in self._poll.poll(max(1.0, remaining_s * 1000)):
                if descriptor == 0:
                    return "orphaned"
                if descriptor == self._wake_fd:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_fd, 4096)
                elif descriptor == verdict_fd:
                    part = os.read(descriptor, 1 << 16)
                    verdict += part
                    if not part:
                        self._poll.unregister(descriptor)
                        self.verdict = bytes(verdict)
                        return "verdict"
                else:
                    self._collect(descriptor)
            if self._is_flooded:
                return "flood"

    def _collect(self, descriptor: int) -> None:
        part = os.read(descriptor, 1 << 16)
        buffer = self._buffers[descriptor]
        buffer += part
        if not part:
            self._poll.unregister(descriptor)
            del self._buffers[descriptor]
            os.close(descriptor)
        elif len(buffer) > MAX_OUTPUT_BYTES:
            self._is_flooded = True

    def close(self, spared: set[int]) -> None:
        """Kill everything of the sandbox, wait until it is gone, and read what is left in the pipes."""
        if self.process.poll() is None:
            self._kill()
        if not self._is_isolated:
            _kill_stray_children(self.process.pid, spared)
        deadline = time.monotonic() + 1.0
        while self._buffers and time.monotonic() < deadline and not self._is_flooded:
            for descriptor, _ in self._poll.poll(100):
                if descriptor in self._buffers:
                    self._collect(descriptor)
        for descriptor in self._buffers:
            os.close(descriptor)
        self._buffers.clear()

    def _kill(self) -> None:
        # The first process of the sandbox, not bubblewrap itself: bubblewrap then reaps it and leaves no
        # zombie behind, and its own end tells that every process of the namespace is gone.
        with contextlib.suppress(ProcessLookupError):
            if self._is_isolated and (inner := self._inner_process()) is not None:
                os.kill(inner, signal.SIGKILL)
            else:
                os.killpg(self.process.pid, signal.SIGKILL)
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _inner_process(self) -> int | None:
        try:
            return int(json.loads(bytes(self._info))["child-pid"])
        except (ValueError, KeyError):
            return None  # killed before bubblewrap had told

    def judge(self, outcome: str) -> tuple[str, str]:
        """Status and message from how the process ended."""
        if not self._started and outcome != "orphaned":
            text = self._stderr.decode("utf-8", "replace").strip()
            raise InfrastructureError(f"the sandbox did not start: {text[-500:] or outcome}")
        if outcome == "timeout":
            return "timeout", "the time limit was reached"
        if outcome == "flood":
            return "killed", f"more than {MAX_OUTPUT_BYTES >> 20} MiB of output"
        if outcome == "orphaned":
            return "killed", "the run was given up"
        code = self.process.returncode
        if code == 0:
            return "passed", ""
        if code == EXIT_MEMORY:
            return "memory", self._last_lines()
        if code == EXIT_ASSERTION:
            return "failed", self._last_lines()
        number = -code if code < 0 else code - 128
        if number == signal.SIGXCPU:
            return "timeout", "the limit of processor time was reached"
        if number in {int(known) for known in signal.Signals}:
            return "killed", f"the program died of {signal.Signals(number).name}"
        return "error", self._last_lines() or f"exit status {code}"

    def _last_lines(self) -> str:
        return self._stderr[-2000:].decode("utf-8", "replace").strip()

    def result(self, status: str, message: str) -> dict[str, Any]:
        """The frame of a result."""
        return {
            "status": status,
            "message": message,
            "stdout": self._stdout[:MAX_OUTPUT_BYTES].decode("utf-8", "replace"),
            "stderr": self._stderr[:_MAX_STDERR_CHARS].decode("utf-8", "replace"),
            "asserts_passed": 0,
            "asserts_total": 0,
        }


def _candidate_limits(job: dict[str, Any], sandbox: Sandbox) -> list[tuple[str, int]]:
    """Limits the candidate sets on itself before it reads the program; without privileges they cannot be
    raised."""
    limits = [
        ("RLIMIT_AS", job["memory_mib"] << 20),
        ("RLIMIT_CPU", int(job["timeout_s"]) + 2),
        ("RLIMIT_FSIZE", 16 << 20),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
    ]
    if sandbox.is_isolated:
        # Since Linux 5.14 counted per user namespace, so sandboxes of one user do not starve each other.
        limits.append(("RLIMIT_NPROC", 64))
    return [
        (name, min(value, hard) if (hard := resource.getrlimit(vars(resource)[name])[1]) >= 0 else value)
        for name, value in limits
    ]


def _kill_stray_children(group: int, spared: set[int]) -> None:
    """Without a namespace: kill the process group, then whatever has become this process's child."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    if not listing.exists():
        return
    for _ in range(100):
        strays = {int(pid) for pid in listing.read_text().split()} - spared
        if not strays:
            return
        for pid in strays:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
