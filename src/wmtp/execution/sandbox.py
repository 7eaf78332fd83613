"""Starts one interpreter in a sandbox. Used by the supervisor only.

Bubblewrap gives the process namespaces of its own (processes, network, mounts, IPC, host name), a file system
that holds the interpreter and a small private /tmp, no /proc, an empty environment and an unprivileged user.
The user comes about in one of two ways:

- `mapped`, for an ordinary user: a user namespace in which this user appears as nobody and has no privileges.
- `own`, for root: no user namespace; the interpreter starts with the one privilege to change its user and
  gives it up before it reads the program, for a user id that no other worker has. Mapped root would still be
  root to the kernel, which exempts it from limits on processes.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from wmtp.execution.seccomp import build_filter

TMP_MIB = 32
_INNER_USER = 65534
_KILL_S = 5.0  # to wait for the end of a killed sandbox
# Users that neither distributions nor container managers hand out. One is drawn for each worker, not counted,
# so that containers that share a kernel do not meet either: limits count over all processes of a user.
_FIRST_USER, _NUM_USERS = 0x70000000, 1 << 28
# Reads modules and configuration as marshalled code from a descriptor: nothing of this package needs to be
# mounted.
_BOOT = """
import marshal, posix, sys
def boot(descriptor):
    parts = []
    while part := posix.read(descriptor, 1 << 20):
        parts.append(part)
    posix.close(descriptor)
    modules, user, config = marshal.loads(b"".join(parts))
    if user is not None:
        posix.setgroups([])
        posix.setresgid(user, user, user)
        posix.setresuid(user, user, user)
    for name, code in modules:
        module = sys.modules[name] = type(sys)(name)
        exec(code, module.__dict__)
    module.__dict__[config["entry"]](config)
