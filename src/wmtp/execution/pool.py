"""The library's side: a pool of workers, each a supervisor process that runs one program at a time."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import wmtp
from wmtp.exceptions import SandboxUnavailableError, UserInputError
from wmtp.execution.layout import sandbox_layout
from wmtp.execution.results import Isolation, ProgramJob, ProgramResult, SandboxKind, SandboxStatus
from wmtp.execution.seccomp import build_filter
from wmtp.execution.supervisor import read_frame, write_frame

User = Literal["own", "mapped"]
MIN_MEMORY_MIB = 64
LANGUAGE = "python3"
_MAX_IDLE = 16  # warm workers a process keeps
_RUN_MARGIN_S = 5.0  # for starting and ending a run
_MARGIN_S = 300.0  # beyond a program's own time limit, before a supervisor that does not answer is given up
_START = "import sys; sys.path.insert(0, sys.argv.pop()); from wmtp.execution.supervisor import main; main()"
# What the first program of a process sees, judged on the trusted side: an executable that calls itself bwrap
# and lets everything through must not be taken for a sandbox.
_LOOK_AROUND = """
import os
def user(): return os.getuid(), os.geteuid()
def exist(paths): return [path for path in paths if os.path.exists(path)]
def variables(): return list(os.environ)
"""
_SEEN_NOTHING = """
assert 0 not in user(), "it runs as root"
assert not (found := exist(["/proc/self", "/etc/passwd", "/home", "/root", "/var"])), found
assert not (found := set(variables()) - {"HOME", "PATH", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONHASHSEED",
    "MALLOC_ARENA_MAX", "LD_LIBRARY_PATH", "PWD"}), found
"""


class _WorkerLostError(RuntimeError):
    """The supervisor ended or does not answer."""


class _Worker:
    """One supervisor process. Used by one thread at a time."""

    def __init__(self, isolation: Isolation, *, user: User, has_filter: bool) -> None:
        layout = sandbox_layout() if isolation == "bubblewrap" else {}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _START, str(Path(wmtp.__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the keyboard is handled here, not there
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        config = {"isolation": isolation, "user": user, "has_filter": has_filter}
        write_frame(self._stdin, config | {"layout": layout, "python": sys.executable})

    def run(self, job: ProgramJob) -> dict[str, Any]:
        """Run one job; raises `_WorkerLostError` when the supervisor is of no use any more."""
        try:
            write_frame(self._stdin, asdict(job))
            ready = select.poll()
            ready.register(self._stdout, select.POLLIN)
            num_runs = 4 if job.cases is None else len(job.cases)
            if not ready.poll((num_runs * (job.timeout_s + _RUN_MARGIN_S) + _MARGIN_S) * 1000):
                raise _WorkerLostError("the supervisor does not answer")
            answer = read_frame(self._stdout)
        except OSError as error:
            raise _WorkerLostError(str(error)) from error
        if answer is None:
            raise _WorkerLostError(f"the supervisor ended with status {self._process.wait()}")
        return answer

    def close(self) -> None:
        """End the supervisor and all below it."""
        with contextlib.suppress(OSError):
            # Not only the end of the stream: that is not seen while a forked child still has a copy.
            write_frame(self._stdin, None)
            self._stdin.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()


class _Pool:
    """Idle workers, kept warm; as many may be busy as there are threads that ask."""

    def __init__(self, isolation: Isolation, *, user: User, has_filter: bool) -> None:
        self._start_worker = functools.partial(_Worker, isolation, user=user, has_filter=has_filter)
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def run(self, job: ProgramJob, *, is_retry: bool = False) -> ProgramResult:
        """Run one job on an idle worker, or on a new one; a retry does not rely on old ones."""
        with self._lock:
            worker = self._idle.pop() if self._idle and not is_retry else None
        if worker is None:
            worker = self._start_worker()
        try:
            answer = worker.run(job)
        except BaseException:
            worker.close()
            raise
        with self._lock:
            is_kept = len(self._idle) < _MAX_IDLE
            if is_kept:
                self._idle.append(worker)
        if not is_kept:
            worker.close()
        if "infrastructure" in answer:
            raise SandboxUnavailableError(answer["infrastructure"], remedy=_remedy(answer["infrastructure"]))
        return ProgramResult(passed=answer["status"] == "passed", **answer)

    def close(self) -> None:
        """End all idle workers. A forked child leaves its parent's workers alone."""
        with self._lock:
            workers, self._idle = self._idle, []
        if self._owner == os.getpid():
            for worker in workers:
                worker.close()

    def forget(self) -> None:
        """Drop the workers of the parent process after a fork."""
        self._idle = []
        self._lock = threading.Lock()
        self._owner = os.getpid()


