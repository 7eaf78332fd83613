"""Hostile programs get no verdict they do not deserve, see no secret, reach nobody and leave nothing behind.

Safe where the sandbox fails: what exhausts stops by itself at a bound, nothing is aimed at any address but
loopback, signals go only to a process planted here. A program that only reads, connects or signals is also
run unsandboxed, where it must succeed: otherwise its failure in the sandbox would prove nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wmtp.execution import ProgramJob, run_program
from wmtp.execution.pool import _Pool

TESTS = "assert solve(3) == 4\nassert solve([1, 2]) == [2, 3]\nassert not solve(None)"
SECRET = "planted-secret-5b1f"

FORGERIES = {
    "exits at once": "import sys; sys.exit(0)",
    "exits hard": "import os; os._exit(0)",
    "exits when called": "import sys\ndef solve(x): sys.exit(0)",
    "exits hard when called": "import os\ndef solve(x): os._exit(0)",
    "raises SystemExit": "def solve(x): raise SystemExit(0)",
    "kills itself": "import os, signal\ndef solve(x): os.kill(os.getpid(), signal.SIGTERM)",
    "prints markers": """
print('passed', 'OK', '{"status": "passed"}')
def solve(x): print('PASSED')
""",
    "equals everything": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
def solve(x): return Any()
""",
    "number that equals everything": """
class Int(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def solve(x): return Int(0)
""",
    "list that equals everything": """
class List(list):
    def __eq__(self, other): return True
def solve(x): return List()
""",
    "text that equals everything": """
class Text(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def solve(x): return Text('4')
""",
    "list of objects that equal everything": """
class Any:
    def __eq__(self, other): return True
def solve(x): return [Any(), Any()] if x == [1, 2] else 4 if x == 3 else 0
""",
    "function that equals everything": """
class Call:
    def __eq__(self, other): return True
    def __call__(self): return 1
def solve(x): return Call()
""",
    "metaclass": """
class Meta(type):
    def __eq__(cls, other): return True
    __hash__ = type.__hash__
class Thing(metaclass=Meta): pass
def solve(x): return Thing
""",
    "class with a name of a builtin": """
class int(int):
    def __eq__(self, other): return True
def solve(x): return int(1)
""",
    "patches builtins": """
import builtins
builtins.AssertionError = builtins.Exception = type('E', (BaseException,), {})
builtins.all = builtins.any = builtins.isinstance = builtins.bool = lambda *a: True
builtins.type = lambda *a: int
def solve(x): return True
""",
    "shadows what the tests use": "def abs(x): return 0\ndef len(x): return 2\ndef solve(x): return 1",
    "patches the encoder": """
import sys
wire = sys.modules['wmtp.execution.wire']
wire._Writer.value = lambda self, value, out: out.append(b'T')
def solve(x): return 1
""",
    "writes on every descriptor": """
import os
def solve(x):
    for fd in range(3, 64):
        for text in (b'passed', b'{"status": "passed", "message": "", "asserts_passed": 3}'):
            try: os.write(fd, text)
            except OSError: pass
    return None
""",
    "answers before it is asked": """
import os
def frame(data): return (len(data)).to_bytes(4, 'big') + data
for fd in range(3, 64):
    try: os.write(fd, frame(b'R0:N0:') * 20)
    except OSError: pass
def solve(x): return None
""",
    "says quit": """
import os
def solve(x):
    for fd in range(3, 64):
        try: os.write(fd, bytes([0, 0, 0, 1]) + b'Q')
        except OSError: pass
""",
    "closes every descriptor": "import os\ndef solve(x): os.closerange(3, 64)",
    "claims a huge frame": """
import os
def solve(x):
    for fd in range(3, 64):
        try: os.write(fd, b'\\xff\\xff\\xff\\xff' + b'x' * 1000)
        except OSError: pass
""",
    "reads the requests itself": """
import os, threading
def steal():
    for fd in range(3, 64):
        try: os.read(fd, 1 << 16)
        except OSError: pass
threading.Thread(target=steal, daemon=True).start()
def solve(x): return None
""",
    "walks the frames": """
import sys
def solve(x):
    frame, found = sys._getframe(), []
    while frame:
        found += [v for v in frame.f_locals.values() if isinstance(v, int)]
        frame = frame.f_back
    return found[-1] if found else None
""",
    "walks the heap for expected values": """
import gc
def solve(x):
    lists = [o for o in gc.get_objects() if type(o) is list and o == [2, 3]]
    return lists[0] if lists else None
""",
    "calls the tester": """
import sys
def solve(x):
    frame = sys._getframe()
    while 'self' not in frame.f_locals: frame = frame.f_back
    peer = frame.f_locals['self']
    return [peer.call(handle, (), {}) for handle in range(5)]
""",
    "raises what asserts raise": "def solve(x): raise AssertionError('passed')",
    "registers for the end": "import atexit, os\natexit.register(os._exit, 0)\ndef solve(x): return None",
    "replaces itself": """
import os, sys
def solve(x): os.execv(sys.executable or '/python/bin/python3', ['python', '-c', 'print(1)'])
""",
    "crashes": "import ctypes\ndef solve(x): ctypes.string_at(0)",
    "nothing": "",
}


