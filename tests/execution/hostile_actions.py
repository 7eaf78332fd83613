"""Programs that reach for what is not theirs. Data only: `hostile_suite` runs them.

Harmless where the sandbox fails: nothing is aimed at any address but loopback, and signals only at a process
that the suite planted; what exhausts stops by itself (300 processes, 2 GiB of memory, 1 GiB of disk, 20
seconds).
"""

from __future__ import annotations

SECRET = "planted-secret-5b1f"

# Fields are filled in by the suite. Each prints SECRET when it is run outside the sandbox.
READERS: dict[str, str] = {
    "file": "print(open({folder!r} + '/secret.txt').read())",
    "file by a system call": """
import ctypes
libc = ctypes.CDLL(None)
fd = libc.open(({folder!r} + '/secret.txt').encode(), 0)
data = ctypes.create_string_buffer(99)
libc.read(fd, data, 99)
print(data.value)
""",
    "file mapped into memory": """
import mmap
with open({folder!r} + '/secret.txt', 'rb') as file: print(bytes(mmap.mmap(file.fileno(), 0, prot=1)))
""",
    "every file of the folder": """
import glob
for path in glob.glob({folder!r} + '/*.txt'): print(open(path).read())
""",
    "file through a link": """
import os, tempfile
link = tempfile.mkdtemp() + '/link'
os.symlink({folder!r}, link)
print(open(link + '/secret.txt').read())
""",
    "file by way of the root": "print(open('/' + '../' * 9 + {folder!r}[1:] + '/secret.txt').read())",
    "file through the root of this process": """
print(open('/proc/self/root' + {folder!r} + '/secret.txt').read())
""",
    "file through the root of another": """
print(open('/proc/{pid}/root' + {folder!r} + '/secret.txt').read())
""",
    "file in the working folder of another": "print(open('/proc/{pid}/cwd/secret.txt').read())",
    "file with another program": """
import subprocess
print(subprocess.run(['/bin/cat', {folder!r} + '/secret.txt'], capture_output=True).stdout)
""",
    "file by becoming another program": """
import os
os.execv('/bin/cat', ['cat', {folder!r} + '/secret.txt'])
""",
    "module of the folder": "import sys\nsys.path.insert(0, {folder!r})\nimport planted_module",
    "home": "import os\nprint(open(os.path.expanduser('~') + '/secret.txt').read())",
    "shared memory": "print(open({shared!r}).read())",
    "open descriptors": """
import os
for fd in range(3, 256):
    try: os.lseek(fd, 0, 0); print(os.read(fd, 99))
    except OSError: pass
""",
    "environment": "import os\nprint(os.environ)",
    "environment of the C library": """
import ctypes
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
print(getenv(b'WMTP_PLANTED'))
""",
    "environment of this process": "print(open('/proc/self/environ').read())",
    "environment of another": "print(open('/proc/{pid}/environ').read())",
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
    "loopback by name": """
import asyncio
async def main():
    reader, _ = await asyncio.open_connection('127.0.0.1', {port})
    print(await reader.read(99))
asyncio.run(main())
""",
    "loopback by HTTP": """
import urllib.request
try: urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)
except Exception as error: print(repr(error))
""",
    "loopback by a system call": """
import ctypes, socket, struct
libc = ctypes.CDLL(None)
fd = libc.socket(2, 1, 0)
address = struct.pack('=H', 2) + struct.pack('>H', {port}) + socket.inet_aton('127.0.0.1') + bytes(8)
libc.connect(fd, address, 16)
data = ctypes.create_string_buffer(99)
libc.recv(fd, data, 99, 0)
print(data.value)
""",
    "datagram on loopback": """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(2)
s.sendto(b'hello', ('127.0.0.1', {datagram_port}))
print(s.recv(99))
""",
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

# Each prints `done` when it is run outside the sandbox, with a signal or value that does no harm.
REACHERS: dict[str, str] = {
    "signal": "import os\nos.kill({pid}, {signal})\nprint('done')",
    "signal by a system call": """
import ctypes
if ctypes.CDLL(None).kill({pid}, {signal}) == 0: print('done')
""",
    "signal to a descriptor": """
import os, signal
signal.pidfd_send_signal(os.pidfd_open({pid}), {signal})
print('done')
""",
    "signal to a group": "import os\nos.killpg({pid}, {signal})\nprint('done')",
    "signal to a thread": """
import ctypes
if ctypes.CDLL(None).syscall(*{tgkill}, {pid}, {pid}, {signal}) == 0: print('done')
""",
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, {pid}, 19)\nprint('done')",
    "processors": "import os\nos.sched_setaffinity({pid}, os.sched_getaffinity({pid}))\nprint('done')",
    "limits": "import resource\nresource.prlimit({pid}, resource.RLIMIT_CORE, (0, 0))\nprint('done')",
}

