"""The sandbox shows programs nothing they could change, and gives them no rights.

What they may not read and whom they may not reach is in `test_execution_hostile`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wmtp.execution import ProgramJob, run_program
from wmtp.execution.pool import _Pool


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


@pytest.mark.skipif(os.geteuid() != 0, reason="the devices belong to root")
def test_root_mapped_to_nobody_cannot_change_its_devices() -> None:
    """Devices cannot be mounted read-only, and their owner could take them away from everybody."""
    source = """
import os
for path in ('/dev/null', '/dev/zero', '/dev/random', '/dev/urandom'):
    try: os.chmod(path, os.stat(path).st_mode & 0o777)
    except OSError: continue
    print(path)
"""
    pool = _Pool("bubblewrap", user="mapped", has_filter=False)
    assert pool.run(ProgramJob(source=source)).stdout == ""
    pool.close()


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
assert call("setsockopt", 1, 1, 7, 0, 0) == 1
"""
    result = run_program(source, tests=tests)
    assert result.passed, result.message
