"""No program gets a verdict that it does not deserve."""

from __future__ import annotations

import pytest

from wmtp.execution import ProgramJob, run_program
from wmtp.execution.pool import _Pool

TESTS = "assert solve(3) == 4\nassert solve([1, 2]) == [2, 3]\nassert not solve(None)"
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


def test_a_program_cannot_poison_the_next() -> None:
    pool = _Pool("bubblewrap", user="mapped", has_filter=True)  # one worker for all
    for name in ("patches builtins", "patches the encoder", "closes every descriptor", "crashes"):
        assert not pool.run(ProgramJob(source=FORGERIES[name], tests=TESTS)).passed
        assert pool.run(ProgramJob(source="def f(): return [1]", tests="assert f() == [1]")).passed
        assert not pool.run(ProgramJob(source="def f(): return [2]", tests="assert f() == [1]")).passed
    pool.close()