# Never run outside the sandbox. What each prints is what it could get: at most the number beside it.
EXHAUSTERS: dict[str, tuple[int, str]] = {
    "memory at once": (0, "x = bytearray(2 << 30)\nprint(len(x) >> 20)"),
    "memory in blocks": (
        256,
        """
blocks = []
try:
    while len(blocks) < 64: blocks.append(bytearray(32 << 20))
except MemoryError: pass
print(len(blocks) * 32)
""",
    ),
    "memory of a growing text": (
        256,
        """
text = b'x' * (1 << 20)
try:
    while len(text) < 2 << 30: text += text
except MemoryError: pass
print(len(text) >> 20)
""",
    ),
    "memory of maps": (
        256,
        """
import mmap
maps = []
try:
    while len(maps) < 64:
        maps.append(mmap.mmap(-1, 32 << 20)); maps[-1].write(bytes(32 << 20))
except (OSError, MemoryError): pass
print(len(maps) * 32)
""",
    ),
    "memory after raising the limit": (
        256,
        """
import resource
for limits in ((2 << 30, 2 << 30), (-1, -1)):
    try: resource.setrlimit(resource.RLIMIT_AS, limits)
    except (OSError, ValueError): pass
blocks = []
try:
    while len(blocks) < 64: blocks.append(bytearray(32 << 20))
except MemoryError: pass
print(len(blocks) * 32)
""",
    ),
    "memory without a file": (
        0,
        """
import ctypes, os
libc = ctypes.CDLL(None)
fd = libc.memfd_create(b'x', 0)
for i in range(64): os.write(fd, bytes(16 << 20))
print(os.fstat(fd).st_size >> 20)
""",
    ),
    "memory shared by System V": (
        0,
        """
import ctypes
libc = ctypes.CDLL(None)
print(sum(libc.shmget(0, 32 << 20, 0o1600) >= 0 for i in range(64)) * 32)
""",
    ),
    "memory in pipes": (
        64,
        """
import fcntl, os
num_bytes = 0
try:
    while num_bytes < 2 << 30:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try: fcntl.fcntl(writer, 1031, 1 << 20)
        except OSError: pass
        try:
            while True: num_bytes += os.write(writer, bytes(1 << 16))
        except BlockingIOError: pass
except OSError: pass
print(num_bytes >> 20)
""",
    ),
    "memory in sockets": (
        64,
        """
import socket
num_bytes, sockets = 0, []
try:
    while num_bytes < 2 << 30:
        sockets.append(socket.socketpair())
        one = sockets[-1][0]
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
        try:
            while True: num_bytes += one.send(bytes(1 << 16))
        except BlockingIOError: pass
except OSError: pass
print(num_bytes >> 20)
""",
    ),
    "threads": (
        64,
        """
import threading, time
try:
    for i in range(300): threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
except RuntimeError: pass
print(threading.active_count())
""",
    ),
    "processes": (
        0,
        """
import os, time
num = 0
try:
    for i in range(300):
        if os.fork() == 0: time.sleep(20); os._exit(0)
        num += 1
except OSError: pass
print(num)
""",
    ),
    "processes of processes": (
        0,
        """
import os, time
try:
    for i in range(8):
        if os.fork() == 0: print(1, flush=True)
    time.sleep(20)
except OSError: print(0)
""",
    ),
    "processes by other calls": (
        0,
        """
import ctypes, os, sys
libc = ctypes.CDLL(None)
python, num = '/python/bin/' + os.listdir('/python/bin')[0], 0
for i in range(20):
    try: os.posix_spawn(python, [python, '-c', 'import time; time.sleep(20)'], {}); num += 1
    except OSError: pass
    try: num += os.forkpty()[0] > 0
    except OSError: pass
    num += libc.syscall(435, None, 0) > 0
print(num)
""",
    ),
    "descriptors": (
        64,
        """
import os
files = []
try:
    while len(files) < 5000: files.append(os.dup(0))
except OSError: pass
print(len(files))
""",
    ),
    "descriptors after raising the limit": (
        64,
        """
import os, resource
try: resource.setrlimit(resource.RLIMIT_NOFILE, (5000, 5000))
except (OSError, ValueError): pass
files = []
try:
    while len(files) < 5000: files.append(os.dup(0))
except OSError: pass
print(len(files))
""",
    ),
    "disk": (
        32,
        """
num = 0
try:
    for i in range(128):
        with open(f'/tmp/{i}', 'wb') as file:
            for j in range(8): file.write(bytes(1 << 20)); file.flush(); num += 1
except OSError: pass
print(num)
""",
    ),
    "disk in one file": (
        16,
        """
num = 0
try:
    with open('/tmp/x', 'wb') as file:
        for j in range(1024): file.write(bytes(1 << 20)); file.flush(); num += 1
except OSError: pass
print(num)
""",
    ),
    "disk through stdin": (
        16,
        """
import os
num = 0
try:
    for j in range(1024): os.pwrite(0, bytes(1 << 20), j << 20); num += 1
except OSError: pass
print(num)
""",
    ),
    "empty files": (
        60_000,
        """
import os
num = 0
try:
    while num < 300_000: os.close(os.open(f'/tmp/{num}', 65)); num += 1; num % 500 or print(num, flush=True)
except OSError: pass
""",
    ),
    "folders": (
        60_000,
        """
import os
num = 0
try:
    while num < 300_000: os.mkdir(f'/tmp/{num}'); num += 1; num % 500 or print(num, flush=True)
except OSError: pass
""",
    ),
    "output": (16, "for i in range(64): print('x' * (1 << 20), flush=True)"),
    "errors": (16, "import sys\nfor i in range(64): sys.stderr.write('x' * (1 << 20))"),
    "output of two kinds": (
        32,
        "import os\nfor i in range(64): os.write(1, b'x' * (1 << 20)); os.write(2, b'x' * (1 << 20))",
    ),
    "processor time of threads": (
        64,
        """
import hashlib, threading, time
end = time.monotonic() + 20
def work():
    while time.monotonic() < end: hashlib.sha512(bytes(1 << 20))
for i in range(16): threading.Thread(target=work).start()
""",
    ),
    "a pattern that never ends": (0, "import re\nre.match('(a+)+$', 'a' * 40 + 'b')"),
    "a sum that no signal ends": (0, "sum(range(10 ** 10))"),
    "timers": (
        0,
        """
import signal, time
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-6)
time.sleep(20)
""",
    ),
    "locks": (
        100_000,
        """
import fcntl, os, time
end, num = time.monotonic() + 20, 0
fd = os.open('/tmp/x', os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 1 << 20)
while time.monotonic() < end and num < 100_000:
    fcntl.lockf(fd, fcntl.LOCK_EX, 1, 2 * num); num += 1
print(num)
""",
    ),
}

