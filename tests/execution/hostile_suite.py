"""Runs all hostile programs against one kind of sandbox and lists what went wrong.

    python hostile_suite.py       # as this user; prints the findings as JSON

Needs the standard library and `wmtp.execution` alone, so that it can be run as another user.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hostile_actions import EXHAUSTERS, LINGERERS, POISONERS, REACHERS, READERS, SECRET
from hostile_forgeries import CASES, ENDINGS, FORGERIES, HONEST, OUTPUT_FORGERIES, SWALLOWING, TESTS

from wmtp.execution import ProgramJob, ProgramResult
from wmtp.execution.pool import User, _Pool
from wmtp.execution.sandbox import _FIRST_USER

NUM_THREADS = 6
LIMIT_S = 1.0
SLACK_S = 10.0  # a busy machine may take this much longer to end a program
_TGKILL = {"x86_64": (234,), "aarch64": (131,)}
NUM_PROGRAMS = sum(
    map(len, (FORGERIES, OUTPUT_FORGERIES, READERS, REACHERS, EXHAUSTERS, LINGERERS, POISONERS))
)


def brief(result: ProgramResult) -> str:
    """A result without its output."""
    return f"{result.status} after {result.wall_s:.1f} s: {result.message[-200:]}"


def run_all(pool: _Pool, jobs: Sequence[ProgramJob]) -> list[ProgramResult]:
    """Run jobs a few at a time."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(pool.run, jobs))


def check_forgeries(pool: _Pool) -> list[str]:
    """Programs that passed, of those that must not."""
    named = [
        (name, ProgramJob(source=source, tests=TESTS, timeout_s=LIMIT_S))
        for name, source in FORGERIES.items()
    ]
    named += [
        (f"{name}, caught", ProgramJob(source=source, tests=SWALLOWING, timeout_s=LIMIT_S))
        for name, source in ENDINGS.items()
    ]
    named += [
        (name, ProgramJob(source=source, cases=CASES, timeout_s=LIMIT_S))
        for name, source in OUTPUT_FORGERIES.items()
    ]
    results = run_all(pool, [job for _, job in named])
    return [
        f"{name}: {brief(result)}"
        for (name, _), result in zip(named, results, strict=True)
        if result.passed or result.status == "passed" or result.wall_s > len(CASES) * LIMIT_S + SLACK_S
    ]


@contextmanager
def planted() -> Iterator[dict[str, Any]]:
    """A secret in files, memory, a descriptor, the environment, a command line, and behind listeners."""
    with tempfile.TemporaryDirectory() as folder:
        home, environment = os.environ.get("HOME"), dict(os.environ)
        os.environ |= {"WMTP_PLANTED": SECRET, "HOME": folder}
        secret = Path(folder, "secret.txt")
        secret.write_text(SECRET)
        Path(folder, "planted_module.py").write_text(f"print({SECRET!r})")
        shared = Path(f"/dev/shm/wmtp-{os.getpid()}")
        shared.write_text(SECRET)
        descriptor = os.open(secret, os.O_RDONLY)
        os.set_inheritable(descriptor, True)
        path, abstract = f"{folder}/socket", f"\0wmtp-{folder}"
        listeners = [socket.create_server(("127.0.0.1", 0)), *map(_named_listener, (path, abstract))]
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("127.0.0.1", 0))
        for listener in listeners:
            threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        threading.Thread(target=_echo, args=(datagrams,), daemon=True).start()
        sleeper = subprocess.Popen(
            [sys.executable, "-S", "-c", "import time; time.sleep(100)", SECRET],
            cwd=folder,
            start_new_session=True,
        )
        try:
            yield {
                "folder": folder,
                "shared": str(shared),
                "descriptor": descriptor,
                "port": listeners[0].getsockname()[1],
                "datagram_port": datagrams.getsockname()[1],
                "path": path,
                "abstract": abstract,
                "pid": sleeper.pid,
                "tgkill": _TGKILL[platform.machine()],
            }
        finally:
            sleeper.kill()
            sleeper.wait()
            for listener in listeners:
                listener.shutdown(socket.SHUT_RDWR)
                listener.close()
            datagrams.close()
            os.close(descriptor)
            shared.unlink()
            os.environ.clear()
            os.environ |= environment
            assert os.environ.get("HOME") == home


