"""Runs one untrusted program inside the sandbox. Nothing here is trusted by the other processes.

This file is compiled by the supervisor and handed over a file descriptor; it runs in a bare interpreter. Two
ways:

- `script`: the program runs as `__main__` to its end and the exit status tells how (section `EXIT_*`).
- `serve`: the program is loaded as a module, then its functions are called over the channel until the tester
  says quit.
"""

from __future__ import annotations

import builtins
import posix
import sys

from wmtp.execution.peer import CALL, LOAD, ChannelClosedError, Peer, Unverifiable
from wmtp.execution.wire import UncarriableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any, NoReturn

PROGRAM_NAME = "program.py"
EXIT_ERROR, EXIT_MEMORY, EXIT_ASSERTION = 1, 101, 102
_MAX_FRAMES = 12  # shown of a traceback, from the innermost


def main(config: dict[str, Any]) -> None:
    """Set the limits, say that the sandbox stands, run the program."""
    _limit(config["limits"])
    posix.write(config["started_fd"], b"1")
    posix.close(config["started_fd"])
    vars(builtins).update(exit=_exit, quit=_exit)
    source: str = config["source"]
    if config["mode"] == "script":
        _run_script(source)
    else:
        _serve(source, Peer(config["read_fd"], config["write_fd"], _Describer(source)))


def _limit(limits: list[tuple[str, int]]) -> None:
    import resource

    for name, value in limits:
        resource.setrlimit(vars(resource)[name], (value, value))


def _exit(code: object = None) -> NoReturn:
    """`exit` and `quit`, which `site` would define; many programs for contests end with them."""
    raise SystemExit(code)


def _new_module(name: str) -> ModuleType:
    module = type(sys)(name)
    sys.modules[name] = module
    return module


def _run_script(source: str) -> None:
    module = _new_module("__main__")
    try:
        exec(compile(source, PROGRAM_NAME, "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        status = EXIT_ERROR
        if isinstance(error, MemoryError):
            status = EXIT_MEMORY
        elif isinstance(error, AssertionError):
            status = EXIT_ASSERTION
        sys.stdout.flush()
        sys.stderr.write(_Describer(source)(error))
        sys.stderr.flush()
        posix._exit(status)


def _serve(source: str, peer: Peer) -> None:
    def load(names: list[str]) -> list[tuple[str, str, Any]]:
        module = _new_module("candidate")
        exec(compile(source, PROGRAM_NAME, "exec", dont_inherit=True), module.__dict__)
        return [_offer(name, module.__dict__[name], peer) for name in names if name in module.__dict__]

    assert peer.export(load, is_iterator=False) == LOAD
    try:
        while (frame := peer.receive())[0] == CALL:
            peer.serve(frame[1])
    except (ChannelClosedError, Unverifiable):
        pass  # the tester needs nothing more
    sys.stdout.flush()
    sys.stderr.flush()
    posix._exit(0)


def _offer(name: str, value: object, peer: Peer) -> tuple[str, str, Any]:
    """What a global name of the program is: a value that can be carried, a module, or something that
    cannot."""
    if isinstance(value, type(sys)):
        return name, "module", value.__name__
    try:
        peer.check(value)
    except UncarriableError as error:
        return name, "refused", str(error)
    return name, "value", value


class _Describer:
    """Formats an exception like Python does, without the cost of importing `traceback`."""

    def __init__(self, source: str) -> None:
        self._lines = source.split("\n")

    def __call__(self, error: BaseException) -> str:
        frames: list[str] = []
        trace = error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            if code.co_filename == PROGRAM_NAME:
                text = self._lines[trace.tb_lineno - 1].strip() if trace.tb_lineno <= len(self._lines) else ""
                frames.append(
                    f'  File "{PROGRAM_NAME}", line {trace.tb_lineno}, in {code.co_name}\n    {text}\n'
                )
            trace = trace.tb_next
        head = "Traceback (most recent call last):\n" if frames else ""
        return head + "".join(frames[-_MAX_FRAMES:]) + self._last_line(error)

    def _last_line(self, error: BaseException) -> str:
        try:
            text = str(error)
        except Exception:  # a broken __str__ of the program's own class
            text = "(no message)"
        return f"{type(error).__name__}: {text}\n" if text else f"{type(error).__name__}\n"