@pytest.fixture(params=["own", "mapped"])
def pool(request: pytest.FixtureRequest) -> Iterator[_Pool]:
    """A pool of either kind of unprivileged user: a real one, taken by root, and a mapped one."""
    if request.param == "own" and os.geteuid() != 0:
        pytest.skip("only root can take another user's id")
    pool = _Pool("bubblewrap", user=request.param, has_filter=True)
    yield pool
    pool.close()


@pytest.mark.parametrize("name", FORGERIES)
def test_no_verdict_is_forged(name: str) -> None:
    result = run_program(FORGERIES[name], tests=TESTS, timeout_s=2.0)
    assert not result.passed
    assert result.status in ("failed", "error", "killed", "unverified", "timeout")


def test_the_forgeries_would_pass_if_they_returned_right_values() -> None:
    honest = "def solve(x): return x + 1 if x == 3 else [i + 1 for i in x] if x else None"
    assert run_program(honest, tests=TESTS).passed


def test_the_tests_mean_the_real_builtins_and_modules() -> None:
    source = """
def abs(x): return 0
def len(x): return 2
class math: isclose = lambda *a: True
def solve(x): return 1
"""
    assert run_program(source, tests="assert abs(solve(3) - 4) < 1e-6").status == "failed"
    assert run_program(source, tests="assert len([solve(3)]) == 2").status == "failed"
    assert run_program(source, tests="import math\nassert math.isclose(solve(3), 4)").status == "failed"


