"""The process between the library and the sandboxes: starts them, watches them, ends them.

One supervisor serves one worker. It is small and single-threaded, which the library's own process is not:
starting a process from there may copy the page tables of a whole model, and bubblewrap's `--die-with-parent`
would follow the thread that started it. It keeps one warm tester (`tester`), and starts one cold candidate
(`candidate`) a program.

Frames on stdin and stdout: four bytes of length, then JSON. The first frame is the configuration, each
further one a job that is answered by one frame. An empty frame, or the end of stdin, ends the supervisor and
everything below it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from wmtp.execution.outputs import outputs_match
from wmtp.execution.sandbox import Sandbox, anonymous_file
from wmtp.execution.watcher import Candidate, InfrastructureError, last_line

_GRACE_S = 0.5  # for a candidate to flush its output once the verdict is there
_TESTER_START_S = 60.0
_TESTER_MEMORY_MIB = 1024
_SHOWN_CHARS = 200  # of an output in a message
_SET_CHILD_SUBREAPER = 36  # prctl(2)
_RESULT_WITHOUT_VERDICT = {
    "status": "error",
    "message": "the tests ended their own process",
    "stdout": "",
    "stderr": "",
    "asserts_passed": 0,
    "asserts_total": 0,
}


def main() -> None:
    """Serve jobs until told to end."""
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


def read_frame(stream: IO[bytes]) -> dict[str, Any] | None:
    """Read one frame; None for an empty one or at the end of the stream."""
    length = int.from_bytes(stream.read(4), "big")
    if length == 0:
        return None
    frame: dict[str, Any] = json.loads(stream.read(length))
    return frame


def write_frame(stream: IO[bytes], frame: dict[str, Any] | None) -> None:
    """Write one frame."""
    body = b"" if frame is None else json.dumps(frame).encode()
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


class _Worker:
    """Runs jobs one after the other."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._sandbox = Sandbox(config)
        self._tester: _Tester | None = None
        self._wake_fd, wake_write = os.pipe()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the pipe
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        if not self._sandbox.is_isolated and sys.platform == "linux":
            # What a program leaves behind becomes this process's child, so it can be found and ended.
            ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def close(self) -> None:
        """End the tester."""
        if self._tester is not None:
            self._tester.close()
            self._tester = None

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run one job and give its result as a frame."""
        start = time.monotonic()
        result: dict[str, Any]
        if job["cases"] is not None:
            result = self._run_cases(job)
        elif job["tests"] is None:
            result = self._run_script(job, job["source"])
        else:
            # A tester can be killed from outside as well as by the tests, hence two attempts.
            result = self._run_tested(job) or self._run_tested(job) or dict(_RESULT_WITHOUT_VERDICT)
            if result["status"] == "unverified":
                result = self._run_inside(job, result)
        result["wall_s"] = time.monotonic() - start
        result["isolation"] = "bubblewrap" if self._sandbox.is_isolated else "process-limits"
        return result

    def _run_script(self, job: dict[str, Any], source: str) -> dict[str, Any]:
        candidate = Candidate(self._sandbox, job, source, self._wake_fd)
        try:
            outcome = candidate.watch(job["timeout_s"])
        finally:
            self._end(candidate)
        return candidate.result(*candidate.judge(outcome))

    def _run_cases(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run the program once a case, each time in a new sandbox, and compare here what it printed."""
        cases = job["cases"]
        num_passed = 0
        first_failure: dict[str, Any] = {}
        for number, (stdin, expected) in enumerate(cases, 1):
            result = self._run_script(job | {"stdin": stdin}, job["source"])
            if result["status"] == "passed" and not outputs_match(result["stdout"], expected):
                result["status"] = "failed"
                result["message"] = f"expected {_shortened(expected)}, printed {_shortened(result['stdout'])}"
            if result["status"] == "passed":
                num_passed += 1
                continue
            result["message"] = f"case {number} of {len(cases)}: {result['message']}"
            first_failure = first_failure or result
            if job["stop_at_failure"]:
                break
        return (first_failure or result) | {"asserts_passed": num_passed, "asserts_total": len(cases)}

    def _run_inside(self, job: dict[str, Any], outside: dict[str, Any]) -> dict[str, Any]:
        """Run program and tests together: what fails there has failed, what passes is only a claim."""
        result = self._run_script(job, "\n".join((job["source"], job["setup"], job["tests"])))
        if result["status"] == "passed":
            result["status"] = "unverified"
            result["message"] = f"the tests cannot be run from outside the sandbox: {outside['message']}"
        result["asserts_total"] = outside["asserts_total"]
        return result

    def _run_tested(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """Run program and tests in their two processes; None when the tests' process gave no verdict."""
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        verdict_read, verdict_write = os.pipe()
        candidate = None
        try:
            try:
                channel = (request_read, reply_write)
                candidate = Candidate(self._sandbox, job, job["source"], self._wake_fd, channel)
                self._send_to_tester(job, [reply_read, request_write, verdict_write])
            finally:  # only the two ends may hold these, or neither would notice that the other is gone
                for descriptor in (request_read, request_write, reply_read, reply_write, verdict_write):
                    os.close(descriptor)
            outcome = candidate.watch(job["timeout_s"], verdict_read)
            if outcome == "verdict":
                candidate.watch(_GRACE_S)
            else:
                self.close()  # with the tests that still run
        finally:
            os.close(verdict_read)
            if candidate is not None:
                self._end(candidate)
        if outcome != "verdict":
            return candidate.result(*candidate.judge(outcome))
        return self._conclude(candidate)

    def _conclude(self, candidate: Candidate) -> dict[str, Any] | None:
        """Turn the tester's verdict into a result."""
        if not candidate.verdict:
            self.close()
            return None
        verdict = json.loads(candidate.verdict)
        status, message = verdict["status"], verdict["message"]
        if status == "lost":
            status, message = candidate.judge("exited")
            if status == "passed":
                status, message = "error", "the program ended before its tests did"
        result = candidate.result(status, message)
        return result | {key: verdict[key] for key in ("asserts_passed", "asserts_total")}

    def _send_to_tester(self, job: dict[str, Any], descriptors: list[int]) -> None:
        limits = [
            ("RLIMIT_AS", _TESTER_MEMORY_MIB << 20),
            ("RLIMIT_CPU", int(job["timeout_s"]) + 2),
            ("RLIMIT_CORE", 0),
        ]
        payload = {key: job[key] for key in ("tests", "setup", "stop_at_failure")} | {"limits": limits}
        with anonymous_file(json.dumps(payload).encode()) as file:
            if self._tester is not None:
                try:
                    self._tester.send([file.fileno(), *descriptors])
                    return
                except OSError:  # it died since its last job
                    self.close()
            self._tester = _Tester(self._sandbox)
            self._tester.send([file.fileno(), *descriptors])

    def _end(self, candidate: Candidate) -> None:
        candidate.close()
        if not self._sandbox.is_isolated:
            _kill_stray_children(set() if self._tester is None else {self._tester.pid})


class _Tester:
    """The warm process that executes tests."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._control, theirs = socket.socketpair()
        with theirs, anonymous_file(b"") as stderr:
            self._process = sandbox.start(
                ("wire", "peer", "tester"),
                {"entry": "serve", "control_fd": theirs.fileno()},
                descriptors=[theirs.fileno()],
                streams=(subprocess.DEVNULL, subprocess.DEVNULL, stderr.fileno()),
                allow_processes=True,
            )
            theirs.close()
            self._control.settimeout(_TESTER_START_S)
            try:
                greeting = self._control.recv(1)
            except TimeoutError:
                greeting = b""
            if greeting != b"1":
                self.close()
                stderr.seek(0)
                raise InfrastructureError(
                    f"the tester did not start: {last_line(stderr.read()) or 'no message'}"
                )

    @property
    def pid(self) -> int:
        """The process that this one started."""
        return self._process.process.pid

    def send(self, descriptors: list[int]) -> None:
        """Hand over one job."""
        socket.send_fds(self._control, [b"j"], descriptors)

    def close(self) -> None:
        """End the process and what it forked."""
        self._control.close()
        self._process.close()


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}...")


def _kill_stray_children(spared: set[int]) -> None:
    """Without a namespace: kill whatever has become this process's child."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    if not listing.exists():  # not Linux: the process group was killed, more is not known
        return
    while strays := {int(pid) for pid in listing.read_text().split()} - spared:
        for pid in strays:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
