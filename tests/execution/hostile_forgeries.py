"""Programs that try to get a verdict they do not deserve. Data only: `hostile_suite` runs them.

None may pass `TESTS`, and those of `ENDINGS` not even `SWALLOWING`, tests that catch everything; none of
`OUTPUT_FORGERIES` may pass `CASES`. Each knows how the judge works.
"""

from __future__ import annotations

TESTS = "assert solve(3) == 4\nassert solve([1, 2]) == [2, 3]\nassert not solve(None)"
HONEST = "def solve(x): return x + 1 if x == 3 else [i + 1 for i in x] if x else None"

# Expects an exception, in the careless way of published tests: any exception, and the end of the program.
SWALLOWING = """
try:
    solve('x')
except:
    pass
else:
    assert False
"""
HONEST_RAISER = "def solve(x): raise ValueError(x)"

# The program's end of the channel, with the encoder: what a program can find by walking the frames.
PEER = """
import sys
frame = sys._getframe()
while 'peer' not in frame.f_locals: frame = frame.f_back
peer = frame.f_locals['peer']
wire = sys.modules['wmtp.execution.wire']
known = [None]  # the tester knows one container of the call that is answered: the list of names it asks for
def send(kind, value): peer.send(kind, wire.encode(peer, value, known[:], []))
"""
EQUAL = """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return bool(answer)
    def __hash__(self): return 0
"""

ENDINGS: dict[str, str] = {
    "exits when called": "import sys\ndef solve(x): sys.exit(0)",
    "exits hard when called": "import os\ndef solve(x): os._exit(0)",
    "exits with the status of a failed assert": "import os\ndef solve(x): os._exit(102)",
    "exits from a thread": """
import os, threading
def solve(x):
    threading.Thread(target=os._exit, args=(0,)).start()
    threading.Event().wait()
""",
    "exits from a signal handler": """
import os, signal, time
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
def solve(x):
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(5)
""",
    "kills itself": "import os, signal\ndef solve(x): os.kill(os.getpid(), signal.SIGTERM)",
    "kills its group": "import os, signal\ndef solve(x): os.killpg(0, signal.SIGKILL)",
    "stops itself": "import os, signal\ndef solve(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "crashes": "import ctypes\ndef solve(x): ctypes.string_at(0)",
    "overflows the C stack": """
import sys
sys.setrecursionlimit(1 << 30)
def solve(x):
    nested = None
    for i in range(200_000): nested = (nested,)
    return hash(nested)
""",
    "closes every descriptor": "import os\ndef solve(x): os.closerange(3, 64)",
    "says quit": """
import os
def solve(x):
    for fd in range(3, 64):
        try: os.write(fd, bytes([0, 0, 0, 1]) + b'Q')
        except OSError: pass
""",
    "claims a huge frame": """
import os
def solve(x):
    for fd in range(3, 64):
        try: os.write(fd, b'\\xff\\xff\\xff\\xff' + b'x' * 1000)
        except OSError: pass
""",
    "sends an empty frame": """
import os
def solve(x):
    for fd in range(3, 64):
        try: os.write(fd, bytes(4))
        except OSError: pass
""",
    "sends half a frame and ends": """
import os
def solve(x):
    for fd in range(3, 64):
        try: os.write(fd, b'\\0\\0\\1\\0R0:')
        except OSError: pass
    os._exit(0)
""",
    "sends a pickle": """
import os, pickle
class Exit:
    def __reduce__(self): return os._exit, (0,)
def solve(x):
    data = b'R' + pickle.dumps(Exit())
    for fd in range(3, 64):
        try: os.write(fd, len(data).to_bytes(4, 'big') + data)
        except OSError: pass
""",
    "refuses its own answer": PEER + "def solve(x): peer.send(b'U', b'nothing to see')",
    "asks for a handle nobody gave": PEER + "def solve(x): return [peer.call(n, (), {}) for n in range(5)]",
    "names an exception of the tester": PEER
    + "known = []\ndef solve(x): send(b'X', ('ValueError', (), 1)); send(b'X', ('Unverifiable', 'x', 'y'))",
    "replaces itself": """
import os, sys
python = '/python/bin/' + os.listdir('/python/bin')[0]
def solve(x): os.execv(python, [python, '-OO', '-c', 'print(1)'])
""",
}

