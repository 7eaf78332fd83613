"""The trusted process that executes tests and gives the verdict.

It runs in a sandbox of its own, started once a worker, and forks for every job, so that it is warm and no job
sees another. The candidate is elsewhere: a name that the tests use and do not define is a stand-in that sends
the call over the channel (`wire`). What comes back is rebuilt here as plain built-in values, so `==` in an
assert is always the interpreter's own.

Builtins and modules are never the candidate's: a program that defines `abs` or binds `math` to something else
does not change what the tests mean. One exception: tests that use no name of the program at all but call a
builtin (MBPP 126 tests a function named `sum`) can only mean the program's function of that name.
"""

from __future__ import annotations

import ast
import builtins
import collections
import contextlib
import copy
import json
import linecache
import math
import os
import random
import re
import resource
import socket
import symtable
import sys
from typing import Any

from wmtp.execution.peer import LOAD, QUIT, ChannelClosedError, Peer, ProgramEndedError, Unverifiable
from wmtp.execution.wire import GarbledMessageError

TESTS_NAME = "tests"
SETUP_NAME = "setup"
# Imported before the fork because tests often ask for them.
_PRELOADED = (collections, copy, linecache, math, random, re)
_COUNT_NAME = "__wmtp_assert_passed__"
_FAIL_NAME = "__wmtp_assert_failed__"
_MAX_MESSAGE_CHARS = 2000