READERS = {
    "environment": "import os\nprint(os.environ)",
    "file": "print(open({folder!r} + '/secret.txt').read())",
    "every file of the folder": """
import glob
for path in glob.glob({folder!r} + '/*.txt'): print(open(path).read())
""",
    "home": "import os\nprint(open(os.path.expanduser('~') + '/secret.txt').read())",
    "environment of all": """
import glob
for path in glob.glob('/proc/[0-9]*/environ'):
    try: print(open(path).read())
    except OSError: pass
""",
    "command lines": """
import glob
for path in glob.glob('/proc/[0-9]*/cmdline'):
    try: print(open(path).read())
    except OSError: pass
""",
    "loopback": "import socket\nprint(socket.create_connection(('127.0.0.1', {port}), 2).recv(99))",
    "named socket": """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect({path!r})
print(s.recv(99))
""",
    "abstract socket": """
import socket
s = socket.socket(socket.AF_UNIX)
s.connect({abstract!r})
print(s.recv(99))
""",
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A secret in a file, in the environment, on a command line, and behind listeners on loopback."""
    (tmp_path / "secret.txt").write_text(SECRET)
    monkeypatch.setenv("WMTP_PLANTED", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path))
    path, abstract = str(tmp_path / "socket"), f"\0wmtp-{tmp_path}"
    listeners = [socket.create_server(("127.0.0.1", 0))]
    for address in (path, abstract):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        listeners.append(listener)

    def serve(listener: socket.socket) -> None:
        try:
            while True:
                connection, _ = listener.accept()
                connection.sendall(SECRET.encode())
                connection.close()
        except OSError:
            return  # closed at the end of the test

    for listener in listeners:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
    sleeper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)", SECRET])
    values = {
        "folder": str(tmp_path),
        "port": listeners[0].getsockname()[1],
        "path": path,
        "abstract": abstract,
    }
    yield values | {"pid": sleeper.pid}
    sleeper.kill()
    sleeper.wait()
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def run_unsandboxed(source: str) -> str:
    return subprocess.run(
        [sys.executable, "-S", "-c", source], capture_output=True, text=True, timeout=60
    ).stdout


@pytest.mark.parametrize("name", READERS)
def test_no_secret_is_read_and_nobody_is_reached(name: str, planted: dict[str, object], pool: _Pool) -> None:
    source = READERS[name].format(**planted)
    assert SECRET in run_unsandboxed(source), "the control must find it"
    result = pool.run(ProgramJob(source=source))
    assert SECRET not in result.stdout + result.stderr + result.message


def test_the_namespaces_alone_hide_loopback_and_processes(planted: dict[str, object]) -> None:
    pool = _Pool("bubblewrap", user="mapped", has_filter=False)
    for name in ("loopback", "named socket", "abstract socket", "environment of all"):
        result = pool.run(ProgramJob(source=READERS[name].format(**planted)))
        assert SECRET not in result.stdout + result.stderr
    pool.close()


def test_no_process_outside_is_signalled(planted: dict[str, object], pool: _Pool) -> None:
    kill = "import os, signal\nos.kill({pid}, signal.{name})\nprint('sent')"
    pid = planted["pid"]
    assert isinstance(pid, int)
    assert "sent" in run_unsandboxed(kill.format(pid=pid, name="SIGCONT")), "the control must reach it"
    assert "sent" not in pool.run(ProgramJob(source=kill.format(pid=pid, name="SIGKILL"))).stdout
    assert "sent" not in pool.run(ProgramJob(source=kill.format(pid=os.getpid(), name="SIGCONT"))).stdout
    os.kill(pid, 0)
    assert Path(f"/proc/{pid}/stat").read_text().split()[2] == "S"


def test_nothing_can_be_written_but_a_small_private_folder(tmp_path: Path, pool: _Pool) -> None:
    source = f"""
import os
for path in ('/x', '/python/x', '/python/lib/x', '/usr/lib/x', '/dev/x', '/tmp/x', {str(tmp_path / "x")!r}):
    try:
        open(path, 'w').write('x'); print(path)
    except OSError: pass
"""
    assert pool.run(ProgramJob(source=source)).stdout == "/tmp/x\n"
    assert pool.run(ProgramJob(source="import os\nprint(os.listdir('/tmp'))")).stdout == "[]\n"
    assert not (tmp_path / "x").exists()


def test_the_program_is_nobody_without_privileges(pool: _Pool) -> None:
    source = """
import os
def who(): return os.getuid(), os.geteuid(), os.getgid(), os.getgroups()
def become_root():
    try: os.setuid(0)
    except OSError: return False
    return True
"""
    tests = "uid, effective, gid, groups = who()\nassert uid == effective >= 1000\nassert gid >= 1000\n"
    tests += "assert all(g >= 1000 for g in groups)\nassert not become_root()"
    result = pool.run(ProgramJob(source=source, tests=tests))
    assert result.passed, result.message


def test_refused_system_calls_fail_like_any_other() -> None:
    source = """
import ctypes, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    result = getattr(libc, name)(*args)
    return ctypes.get_errno() if result == -1 else 0
def open_socket(family, kind):
    try: socket.socket(family, kind).close()
    except OSError as error: return error.errno
    return 0
"""
    tests = """
assert call("unshare", 0x10000000) == 1
assert call("ptrace", 0, 0, 0, 0) == 1
assert call("memfd_create", b"x", 0) == 1
assert call("shmget", 0, 4096, 0o1600) == 1
assert call("mount", b"none", b"/tmp", b"tmpfs", 0, 0) == 1
assert open_socket(2, 1) == 1
assert open_socket(40, 1) == 1
assert open_socket(16, 3) == 1
assert open_socket(1, 1) == 0
"""
    result = run_program(source, tests=tests)
    assert result.passed, result.message


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


def num_sleeping() -> int:
    """Processes of any user that sleep in the programs of this file."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                count += b"marshal.loads" in (entry / "cmdline").read_bytes()
            except OSError:
                continue
    return count


@pytest.mark.parametrize("source", [FORKS, DAEMON], ids=["forks", "daemon"])
def test_the_filter_refuses_new_processes(source: str) -> None:
    result = run_program(source, timeout_s=1.0)
    assert result.stdout in ("", "0\n")


@pytest.mark.parametrize("source", [FORKS, DAEMON], ids=["forks", "daemon"])
@pytest.mark.parametrize("user", ["own", "mapped"])
def test_without_the_filter_processes_are_bounded_and_die_with_the_tree(source: str, user: str) -> None:
    if user == "own" and os.geteuid() != 0:
        pytest.skip("only root can take another user's id")
    pool = _Pool("bubblewrap", user=user, has_filter=False)  # type: ignore[arg-type]
    pool.run(ProgramJob(source="", tests=""))
    before = descendants(os.getpid()), num_sleeping()
    result = pool.run(ProgramJob(source=source, timeout_s=1.0))
    deadline = time.monotonic() + 5.0
    while (after := (descendants(os.getpid()), num_sleeping())) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    pool.close()
    assert after == before
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


def test_a_program_cannot_poison_the_next() -> None:
    pool = _Pool("bubblewrap", user="mapped", has_filter=True)  # one worker for all
    for name in ("patches builtins", "patches the encoder", "closes every descriptor", "crashes"):
        assert not pool.run(ProgramJob(source=FORGERIES[name], tests=TESTS)).passed
        assert pool.run(ProgramJob(source="def f(): return [1]", tests="assert f() == [1]")).passed
        assert not pool.run(ProgramJob(source="def f(): return [2]", tests="assert f() == [1]")).passed
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
