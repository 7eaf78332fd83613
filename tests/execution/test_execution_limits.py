"""Programs end when they should, use no more than they may, and leave nothing behind.

Safe where the sandbox fails: what exhausts stops by itself at a bound of 2 GiB, a hundred processes or 20
seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hostile_suite import num_named
from sandbox_users import needs_kind

from wmtp.execution import ProgramJob, run_program
from wmtp.execution.pool import User, _Pool


def test_a_loop_ends_at_the_time_limit() -> None:
    start = time.monotonic()
    result = run_program("def f():\n    while True: pass", tests="assert f() == 1", timeout_s=0.5)
    assert (result.passed, result.status) == (False, "timeout")
    assert run_program("while True: pass", timeout_s=0.5).status == "timeout"
    assert run_program("def f(): return 1", tests="while f(): pass", timeout_s=0.5).status == "timeout"
    assert time.monotonic() - start < 30


def test_signals_do_not_keep_a_program_alive() -> None:
    source = """
import signal, time
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
time.sleep(30)
"""
    start = time.monotonic()
    assert run_program(source, timeout_s=0.5).status == "timeout"
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    "source",
    [
        "def f(): return len(bytearray(2 << 30))",
        "def f(): return len([bytearray(32 << 20) for i in range(64)])",
        "blocks = [bytearray(32 << 20) for i in range(64)]\ndef f(): return 1",
    ],
)
def test_memory_is_bounded(source: str) -> None:
    assert run_program(source, tests="assert f() == 1", memory_mib=256).status == "memory"
    assert run_program(source + "\nf()", memory_mib=256).status == "memory"


def test_the_memory_limit_is_the_callers() -> None:
    source = "def f(): return len(bytearray(300 << 20))"
    assert run_program(source, tests="assert f() > 0", memory_mib=1024).passed


def test_output_is_bounded() -> None:
    result = run_program("for i in range(64): print('x' * (1 << 20))")
    assert (result.passed, result.status) == (False, "killed")
    assert "output" in result.message
    assert len(result.stdout) <= 16 << 20


def test_disk_is_bounded(pool: _Pool) -> None:
    source = """
num_mib = 0
try:
    for i in range(16):
        with open(f'/tmp/{i}', 'wb') as file:
            for j in range(64):
                file.write(bytes(1 << 20)); file.flush(); num_mib += 1
except OSError: pass
try:
    for i in range(16):
        with open(f'/tmp/more{i}', 'wb') as file:
            for j in range(8):
                file.write(bytes(1 << 20)); file.flush(); num_mib += 1
except OSError: pass
print(num_mib)
"""
    assert int(pool.run(ProgramJob(source=source)).stdout) <= 32


@pytest.mark.parametrize("make", ["os.mkdir(name)", "os.symlink('x', name)", "open(name, 'w').close()"])
def test_files_are_counted_though_they_are_empty(make: str, pool: _Pool) -> None:
    """Their kernel memory is bounded by no size of a file system."""
    source = f"""
import os
for number in range(300_000):
    name = f'/tmp/{{number}}'
    {make}
"""
    result = pool.run(ProgramJob(source=source, timeout_s=30.0))
    assert (result.passed, result.status) == (False, "killed")
    assert "files" in result.message
    assert pool.run(ProgramJob(source=source.replace("300_000", "5_000"), timeout_s=30.0)).passed


def test_open_files_and_threads_are_bounded() -> None:
    files = """
files = []
try:
    for i in range(300): files.append(open('/dev/null'))
except OSError: print(len(files))
"""
    assert 10 < int(run_program(files).stdout) <= 64
    threads = """
import threading, time
try:
    for i in range(300): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
except RuntimeError: print(threading.active_count())
"""
    assert 10 < int(run_program(threads).stdout) <= 64


FORKS = """
import os, time
children = 0
for i in range(100):
    try: pid = os.fork()
    except OSError: break
    if pid == 0:
        os.setsid()
        time.sleep(20)
        os._exit(0)
    children += 1
print(children, flush=True)
time.sleep(20)
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        time.sleep(20)
    os._exit(0)
print('started')
"""


def descendants(root: int) -> set[int]:
    """All processes below one, by the kernel's table."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended meanwhile
    found: set[int] = set()
    fresh = {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh}
        found |= fresh
    return found


@pytest.mark.parametrize("source", [FORKS, DAEMON], ids=["forks", "daemon"])
def test_the_filter_refuses_new_processes(source: str) -> None:
    result = run_program(source, timeout_s=1.0)
    assert result.stdout in ("", "0\n")


@pytest.mark.parametrize("source", [FORKS, DAEMON], ids=["forks", "daemon"])
@pytest.mark.parametrize("user", ["own", "mapped"])
def test_without_the_filter_processes_are_bounded_and_die_with_the_tree(source: str, user: User) -> None:
    needs_kind(user)
    pool = _Pool("bubblewrap", user=user, has_filter=False)
    name = f"wmtp-{os.getpid()}"  # children have it from their parent, and nobody else has it
    naming = f"import ctypes\nctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)\n"
    most = 0

    def count() -> None:
        nonlocal most
        while not done.wait(0.05):
            most = max(most, num_named(name))

    done = threading.Event()
    counter = threading.Thread(target=count)
    counter.start()
    result = pool.run(ProgramJob(source=naming + source, timeout_s=1.0))
    deadline = time.monotonic() + 5.0
    while num_named(name) and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    counter.join()
    pool.close()
    assert num_named(name) == 0
    if source == FORKS:
        assert most > 5, "the control must see them while they live"
    if source == FORKS and user == "own":
        assert int(result.stdout) <= 64


def test_without_a_sandbox_what_a_program_leaves_behind_is_ended() -> None:
    pool = _Pool("process-limits", user="mapped", has_filter=False)
    pool.run(ProgramJob(source="", tests=""))
    before = descendants(os.getpid())
    result = pool.run(ProgramJob(source=DAEMON))
    assert (result.stdout, result.isolation) == ("started\n", "process-limits")
    assert descendants(os.getpid()) == before
    pool.close()


def test_nothing_survives_when_the_library_is_killed() -> None:
    script = (
        "from wmtp.execution import run_program; run_program('import time; time.sleep(60)', timeout_s=60.0)"
    )
    library = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60.0
    while len(below := descendants(library.pid)) < 7 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(below) >= 7, (
        "supervisor, and bubblewrap, its first process and an interpreter for tester and program"
    )
    library.send_signal(signal.SIGKILL)
    library.wait()
    deadline = time.monotonic() + 10.0
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
