"""What goes into a run of an untrusted program and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "error", "timeout", "memory", "killed", "unverified"]
SandboxKind = Literal["bubblewrap+seccomp", "bubblewrap", "none"]
Isolation = Literal["bubblewrap", "process-limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramJob:
    """One program to run; the fields are the arguments of `run_program`.

    `cases` are pairs of what a program reads on stdin and what it must print: each is a run of its own, with
    limits of its own.
    """

    source: str
    tests: str | None = None
    setup: str = ""
    stdin: str = ""
    timeout_s: float = 10.0
    memory_mib: int = 512
    stop_at_failure: bool = True
    cases: Sequence[tuple[str, str]] | None = None
    language: str = "python3"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramResult:
    """The verdict on one program.

    Attributes:
        passed: True only for status `passed`.
        status: `passed`; `failed` an assert did not hold, or the output is not the expected one; `error` the
            program or the tests raised, or the program ended before its tests did; `timeout`; `memory` it ran
            out of memory; `killed` it died of a signal, or was ended for too much output or too many files;
            `unverified` the tests need objects of the program's own, ran inside the sandbox and claim to have
            passed there.
        stdout: what the program printed, cut at a bound; of the last run where there are several.
        stderr: likewise.
        wall_s: seconds from start to verdict, of all runs together.
        message: what went wrong, for people: the line of the tests, the program's traceback. Empty when
            passed.
        asserts_passed: number of assert statements of the tests that were reached and always held; with
            cases, the number of those that held.
        asserts_total: number of assert statements in the tests, or of cases.
        isolation: what stood between the program and this machine.
    """

    passed: bool
    status: Status
    stdout: str
    stderr: str
    wall_s: float
    message: str = ""
    asserts_passed: int = 0
    asserts_total: int = 0
    isolation: Isolation = "bubblewrap"


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxStatus:
    """Whether untrusted programs can be isolated on this machine.

    Attributes:
        available: whether the sandbox was started and held.
        kind: the isolation in force: `bubblewrap`, with or without its system call filter, or `none`.
        user: as whom programs run: `own`, a user id that nothing else on this machine has, which root can
            give each worker; `mapped`, nobody in a user namespace; `none`.
        reason: why it is not available; empty when it is.
        remedy: what the user can do about it; empty when nothing is wrong.
    """

    available: bool
    kind: SandboxKind
    user: Literal["own", "mapped", "none"] = "none"
    reason: str = ""
    remedy: str = ""