boot(int(sys.argv.pop()))
"""


def anonymous_file(content: bytes) -> IO[bytes]:
    """A file without a name that holds the content, positioned at its start."""
    if sys.platform == "linux":
        file: IO[bytes] = open(os.memfd_create("wmtp"), "w+b", buffering=0)  # noqa: SIM115 - the caller closes it
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]
    file.seek(0)
    return file


class Sandbox:
    """A way to start interpreters.

    Args:
        config: `isolation` (`bubblewrap` or `process-limits`), `user` (`own` or `mapped`), `has_filter`,
            `python`, and for bubblewrap the `layout` of `wmtp.execution.layout.sandbox_layout`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.is_isolated: bool = config["isolation"] == "bubblewrap"
        self._has_filter: bool = config["has_filter"]
        self._layout: dict[str, Any] = config["layout"]
        self._user = _FIRST_USER + random.randrange(_NUM_USERS) if config["user"] == "own" else None
        self._codes: dict[str, Any] = {}
        self._filters: dict[bool, IO[bytes]] = {}
        if self.is_isolated:
            # Devices are the only part of this machine that is not mounted read-only (bubblewrap cannot), so
            # their owner could change their permissions: root, where it is mapped to nobody.
            self._devices = [
                path
                for path in self._layout["devices"]
                if self._user is not None or os.stat(path).st_uid != os.geteuid()
            ]
            self._program = self._layout["bwrap"]
            self._mounts = self._mount_arguments()
        else:
            self._program = config["python"]

    def start(
        self,
        modules: tuple[str, ...],
        config: dict[str, Any],
        *,
        descriptors: list[int],
        streams: tuple[int, int, int],
        allow_processes: bool,
    ) -> SandboxedProcess:
        """Start an interpreter that runs modules of this package.

        Args:
            modules: names in `wmtp.execution`; the function `config["entry"]` of the last one is called with
                `config`.
            config: plain values, for `marshal`.
            descriptors: stay open in the interpreter under the same numbers.
            streams: stdin, stdout, stderr.
            allow_processes: whether the interpreter may start others.
        """
        codes = [(f"wmtp.execution.{name}", self._code(name)) for name in modules]
        payload = marshal.dumps((codes, self._user, config))
        info_read, info_write = os.pipe()
        folder = None if self.is_isolated else tempfile.mkdtemp(prefix="wmtp-run-")
        try:
            with anonymous_file(payload) as boot:
                arguments, kept = self._arguments(allow_processes, info_write, boot.fileno())
                process = subprocess.Popen(
                    arguments,
                    executable=self._program,
                    stdin=streams[0],
                    stdout=streams[1],
                    stderr=streams[2],
                    env=self._environment(),
                    cwd=folder or "/",
                    pass_fds=[boot.fileno(), *descriptors, *kept],
                    start_new_session=True,
                )
        except BaseException:
            os.close(info_read)
            raise
        finally:
            os.close(info_write)
        return SandboxedProcess(process, info_read, folder)

    def _arguments(self, allow_processes: bool, info_fd: int, boot_fd: int) -> tuple[list[str], list[int]]:
        """The command line, and the descriptors that it names."""
        command = ["-P", "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT, str(boot_fd)]
        if not self.is_isolated:
            return ["python", *command], []
        kept = [info_fd]
        options = ["--info-fd", str(info_fd)]
        filter_fd = self._filter(allow_processes)
        if filter_fd is not None:
            os.lseek(filter_fd, 0, os.SEEK_SET)  # the offset is shared with the last reader
            options += ["--seccomp", str(filter_fd)]
            kept.append(filter_fd)
        return ["bwrap", *self._mounts, *options, "--", self._layout["python"], *command], kept

    def _environment(self) -> dict[str, str]:
        values = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": "/tmp", "PATH": "/nowhere"}
        # Each thread would reserve an arena of 64 MiB of the limited address space.
        values["MALLOC_ARENA_MAX"] = "1"
        if self.is_isolated:
            values["LD_LIBRARY_PATH"] = self._layout["libraries"]
        return values

    def _mount_arguments(self) -> list[str]:
        arguments = [
            "--unshare-ipc",
            "--unshare-pid",
            "--unshare-net",
            "--unshare-uts",
            "--unshare-cgroup-try",
        ]
        arguments += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
        if self._user is None:
            arguments += ["--unshare-user", "--uid", str(_INNER_USER), "--gid", str(_INNER_USER)]
        else:
            arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        places = [path for _, path in (*self._layout["binds"], *self._layout["links"])] + self._devices
        for folder in sorted({str(parent) for place in places for parent in Path(place).parents} - {"/"}):
            arguments += ["--perms", "0755", "--dir", folder]  # else made on the way, closed to other users
        for source, place in self._layout["binds"]:
            arguments += ["--ro-bind", source, place]
        for target, path in self._layout["links"]:
            arguments += ["--symlink", target, path]
        for path in self._layout["hidden"]:
            arguments += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
        for path in self._devices:
            arguments += ["--dev-bind", path, path]
        arguments += ["--perms", "1777", "--size", str(TMP_MIB << 20), "--tmpfs", "/tmp"]
        return [*arguments, "--chdir", "/tmp", "--remount-ro", "/"]

    def _filter(self, allow_processes: bool) -> int | None:
        if not self._has_filter:
            return None
        if allow_processes not in self._filters:
            program = build_filter(allow_processes=allow_processes)
            if program is None:
                return None
            self._filters[allow_processes] = anonymous_file(program)
        return self._filters[allow_processes].fileno()

    def _code(self, name: str) -> Any:
        if name not in self._codes:
            text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
            self._codes[name] = compile(text, f"<wmtp {name}>", "exec", dont_inherit=True, optimize=0)
        return self._codes[name]


class SandboxedProcess:
    """An interpreter in its sandbox.

    Args:
        process: bubblewrap, or without isolation the interpreter itself.
        info_fd: where bubblewrap tells the number of the sandbox's first process. Taken over.
        folder: working folder to remove at the end.
    """

    def __init__(self, process: subprocess.Popen[bytes], info_fd: int, folder: str | None) -> None:
        self.process = process
        self._info_fd = info_fd
        self._folder = folder
        self._inner: int | None = None

    def num_files(self) -> int | None:
        """Number of files and folders in the /tmp of a sandbox that stands; None where it cannot be known.

        Its size is bounded in bytes only, by bubblewrap; empty files cost the kernel memory all the same.
        """
        if self._folder is not None or (inner := self._first_process()) is None:
            return None
        try:
            place = os.statvfs(f"/proc/{inner}/root/tmp")
        except OSError:  # it has ended, or there is no /proc
            return None
        return place.f_files - place.f_ffree

    def close(self) -> None:
        """Kill everything in the sandbox and wait until it is gone."""
        if self.process.poll() is None:
            self._kill()
        if self._folder is not None:  # without a namespace: what stayed in the process group
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._info_fd)

    def _kill(self) -> None:
        # The first process of the sandbox, not bubblewrap itself: bubblewrap then reaps it and leaves no
        # zombie to whoever is process 1 here, and its own end tells that every process of the namespace is
        # gone.
        inner = self._first_process()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid if inner is None else inner, signal.SIGKILL)
        try:
            self.process.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _first_process(self) -> int | None:
        if self._inner is None and select.select([self._info_fd], [], [], 0)[0]:
            # One JSON object, written before the interpreter starts. Nothing after it comes from bubblewrap.
            text = os.read(self._info_fd, 4096).decode("ascii", "replace")
            # Where bubblewrap ended before it had told, or there is none, nothing can be read.
            with contextlib.suppress(ValueError, KeyError):
                self._inner = int(json.JSONDecoder().raw_decode(text)[0]["child-pid"])
        return self._inner