def _named_listener(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    return listener


def _serve(listener: socket.socket) -> None:
    try:
        while True:
            connection, _ = listener.accept()
            connection.sendall(SECRET.encode() + b"\n")
            connection.close()
    except OSError:
        return  # closed at the end


def _echo(datagrams: socket.socket) -> None:
    try:
        while True:
            datagrams.sendto(SECRET.encode(), datagrams.recvfrom(99)[1])
    except OSError:
        return


def run_outside(source: str, descriptor: int) -> str:
    """Run a program that does no harm without any protection."""
    command = [sys.executable, "-S", "-c", source]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, pass_fds=[descriptor])
    return outcome.stdout


def check_readers(pool: _Pool) -> list[str]:
    """Secrets that leaked, and controls that did not find them."""
    with planted() as places:
        sources = {name: source.format(**places) for name, source in READERS.items()}
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            found = list(
                threads.map(lambda source: run_outside(source, places["descriptor"]), sources.values())
            )
        problems = [
            f"{name}: the control did not find the secret"
            for name, text in zip(sources, found, strict=True)
            if SECRET not in text
        ]
        results = run_all(pool, [ProgramJob(source=source, timeout_s=10.0) for source in sources.values()])
        tested = run_all(
            pool,
            [
                ProgramJob(source=s + "\ndef solve(x): return 0", tests=TESTS, timeout_s=10.0)
                for s in sources.values()
            ],
        )
    return problems + [
        f"{name}: {brief(result)}"
        for name, result in zip([*sources, *sources], results + tested, strict=True)
        if SECRET in f"{result.stdout}{result.stderr}{result.message}"
    ]


def check_reachers(pool: _Pool) -> list[str]:
    """Ways in which a process outside was reached, and controls that did not reach it."""
    problems = []
    with planted() as places:
        pid = places["pid"]
        for name, source in REACHERS.items():
            harmless = source.format(**places, signal=int(signal.SIGCONT))
            if "done" not in run_outside(harmless, places["descriptor"]):
                problems.append(f"{name}: the control did not reach the process")
        sources = [source.format(**places, signal=int(signal.SIGKILL)) for source in REACHERS.values()]
        results = run_all(pool, [ProgramJob(source=source) for source in sources])
        problems += [
            f"{name}: {brief(result)}"
            for name, result in zip(REACHERS, results, strict=True)
            if result.passed and "done" in result.stdout
        ]
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            problems.append("the planted process does not sleep any more")
    return problems


def check_exhausters(pool: _Pool) -> list[str]:
    """Programs that got more than they may, or took longer."""
    jobs = [
        ProgramJob(source=f"{source}\ndef solve(x): return 0", tests=TESTS, timeout_s=LIMIT_S, memory_mib=256)
        for _, source in EXHAUSTERS.values()
    ]
    problems = []
    for (name, (most, _)), result in zip(EXHAUSTERS.items(), run_all(pool, jobs), strict=True):
        numbers = [int(word) for word in result.stdout.split() if word.isdigit()]
        size = (len(result.stdout) + len(result.stderr)) >> 20
        if result.passed or max([size, *numbers]) > most or result.wall_s > LIMIT_S + SLACK_S:
            problems.append(
                f"{name}: {result.status} after {result.wall_s:.1f} s, {numbers[-3:]}, {size} MiB shown"
            )
    return problems