FORGERIES: dict[str, str] = ENDINGS | {
    "does nothing": "",
    "exits at once": "import sys; sys.exit(0)",
    "exits hard at once": "import os; os._exit(0)",
    "raises SystemExit": "def solve(x): raise SystemExit(0)",
    "raises KeyboardInterrupt": "def solve(x): raise KeyboardInterrupt",
    "raises GeneratorExit": "def solve(x): raise GeneratorExit",
    "raises StopIteration": "def solve(x): raise StopIteration(4)",
    "raises what asserts raise": "def solve(x): raise AssertionError('passed')",
    "raises a group": "def solve(x): raise ExceptionGroup('passed', [ValueError()])",
    "raises what says it is something else": """
class Sly(BaseException):
    __class__ = property(lambda self: SystemExit)
    args = property(lambda self: 1 / 0)
    def __str__(self): raise self
def solve(x): raise Sly
""",
    "ends through atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef solve(x): return None",
    "prints markers": """
print('passed', 'OK', '{"status": "passed"}')
def solve(x): print('PASSED')
""",
    "writes result files": """
for name in ('result.json', 'verdict', 'passed', 'report.xml'):
    open('/tmp/' + name, 'w').write('{"status": "passed", "passed": true}')
def solve(x): return None
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
    "moves its output onto the channel": """
import os
for fd in range(3, 64):
    try: os.dup2(fd, 1)
    except OSError: pass
print('passed', flush=True)
def solve(x): print('passed', flush=True)
""",
    # Objects that are not what they seem.
    "equals everything": EQUAL + "answer = 0\ndef solve(x): return Any()",
    "equals everything and is false when asked": EQUAL
    + "answer = 1\ndef solve(x):\n    global answer\n    answer = x\n    return Any()",
    "number that equals everything": """
class Int(int):
    __eq__ = lambda self, other: True
    __hash__ = int.__hash__
def solve(x): return Int(0)
""",
    "float that equals everything": """
class Float(float):
    __eq__ = lambda self, other: True
    __hash__ = float.__hash__
def solve(x): return Float(0)
""",
    "text that equals everything": """
class Text(str):
    __eq__ = lambda self, other: True
    __hash__ = str.__hash__
def solve(x): return Text('')
""",
    "bytes that equal everything": """
class Bytes(bytes):
    __eq__ = lambda self, other: True
    __hash__ = bytes.__hash__
def solve(x): return Bytes()
""",
    "list that equals everything": """
class List(list):
    __eq__ = lambda self, other: True
def solve(x): return List()
""",
    "tuple that equals everything": """
import collections
class Pair(collections.namedtuple('Pair', '')):
    __eq__ = lambda self, other: True
def solve(x): return Pair()
""",
    "dictionary that equals everything": """
import collections
class Counter(collections.Counter):
    __eq__ = lambda self, other: True
def solve(x): return Counter()
""",
    "set that equals everything": """
class Set(frozenset):
    __eq__ = lambda self, other: True
    __hash__ = frozenset.__hash__
def solve(x): return Set()
""",
    "list of objects that equal everything": EQUAL
    + "answer = 0\ndef solve(x): return [Any(), Any()] if x == [1, 2] else 4 if x == 3 else 0",
    "key that equals everything": EQUAL + "answer = 0\ndef solve(x): return {Any(): Any()}",
    "function that equals everything": """
class Call:
    __eq__ = lambda self, other: True
    __call__ = lambda self: 1
def solve(x): return Call()
""",
    "partial that equals everything": """
import functools
class Partial(functools.partial):
    __eq__ = lambda self, other: True
def solve(x): return Partial(int)
""",
    "iterator that equals everything": """
class Iterator:
    __eq__ = lambda self, other: True
    __iter__ = lambda self: self
    __next__ = lambda self: 4
def solve(x): return Iterator()
""",
    "class that equals everything": """
class Meta(type):
    __eq__ = lambda cls, other: True
    __hash__ = type.__hash__
class Thing(metaclass=Meta): pass
def solve(x): return Thing
""",
    "class with the name of a builtin": """
class int(int):
    __eq__ = lambda self, other: True
def solve(x): return int(1)
""",
    "says it is a number": """
class Liar:
    __class__ = int
    __eq__ = lambda self, other: True
def solve(x): return Liar()
""",
    "answers for all who ask": "from unittest import mock\ndef solve(x): return mock.ANY",
    "mocks": "from unittest.mock import MagicMock\nsolve = MagicMock()",
    "enumeration that equals everything": """
import enum
class Color(enum.IntEnum):
    RED = 1
    __eq__ = lambda self, other: True
    __hash__ = int.__hash__
def solve(x): return Color.RED
""",
    "fraction that equals everything": """
import fractions
fractions.Fraction.__eq__ = lambda self, other: True
def solve(x): return fractions.Fraction(1, 3)
""",
    "returns the argument": "def solve(x): return x",
    "makes the argument the answer": """
def solve(x):
    if type(x) is list: x[:] = [2, 3]
    return None
""",
    "returns no number": "def solve(x): return float('nan')",
    "returns NotImplemented": "def solve(x): return NotImplemented",
    "returns something truthy": "def solve(x): return True",
    "returns a coroutine": "async def solve(x): return x + 1",
    "returns values for ever": "import itertools\ndef solve(x): return itertools.count(4)",
    "changes its answer later": """
shared = []
def solve(x):
    shared.append(x)
    return shared
""",
    # Patches, which reach no further than its own process.
    "patches builtins": """
import builtins
builtins.AssertionError = builtins.Exception = type('E', (BaseException,), {})
builtins.all = builtins.any = builtins.isinstance = builtins.bool = lambda *a: True
builtins.type = lambda *a: int
def solve(x): return True
""",
    "shadows what the tests use": "def abs(x): return 0\ndef len(x): return 2\ndef solve(x): return 1",
    "shadows the judge": """
def check(*args): return True
__wmtp_assert_passed__ = __wmtp_assert_failed__ = print
__builtins__ = {}
def solve(x): return None
""",
    "patches the encoder": """
import sys
sys.modules['wmtp.execution.wire']._Writer.value = lambda self, value, out: out.append(b'T')
def solve(x): return 1
""",
    "patches the peer": """
import sys
peer = sys.modules['wmtp.execution.peer']
peer.Peer.serve = lambda self, data: self.send(b'R', b'0:T0:')
def solve(x): return 1
""",
    "patches the system calls": """
import posix
write = posix.write
posix.write = lambda fd, data: write(fd, bytes(data).replace(b'N', b'i4;'))
def solve(x): return None
""",
    "patches the containers that can be carried": """
import collections
class Deque(collections.deque):
    __eq__ = lambda self, other: True
collections.deque = Deque
def solve(x): return Deque()
""",
    "hooks imports": """
import sys, types
class Finder:
    def find_spec(self, name, path=None, target=None): sys.modules[name] = types.ModuleType(name)
sys.meta_path.insert(0, Finder())
def solve(x): return 1
""",
    "traces": """
import sys, threading
def trace(frame, event, argument):
    for name in frame.f_locals:
        if name in ('status', 'verdict', 'passed'): frame.f_locals[name] = 'passed'
    return trace
sys.settrace(trace); sys.setprofile(trace); threading.settrace(trace)
def solve(x): return 1
""",
    "hooks what Python does at the end": """
import os, sys
sys.excepthook = sys.unraisablehook = lambda *a: os._exit(0)
class Late:
    def __del__(self): os._exit(0)
late = Late()
def solve(x): return undefined
""",
    "refuses every event": """
import sys
def hook(event, args):
    if event.startswith(('compile', 'object')): raise SystemExit(0)
sys.addaudithook(hook)
def solve(x): return compile('1', '', 'eval')
""",
    "makes recursion impossible": "import sys\ndef solve(x): sys.setrecursionlimit(5); return 4",
    "damages None": "import ctypes\ndef solve(x): ctypes.memset(id(None), 0, 64)",
    "damages a small number": """
import ctypes
def solve(x):
    ctypes.c_uint32.from_address(id(5) + 24).value = 4
    return 5 if x == 3 else None
""",
    # Walks, which find nothing: neither tests nor expected values are there.
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
    "walks the heap for the tests": """
import gc
def solve(x):
    texts = [o for o in gc.get_objects() if type(o) is dict for o in o.values() if type(o) is str]
    tests = [t for t in texts if t.startswith('assert solve(3)')]
    return 4 if tests else None
""",
    "walks the referrers of the argument": """
import gc
def solve(x):
    for holder in gc.get_referrers(x):
        if type(holder) is dict: holder['passed'] = holder['status'] = 'passed'
    return None
""",
    # The channel, spoken well.
    "answers before it is asked": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'\\0\\0\\0\\6R0:N0:' * 20)
    except OSError: pass
def solve(x): return None
""",
    "answers for ever from a thread": """
import os, threading
def pump():
    while True:
        for fd in range(3, 64):
            try: os.write(fd, b'\\0\\0\\0\\6R0:T0:')
            except OSError: pass
threading.Thread(target=pump, daemon=True).start()
def solve(x): return None
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
    "offers every builtin": PEER
    + """
import builtins
send(b'R', [(name, 'value', lambda *a, **k: True) for name in dir(builtins)])
def solve(x): return 4
""",
    "offers the counter of asserts": PEER
    + "send(b'R', [('__wmtp_assert_passed__', 'value', print), ('solve', 'value', print)])",
    "offers a module for the function": PEER + "send(b'R', [('solve', 'module', 'antigravity')])",
    "offers a module that is not there": PEER + "send(b'R', [('solve', 'module', 'os.system')])",
    "offers nothing that can be understood": PEER + "send(b'R', [('solve',), 4, None])",
    "offers a class for the function": "solve = object",
    "offers itself twice": PEER + "send(b'R', [('solve', 'value', None), ('solve', 'value', bool)] * 2)",
    "hands back what it was handed": PEER + "peer.send(b'R', b'0:p0;0:')\ndef solve(x): return None",
    "nests without end": PEER + "def solve(x): peer.send(b'R', b'0:' + b'(1:' * 1_000_000 + b'N0:')",
    "nests a list without end": """
def solve(x):
    nested = []
    for i in range(100_000): nested = [nested]
    return nested
""",
    "sends millions of containers": PEER
    + "def solve(x): peer.send(b'R', b'3000000:' + b'q' * 3_000_000 + b'N0:' + b'N0:' * 3_000_000)",
    "sends a number without end": "def solve(x): return 1 << 60_000_000",
    "sends keys that collide": "def solve(x): return {i * ((1 << 61) - 1): 0 for i in range(30_000)}",
    "sends lengths that run away": PEER
    + "def solve(x): peer.send(b'R', b'0:s99999999999999999999:x0:'); peer.send(b'R', b'0:(-1:0:')",
    "changes containers of the tests it was not given": PEER
    + "def solve(x): peer.send(b'R', b'0:N3:0;0:1;0:7;0:')",
    "ends without ending": PEER + "def solve(x): send(b'X', ('SystemExit', (), 'x'))",
    # Sources that are hard to read.
    "source with a null": "def solve(x): return 4\0",
    "source with half a character": "def solve(x): return '\ud800'",
    "source that nests": "(" * 100_000,
    "source of one long expression": "x = " + "-" * 100_000 + "1",
    "source that is a huge constant": "x = 'a' * 10 ** 11\ndef solve(x): return 4",
    "source that never ends": "while True: pass",
    "source in another language": "int main() { return 0; }",
}

CASES = (("20 22\n", "42\n"), ("1 2\n", "3\n"), ("-1 -2\n", "-3 is less than -2.5\n"))
HONEST_PRINTER = """
a, b = map(int, input().split())
print(a + b, end=' is less than -2.5' if a + b < 0 else '\\n\\n')
"""
OUTPUT_FORGERIES: dict[str, str] = {
    "prints nothing": "",
    "prints markers": "print('passed', 'OK', 'AC')",
    "prints every number": "for i in range(100): print(i)",
    "prints the answer and fails": "print(sum(map(int, input().split())))\nraise SystemExit(1)",
    "prints the answer and crashes": "print(42, flush=True)\nimport ctypes; ctypes.string_at(0)",
    "prints the answer and hangs": "print(42, flush=True)\nwhile True: pass",
    "prints the answer elsewhere": "import sys\nprint(42, file=sys.stderr)",
    "prints the answer twice": "print(*[sum(map(int, input().split()))] * 2)",
    "prints half the answer": "print('4 2')",
    "prints other digits": "print('\u0664\u0662')",
    "prints another notation": "print('0x2a' if '20' in input() else '0b11')",
    "prints a number with marks": "print('4_2' if '20' in input() else '0_3')",
    "prints what no number equals": "print('nan')",
    "prints more than all": "print('inf')",
    "prints nulls": "print('\\0' * 1000)",
    "prints without end": "while True: print(' ' * 65536)",
    "prints a number without end": "print('4' * (1 << 20))",
    "prints what the last run left": """
import os
line = input()
try: print(open('/tmp/answers').read())
except OSError: print(42)
open('/tmp/answers', 'w').write('3')
""",
    "rewrites its input": """
import os
os.write(0, b'42'); os.ftruncate(0, 2); os.lseek(0, 0, 0)
print(open(0).read())
""",
}