def serve(config: dict[str, Any]) -> None:
    """Wait for jobs on the control socket; fork for each; end when the socket closes.

    A job is one byte with four descriptors: the job as JSON, the two ends of the channel, and where the
    verdict goes.
    """
    control = socket.socket(fileno=config["control_fd"])
    control.send(b"1")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 4)
        if not message:
            return
        child = os.fork()
        if child == 0:
            control.close()
            _run_job(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(child, 0)


def _run_job(job_fd: int, read_fd: int, write_fd: int, verdict_fd: int) -> None:
    """Execute one job in the forked child and never return."""
    try:
        with open(job_fd, "rb") as file:
            job = json.loads(file.read())
        for name, value in job["limits"]:
            resource.setrlimit(vars(resource)[name], (value, value))
        verdict = run_tests(job, Peer(read_fd, write_fd))
        os.write(verdict_fd, json.dumps(verdict).encode())
    finally:
        os._exit(0)


def run_tests(job: dict[str, Any], peer: Peer) -> dict[str, Any]:
    """Execute the tests of a job against the candidate at the other end.

    Returns:
        status (passed, failed, error, memory, lost, unverified), message, asserts_passed and asserts_total.
    """
    random.seed(0)  # the same tests must give the same verdict; set after the fork, which reseeds
    recorder = _Recorder(job["stop_at_failure"])
    try:
        plan = _Plan(job["setup"], job["tests"], recorder)
    except (SyntaxError, ValueError) as error:
        return recorder.verdict("error", f"the tests cannot be used: {error}")
    try:
        namespace = plan.bind(peer)
        exec(plan.setup_code, namespace)
        exec(plan.tests_code, namespace)
        status, message = recorder.first_failure or ("passed", "")
    except BaseException as error:
        status, message = recorder.classify(error, peer)
    if peer.failure is not None:  # also where the tests caught it
        status, message = recorder.classify(peer.failure, peer)
    elif peer.refusal is not None:
        status, message = "unverified", peer.refusal
    with contextlib.suppress(ChannelClosedError):
        peer.send(QUIT)
    return recorder.verdict(status, message)


class _Recorder:
    """Counts asserts and turns what went wrong into a status."""

    def __init__(self, stop_at_failure: bool) -> None:
        self.stop_at_failure = stop_at_failure
        self.first_failure: tuple[str, str] | None = None
        self.num_asserts = 0
        self.lines: list[str] = []
        self.peer: Peer | None = None
        self._passed: set[int] = set()
        self._failed: set[int] = set()

    def passed(self, number: int) -> None:
        """Called after an assert that held."""
        self._passed.add(number)

    def failed(self, number: int, error: Exception) -> None:
        """Called instead of raising where the run goes on after a failure."""
        self._failed.add(number)
        assert self.peer is not None
        if self.first_failure is None:
            self.first_failure = self.classify(error, self.peer)

    def classify(self, error: BaseException, peer: Peer) -> tuple[str, str]:
        """The status and message of an exception that reached the end of the tests."""
        if isinstance(error, ChannelClosedError):
            return "lost", "the program ended before its tests did"
        if isinstance(error, GarbledMessageError):
            return "error", f"the program wrote on the channel of the tests: {error}"
        if isinstance(error, Unverifiable):
            return "unverified", str(error)
        place = self._place(error)
        if isinstance(error, ProgramEndedError):
            return "error", f"{place}{_text(error).strip()}"
        for known, text in peer.remote_errors:
            if known is error:
                status = "memory" if isinstance(error, MemoryError) else "error"
                return status, f"{place}{text.strip()}"
        if isinstance(error, AssertionError):
            return "failed", f"{place}{_text(error)}"
        return "error", f"{place}{type(error).__name__}: {_text(error)}"

    def _place(self, error: BaseException) -> str:
        line = None
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == TESTS_NAME:
                line = trace.tb_lineno
            trace = trace.tb_next
        return "" if line is None else f"line {line} of the tests: {self.lines[line - 1].strip()}\n"

    def verdict(self, status: str, message: str) -> dict[str, Any]:
        """What the supervisor is told."""
        return {
            "status": status,
            "message": message.strip()[:_MAX_MESSAGE_CHARS],
            "asserts_passed": len(self._passed - self._failed),
            "asserts_total": self.num_asserts,
        }


def _text(error: BaseException) -> str:
    """An exception's own text, where it has one: values too long or too deep to be shown have none."""
    try:
        return str(error)
    except Exception as reason:
        return f"(no text: {type(reason).__name__})"


class _Plan:
    """Tests made ready: compiled, with every assert counted, and the names that are the candidate's."""

    def __init__(self, setup: str, tests: str, recorder: _Recorder) -> None:
        self._recorder = recorder
        recorder.lines = tests.split("\n")
        tree = ast.parse(tests, TESTS_NAME)
        counter = _AssertCounter(recorder.stop_at_failure)
        tree = ast.fix_missing_locations(counter.visit(tree))
        recorder.num_asserts = counter.num_asserts
        self.setup_code = compile(setup, SETUP_NAME, "exec", dont_inherit=True)
        self.tests_code = compile(tree, TESTS_NAME, "exec", dont_inherit=True)
        self.names = candidate_names(setup, tests)

    def bind(self, peer: Peer) -> dict[str, Any]:
        """Wait until the program is loaded and make the namespace of the tests.

        Raises whatever the program raised while it was loaded.
        """
        recorder = self._recorder
        recorder.peer = peer
        namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
        for name, kind, value in _checked_offers(peer.call(LOAD, (self.names,), {})):
            if name not in self.names:
                raise GarbledMessageError(f"a name nobody asked for: {name}")
            if kind == "value":
                namespace[name] = value
            elif kind == "module" and value in sys.stdlib_module_names:
                # A program cannot pass off another module as the one that the tests name.
                namespace[name] = __import__(name if name in sys.stdlib_module_names else value)
            else:
                peer.refusal = peer.refusal or f"{name} is {value}"
        if peer.refusal is not None:
            raise Unverifiable(peer.refusal)
        namespace[_COUNT_NAME] = recorder.passed
        namespace[_FAIL_NAME] = recorder.failed
        return namespace


def _checked_offers(offers: object) -> list[tuple[str, str, Any]]:
    if type(offers) is not list:
        raise GarbledMessageError("the names of the program are no list")
    for offer in offers:
        if (
            type(offer) is not tuple
            or len(offer) != 3
            or type(offer[0]) is not str
            or type(offer[1]) is not str
        ):
            raise GarbledMessageError("a name of the program is malformed")
        if offer[1] != "value" and type(offer[2]) is not str:
            raise GarbledMessageError("a name of the program is malformed")
    return offers


class _AssertCounter(ast.NodeTransformer):
    """Adds a call after every assert; where the run goes on after failures, also a handler around it."""

    def __init__(self, stop_at_failure: bool) -> None:
        self.stop_at_failure = stop_at_failure
        self.num_asserts = 0

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        """Count one assert."""
        number = ast.Constant(self.num_asserts)
        self.num_asserts += 1
        count = ast.Expr(ast.Call(ast.Name(_COUNT_NAME, ast.Load()), [number], []))
        ast.copy_location(count, node)
        if self.stop_at_failure:
            return [node, count]
        error = "__wmtp_error__"
        fail = ast.Expr(ast.Call(ast.Name(_FAIL_NAME, ast.Load()), [number, ast.Name(error, ast.Load())], []))
        handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), error, [fail])
        return [ast.copy_location(ast.Try([node, count], [handler], [], []), node)]


def candidate_names(setup: str, tests: str) -> list[str]:
    """Global names that setup and tests use without defining them: these are the program's.

    Builtins are not, unless there is no other name (see the module's docstring).

    Raises:
        ValueError: the tests name nothing but several builtins, so that any of them could be meant.
    """
    used: set[str] = set()
    defined: set[str] = set()
    for source, name in ((setup, SETUP_NAME), (tests, TESTS_NAME)):
        _collect(symtable.symtable(source, name, "exec"), used, defined)
    builtin_names = set(dir(builtins))
    free = used - defined - {"__name__", "__file__", "__doc__"}
    if free - builtin_names:
        return sorted(free - builtin_names)
    meant = sorted(name for name in free & builtin_names if not isinstance(vars(builtins)[name], type))
    if len(meant) > 1:
        raise ValueError(f"they name nothing of the program but builtins: {', '.join(meant)}")
    return meant


def _collect(table: symtable.SymbolTable, used: set[str], defined: set[str]) -> None:
    is_top = table.get_type() == "module"
    for symbol in table.get_symbols():
        is_global = is_top or symbol.is_global()
        if is_global and (symbol.is_assigned() or symbol.is_imported()):
            defined.add(symbol.get_name())
        if is_global and symbol.is_referenced():
            used.add(symbol.get_name())
    for child in table.get_children():
        _collect(child, used, defined)
