"""None of some two hundred hostile programs passes, leaks a planted secret, survives, or does harm.

The programs are data in `hostile_forgeries` and `hostile_actions`; `hostile_suite` runs them. Nothing here is
skipped where no sandbox works: then every test fails, because a judge that cannot run must not look like one
that held.
"""

from __future__ import annotations

import json
import os

import pytest
from as_nobody import run_as_nobody
from hostile_forgeries import CASES, HONEST, HONEST_PRINTER, HONEST_RAISER, SWALLOWING, TESTS
from hostile_suite import GROUPS, NUM_PROGRAMS, run_group
from sandbox_users import kind_in_force, needs_kind

from wmtp.execution import check_sandbox, run_program
from wmtp.execution.pool import User


def test_this_suite_is_whole_and_was_not_skipped() -> None:
    assert NUM_PROGRAMS >= 200
    assert check_sandbox().available, check_sandbox()
    assert kind_in_force() in ("own", "mapped")


@pytest.mark.parametrize("group", GROUPS)
def test_hostile_programs_get_nothing(group: str) -> None:
    assert run_group(group, kind_in_force()) == []


def test_the_forgeries_would_pass_if_they_gave_right_values() -> None:
    assert run_program(HONEST, tests=TESTS).passed
    assert run_program(HONEST_RAISER, tests=SWALLOWING).passed
    assert run_program(HONEST_PRINTER, cases=CASES).passed


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_hostile_programs_get_nothing_from_a_mapped_user(group: str) -> None:
    """Of an ordinary user it is the only one; root falls back on it where it may not mount."""
    assert run_group(group, "mapped") == []


@pytest.mark.slow
@pytest.mark.parametrize("group", ["readers", "reachers", "lingerers", "poisoners"])
@pytest.mark.parametrize("user", ["own", "mapped"])
def test_the_namespaces_alone_hide_all_and_end_all(user: User, group: str) -> None:
    """Without the filter of system calls, as on an architecture that has none; here processes fork."""
    needs_kind(user)
    assert run_group(group, user, has_filter=False) == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user runs the suite in the tests above")
def test_an_ordinary_user_runs_the_whole_suite() -> None:
    needs_kind("own")  # the rights by which root shows the interpreter to nobody
    outcome = run_as_nobody("hostile_suite.py")
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    found = json.loads(outcome.stdout)
    assert found["uid"] == 65534
    assert found["num_programs"] == NUM_PROGRAMS
    assert found["findings"] == {group: [] for group in GROUPS}


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


def test_a_module_cannot_be_passed_off_as_another() -> None:
    """Where the tests name a module that they forgot to import."""
    source = "import string as math\ndef solve(x): return x"
    result = run_program(source, tests="assert math.floor(solve(3.5)) == 3")
    assert result.passed, "the tests' own module, whatever the program calls by that name"
    assert not run_program(source, tests="assert math.floor(solve(4.5)) == 3").passed


def test_tests_that_name_only_builtins_must_leave_no_choice() -> None:
    """One builtin can only mean the program's function; of two, one could be what judges."""
    assert run_program("def sum(a, b): return a * b", tests="assert sum(2, 3) == 6").passed
    source = "def sum(a, b): return 0\ndef abs(x): return 6"
    result = run_program(source, tests="assert abs(sum(2, 3)) == 6")
    assert result.status == "error"
    assert "builtins: abs, sum" in result.message


def test_a_function_that_stops_an_iteration_does_not_cut_the_tests_short() -> None:
    tests = "for got, want in zip(map(f, [1, 2]), [2, 3]):\n    assert got == want"
    assert run_program("def f(x): return x + 1", tests=tests).passed
    assert run_program("def f(x): raise StopIteration", tests=tests).status == "error"


@pytest.mark.parametrize(
    "returned",
    ["10 ** 5000", "float('nan')", "'\\ud800'", "[[]] * 100_000", "b'\\0' * (8 << 20)", "lambda: 1"],
)
def test_values_that_are_hard_to_show_get_an_ordinary_verdict(returned: str) -> None:
    result = run_program(f"def f(): return {returned}", tests="assert f() == 4, f()")
    assert result.status == "failed"
    assert "line 1 of the tests" in result.message