_lock = threading.RLock()
_pools: dict[Isolation, _Pool] = {}
_status: SandboxStatus | None = None


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    for pool in _pools.values():
        pool.forget()


def _close_pools() -> None:
    for pool in _pools.values():
        pool.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_pools)


def check_sandbox() -> SandboxStatus:
    """Start the sandbox once and say whether it works; the answer is kept for the life of the process."""
    global _status
    with _lock:
        if _status is None:
            _status = _probe()
        return _status


def _probe() -> SandboxStatus:
    problems: list[str] = []
    remedy = ""
    # Preferred first. Root inside a container often may not mount, but may make user namespaces like anybody;
    # a kernel without seccomp still has the namespaces.
    users: list[User] = ["own", "mapped"] if os.geteuid() == 0 else ["mapped"]
    for has_filter, user in itertools.product((True, False), users):
        pool = _Pool("bubblewrap", user=user, has_filter=has_filter)
        try:
            result = pool.run(ProgramJob(source=_LOOK_AROUND, tests=_SEEN_NOTHING, timeout_s=30.0))
        except (SandboxUnavailableError, _WorkerLostError, OSError, subprocess.SubprocessError) as error:
            pool.close()
            reason = error.message if isinstance(error, SandboxUnavailableError) else str(error)
            known = error.remedy if isinstance(error, SandboxUnavailableError) else None
            remedy = remedy or known or _remedy(reason)
            problems += [reason] if reason not in problems else []
            continue
        if not result.passed:
            pool.close()
            problems.append(f"bubblewrap runs programs and does not isolate them: {result.message}")
            continue
        _pools["bubblewrap"] = pool
        is_filtered = has_filter and build_filter(allow_processes=False) is not None
        kind: SandboxKind = "bubblewrap+seccomp" if is_filtered else "bubblewrap"
        return SandboxStatus(available=True, kind=kind, user=user)
    reason = "; ".join(problems)
    return SandboxStatus(available=False, kind="none", reason=reason, remedy=remedy or _remedy(reason))


def _remedy(reason: str) -> str:
    if any(word in reason for word in ("not permitted", "denied", "namespace")):
        return (
            "allow unprivileged user namespaces (in a container: by its seccomp and AppArmor profiles; "
            "on Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0), or accept the risk with "
            "--unsafe-execution"
        )
    return "see the reason; or accept the risk with --unsafe-execution"


def _pool_for(*, unsafe: bool) -> _Pool:
    status = check_sandbox()
    if status.available:
        return _pools["bubblewrap"]
    if not unsafe:
        raise SandboxUnavailableError(f"no sandbox works here: {status.reason}", remedy=status.remedy)
    with _lock:
        return _pools.setdefault("process-limits", _Pool("process-limits", user="mapped", has_filter=False))