# Run for a second; afterwards no process that carries their name may be left. Where new processes can be made
# (without the filter of system calls) these make them.
LINGERERS: dict[str, str] = {
    "ignores every signal": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
time.sleep(20)
""",
    "blocks every signal": """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
time.sleep(20)
""",
    "a thread goes on": "import threading, time\nthreading.Thread(target=time.sleep, args=(20,)).start()",
    "waits at its end": "import atexit, time\natexit.register(time.sleep, 20)",
    "waits in a finalizer": """
import time
class Late:
    def __del__(self, sleep=time.sleep): sleep(20)
late = Late()
""",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "a session of its own": "import ctypes, time\nctypes.CDLL(None).setsid()\ntime.sleep(20)",
    "many children": """
import os, time
num = 0
for i in range(100):
    try: pid = os.fork()
    except OSError: break
    if pid == 0:
        os.setsid()
        time.sleep(20)
        os._exit(0)
    num += 1
print(num, flush=True)
time.sleep(20)
""",
    "a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        time.sleep(20)
    os._exit(0)
print(1)
""",
    "a child that is always another": """
import os, time
for i in range(300):
    if os.fork() != 0: os._exit(0)
    os.setsid()
    time.sleep(0.01)
time.sleep(20)
""",
    "a child that waits for its parent's end": """
import os, time
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent: time.sleep(0.01)
    os.setsid()
    time.sleep(20)
""",
    "a child that holds the output": """
import os, time
if os.fork() == 0: time.sleep(20)
print(1)
""",
    "becomes another program again and again": """
import ctypes, os, sys
python = '/python/bin/' + os.listdir('/python/bin')[0]
code = 'import ctypes, time; ctypes.CDLL(None).prctl(15, NAME, 0, 0, 0); time.sleep(20)'
os.execve(python, [python, '-S', '-c', code.replace('NAME', repr(NAME))], {'PYTHONHOME': '/python'})
""",
}