def num_named(name: str) -> int:
    """Number of processes of any user that carry the name."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                count += (entry / "comm").read_text().strip() == name
            except OSError:
                continue  # it has ended meanwhile
    return count


def check_lingerers(pool: _Pool) -> list[str]:
    """Programs that outlived their run."""
    name = f"wmtp-{os.getpid()}"  # children have it from their parent, and nobody else has it
    naming = f"import ctypes\nNAME = {name.encode()!r}\nctypes.CDLL(None).prctl(15, NAME, 0, 0, 0)\n"
    jobs = [ProgramJob(source=naming + source, timeout_s=1.0) for source in LINGERERS.values()]
    most = 0
    done = threading.Event()

    def count() -> None:
        nonlocal most
        while not done.wait(0.05):
            most = max(most, num_named(name))

    counter = threading.Thread(target=count)
    counter.start()
    results = run_all(pool, jobs)
    deadline = time.monotonic() + SLACK_S
    while (left := num_named(name)) and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    counter.join()
    problems = [f"{left} processes are left"] if left else []
    problems += [] if most else ["the control saw none while they ran"]
    return problems + [
        f"{kind}: {brief(result)}"
        for kind, result in zip(LINGERERS, results, strict=True)
        if result.wall_s > 1.0 + SLACK_S
    ]


def check_poisoners(pool: _Pool) -> list[str]:
    """Programs after which another got a verdict that it does not deserve; on one worker."""
    problems = []
    devices = [os.stat(f"/dev/{name}").st_mode for name in ("null", "zero", "random", "urandom")]
    for name, source in POISONERS.items():
        poisoned = pool.run(ProgramJob(source=source, tests=TESTS, timeout_s=LIMIT_S))
        right = pool.run(ProgramJob(source="def f(): return [1]", tests="assert f() == [1]"))
        wrong = pool.run(ProgramJob(source="def f(): return [2]", tests="assert f() == [1]"))
        script = pool.run(ProgramJob(source="import os\nprint(os.listdir('/tmp'), os.nice(0))"))
        is_clean = script.stdout == f"[] {os.nice(0)}\n"
        if poisoned.passed or not right.passed or wrong.status != "failed" or not is_clean:
            problems.append(f"{name}: {poisoned.status}, {right.status}, {wrong.status}, {script.stdout}")
    if [os.stat(f"/dev/{name}").st_mode for name in ("null", "zero", "random", "urandom")] != devices:
        problems.append("devices of this machine were changed")
    return problems


GROUPS: dict[str, Callable[[_Pool], list[str]]] = {
    "forgeries": check_forgeries,
    "readers": check_readers,
    "reachers": check_reachers,
    "exhausters": check_exhausters,
    "lingerers": check_lingerers,
    "poisoners": check_poisoners,
}


def descendants() -> set[int]:
    """All processes below this one, by the kernel's table."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended meanwhile
    found: set[int] = set()
    fresh = {os.getpid()}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh}
        found |= fresh
    return found


def owners() -> dict[int, int]:
    """The user of each process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = entry.stat().st_uid
            except OSError:
                continue  # it has ended meanwhile
    return found


def run_group(group: str, user: User, *, has_filter: bool = True) -> list[str]:
    """What went wrong with a group of programs; also whether this machine still answers, and what is left."""
    before = descendants()
    pool = _Pool("bubblewrap", user=user, has_filter=has_filter)
    problems = GROUPS[group](pool)
    start = time.monotonic()
    if not pool.run(ProgramJob(source=HONEST, tests=TESTS)).passed or time.monotonic() - start > SLACK_S:
        problems.append("afterwards an honest program did not pass in time")
    # The users that root gave to the programs of this pool alone: those of its testers, which still run.
    fresh = descendants() - before
    users = {uid for pid, uid in owners().items() if pid in fresh and uid >= _FIRST_USER}
    if user == "own" and not users:
        problems.append("no user of its own was seen")
    pool.close()
    deadline = time.monotonic() + SLACK_S
    while time.monotonic() < deadline:
        left = (descendants() - before) | {pid for pid, uid in owners().items() if uid in users}
        if not left:
            return problems
        time.sleep(0.05)
    return [*problems, f"processes {left} are left"]


def main() -> None:
    """Run everything as this user."""
    findings = {group: run_group(group, "mapped") for group in GROUPS}
    print(json.dumps({"uid": os.getuid(), "num_programs": NUM_PROGRAMS, "findings": findings}))


if __name__ == "__main__":
    main()