def run_program(
    source: str,
    *,
    tests: str | None = None,
    setup: str = "",
    stdin: str = "",
    timeout_s: float = 10.0,
    memory_mib: int = 512,
    stop_at_failure: bool = True,
    cases: Sequence[tuple[str, str]] | None = None,
    language: str = "python3",
    unsafe: bool = False,
) -> ProgramResult:
    """Run one untrusted program in a sandbox and judge it. May be called from several threads.

    Args:
        source: the program.
        tests: source of asserts, run on the trusted side; names it does not define itself are the program's.
            Without tests the program runs as a script and passed means only that it ended with exit status 0.
        setup: helpers for the tests, run before them on the trusted side.
        stdin: what the program can read.
        timeout_s: wall-clock limit of the whole run, seconds; with cases, of the run of each.
        memory_mib: limit of the program's address space, MiB.
        stop_at_failure: end at the first failing assert; otherwise all are tried, which `asserts_passed` then
            counts.
        cases: instead of tests, pairs of stdin and expected stdout (`outputs_match`); the program runs as a
            script in a new sandbox for each, in order, and must also end with exit status 0.
        language: of the program; only `python3` can be run.
        unsafe: where no sandbox works, go on with process limits alone instead of raising.

    Raises:
        SandboxUnavailableError: no sandbox works and `unsafe` is False.
        UserInputError: a limit that makes no sense, no cases, cases together with tests, setup or stdin, or
            another language.
    """
    job = ProgramJob(
        source=source,
        tests=tests,
        setup=setup,
        stdin=stdin,
        timeout_s=timeout_s,
        memory_mib=memory_mib,
        stop_at_failure=stop_at_failure,
        cases=cases,
        language=language,
    )
    return _run(job, unsafe=unsafe)


def _check(job: ProgramJob) -> None:
    if not (math.isfinite(job.timeout_s) and job.timeout_s > 0):
        raise UserInputError(f"timeout_s is {job.timeout_s}", remedy="give a positive number of seconds")
    if job.memory_mib < MIN_MEMORY_MIB:
        raise UserInputError(
            f"memory_mib is {job.memory_mib}", remedy=f"the interpreter alone needs {MIN_MEMORY_MIB} MiB"
        )
    if job.language != LANGUAGE:
        raise UserInputError(
            f"a program in the language {job.language!r} cannot be run",
            remedy=f"only {LANGUAGE} programs can; leave the others out",
        )
    if job.cases is not None and not job.cases:
        raise UserInputError("cases is empty", remedy="give at least one pair of input and expected output")
    if job.cases is not None and (job.tests is not None or job.setup or job.stdin):
        raise UserInputError("cases and tests, setup or stdin", remedy="give either cases or the others")


def _run(job: ProgramJob, *, unsafe: bool) -> ProgramResult:
    _check(job)
    pool = _pool_for(unsafe=unsafe)
    try:
        return pool.run(job)
    except (_WorkerLostError, SandboxUnavailableError):
        # A supervisor killed from outside, or a machine short of processes for a moment. Twice is an error.
        return pool.run(job, is_retry=True)


def run_programs(
    jobs: Sequence[ProgramJob],
    *,
    num_workers: int | None = None,
    on_done: Callable[[int, ProgramResult], None] | None = None,
    unsafe: bool = False,
    progress: str | None = None,
) -> list[ProgramResult]:
    """Run many programs in parallel.

    Args:
        jobs: the programs.
        num_workers: how many run at a time; by default the processors this process may use.
        on_done: called with a job's position and result as each ends, by one thread at a time.
        unsafe: as for `run_program`.
        progress: title of a progress bar on standard error, which is drawn in a terminal only; None for none.

    Returns:
        One result a job, in the order of the jobs.
    """
    if num_workers is not None and num_workers < 1:
        raise UserInputError(f"num_workers is {num_workers}", remedy="give at least 1, or None")
    lock = threading.Lock()
    with contextlib.ExitStack() as stack:
        count = None if progress is None else _show_progress(stack, progress, len(jobs))

        def run_one(position: int) -> ProgramResult:
            result = _run(jobs[position], unsafe=unsafe)
            with lock:
                if count is not None:
                    count(result)
                if on_done is not None:
                    on_done(position, result)
            return result

        with ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0)), "wmtp-execution") as threads:
            futures = [threads.submit(run_one, position) for position in range(len(jobs))]
            try:
                return [future.result() for future in futures]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise


def _show_progress(stack: contextlib.ExitStack, title: str, total: int) -> Callable[[ProgramResult], None]:
    from wmtp.execution.progress import show_progress  # rich: supervisors load this module without packages

    return stack.enter_context(show_progress(title, total))
