"""Programs see no secret, reach nobody and change nothing.

Safe where the sandbox fails: nothing is aimed at any address but loopback, and signals go only to a process
planted here. A program that only reads, connects or signals is also run unsandboxed, where it must succeed:
otherwise its failure in the sandbox would prove nothing.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from wmtp.execution import ProgramJob, run_program
from wmtp.execution.pool import _Pool

SECRET = "planted-secret-5b1f"
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