# Each runs before an honest and a wrong program on the same worker, which must get their verdicts.
POISONERS: dict[str, str] = {
    "closes what it can": "import os\nos.closerange(0, 64)",
    "scribbles on what it can": """
import os
for fd in range(64):
    try: os.write(fd, b'\\0\\0\\0\\6R0:T0:' * 1000)
    except OSError: pass
def solve(x): return x
""",
    "patches what it can": """
import builtins, collections, posix, sys
wire = sys.modules['wmtp.execution.wire']
wire._Writer.value = lambda self, value, out: out.append(b'T')
builtins.compile = builtins.exec = builtins.len = print
posix.read = posix.write = collections.deque = None
""",
    "changes the library": """
import os, sys
for folder in sys.path + ['/python', '/usr/lib', '/dev']:
    for name in ('posix.py', 'collections.py', 'sitecustomize.py', '__pycache__/ast.cpython-311.pyc'):
        try: open(os.path.join(folder, name), 'w').write('raise SystemExit')
        except OSError: pass
    for act in (os.rmdir, os.unlink, lambda path: os.chmod(path, 0), lambda path: os.utime(path, (0, 0))):
        try: act(folder)
        except OSError: pass
def solve(x): return x
""",
    "leaves files behind": """
import os
for name in ('collections.py', 'posix.py', 'tests', 'answer'):
    open('/tmp/' + name, 'w').write('raise SystemExit')
os.chmod('/tmp', 0)
def solve(x): return x
""",
    "changes the devices": """
import os
for name in ('null', 'zero', 'random', 'urandom'):
    for act in (lambda path: os.chmod(path, 0o600), lambda path: os.utime(path, (0, 0)), os.unlink):
        try: act('/dev/' + name); print('done')
        except OSError: pass
""",
    "holds locks": """
import fcntl, glob, sys
files = [open(path) for path in glob.glob('/python/bin/*')]
for file in files: fcntl.flock(file, fcntl.LOCK_EX)
def solve(x): return x
""",
    "speaks after its answer": """
import os, threading, time
def speak():
    time.sleep(0.2)
    for fd in range(3, 64):
        try: os.write(fd, b'\\0\\0\\0\\6R0:T0:')
        except OSError: pass
threading.Thread(target=speak).start()
def solve(x): return x
""",
    "lowers its limits": """
import os, resource
for name in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
    resource.setrlimit(name, (1, 1))
os.nice(19)
os.umask(0o777)
def solve(x): return x
""",
    "crashes": "import ctypes\nctypes.string_at(0)",
}
