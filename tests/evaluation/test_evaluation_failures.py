"""Kinds of failures from verdicts as the sandbox gives them."""

from __future__ import annotations

import pytest

from wmtp.evaluation.failures import failure_kind
from wmtp.execution import ProgramJob, run_programs

PROGRAMS = {
    "SyntaxError": "def f(x) return\n",
    "IndentationError": "def f(x):\nreturn 6\n",
    "NameError": "def f(x): return y\n",
    "TypeError": "def f(x): return x + 'a'\n",
    "RecursionError": "def f(x): return f(x)\n",
    "SystemExit": "raise SystemExit\n",
    "ModuleNotFoundError": "import no_such_module\n",
    "other exception": "class Passed(Exception): pass\ndef f(x): raise Passed('wrong value')\n",
    "wrong value": "def f(x): return 7\n",
    "timeout": "def f(x):\n    while True: pass\n",
    "out of memory": "def f(x): return [0] * 10**10\n",
    "passed": "def f(x): return 6\n",
}


def test_failures_are_told_apart_by_names_that_the_program_did_not_choose() -> None:
    jobs = [
        ProgramJob(source=source, tests="assert f(3) == 6\n", timeout_s=2.0) for source in PROGRAMS.values()
    ]
    results = run_programs(jobs)
    kinds = [failure_kind(result.status, result.message) for result in results]
    assert kinds == list(PROGRAMS)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("case 3 of 10: Traceback\n  line\nZeroDivisionError: division by zero", "ZeroDivisionError"),
        ("case 1 of 1: SyntaxError: invalid syntax (program.py, line 1)", "SyntaxError"),
        ("case 1 of 2: exit status 2", "bad exit status"),
        ("", "other exception"),
        ("AssertionError", "AssertionError"),
    ],
)
def test_messages_of_contests_are_read_too(message: str, kind: str) -> None:
    assert failure_kind("error", message) == kind
