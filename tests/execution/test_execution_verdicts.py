"""Programs get the status they deserve, judged from outside by the values they return."""

from __future__ import annotations

import pytest

from wmtp.exceptions import UserInputError
from wmtp.execution import check_sandbox, run_program

ADD = "def add(a, b):\n    return a + b\n"
POINT = """
class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
def move(p): return Point(p.x + 1)
"""


def test_the_sandbox_works_on_the_machine_that_runs_these_tests() -> None:
    status = check_sandbox()
    assert status.available, status.reason
    assert status.kind == "bubblewrap+seccomp"


def test_a_right_program_passes() -> None:
    result = run_program(ADD, tests="assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'")
    assert result.passed
    assert (result.status, result.message) == ("passed", "")
    assert (result.asserts_passed, result.asserts_total) == (2, 2)
    assert result.isolation == "bubblewrap"
    assert 0 < result.wall_s < 60


def test_a_wrong_program_fails_and_names_the_line() -> None:
    result = run_program(
        ADD, tests="assert add(1, 2) == 3\nassert add(1, 2) == 4, 'not four'\nassert add(0, 0) == 0"
    )
    assert (result.passed, result.status) == (False, "failed")
    assert "line 2" in result.message
    assert "not four" in result.message
    assert (result.asserts_passed, result.asserts_total) == (1, 3)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("def f(x): return 1 / 0", "ZeroDivisionError"),
        ("def f(x: return 1", "SyntaxError"),
        ("raise KeyError('early')", "early"),
        ("def g(x): return x", "name 'f' is not defined"),
        ("def f(x): return f(x)", "RecursionError"),
        ("def f(x): raise AssertionError", "AssertionError"),
        ("import numpy\ndef f(x): return x", "numpy"),
    ],
)
def test_a_program_that_raises_is_an_error_that_says_what(source: str, word: str) -> None:
    result = run_program(source, tests="assert f(1) == 1")
    assert result.status == "error"
    assert word in result.message


def test_the_programs_traceback_is_in_the_message() -> None:
    result = run_program(
        "def f(x):\n    return g(x)\ndef g(x):\n    return x['key']\n", tests="assert f({}) == 1"
    )
    assert "line 4, in g\n    return x['key']" in result.message
    assert "KeyError: 'key'" in result.message


def test_all_asserts_are_tried_when_asked_for() -> None:
    tests = "assert add(1, 2) == 4\nassert add(1, 2) == 3\nassert add(1, None) == 3\nassert add(2, 2) == 4"
    result = run_program(ADD, tests=tests, stop_at_failure=False)
    assert result.status == "failed"
    assert "line 1" in result.message
    assert (result.asserts_passed, result.asserts_total) == (2, 4)


def test_an_assert_that_holds_only_sometimes_is_not_counted() -> None:
    tests = "def check(f):\n    for i in range(3):\n        assert f(i, 0) < 2\ncheck(add)"
    result = run_program(ADD, tests=tests, stop_at_failure=False)
    assert (result.passed, result.asserts_passed, result.asserts_total) == (False, 0, 1)


def test_expected_exceptions_arrive() -> None:
    tests = "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'negative'"
    assert run_program("def f(x):\n    raise ValueError('negative')", tests=tests).passed


def test_helpers_of_the_tests_run_outside_the_program() -> None:
    setup = "import math\ndef close(a, b): return math.isclose(a, b)"
    program = "def close(a, b): return True\ndef half(x): return x / 2\n"
    assert run_program(program, setup=setup, tests="assert close(half(1), 0.5)").passed
    assert run_program(program, setup=setup, tests="assert close(half(1), 0.6)").status == "failed"


def test_constants_and_modules_of_the_program_can_be_used_by_the_tests() -> None:
    source = "import math\nLIMIT = [1, 2]\ndef f(x): return x * math.pi"
    assert run_program(source, tests="assert LIMIT == [1, 2] and f(2) == 2 * math.pi").passed


def test_a_function_named_like_a_builtin_is_tested_when_nothing_else_could_be() -> None:
    assert run_program("def sum(a, b): return a * b", tests="assert sum(2, 3) == 6").passed


def test_tests_that_need_the_programs_types_are_unverified() -> None:
    result = run_program(POINT, tests="assert move(Point(1)) == Point(2)")
    assert (result.passed, result.status) == (False, "unverified")
    assert "Point" in result.message


def test_tests_that_need_the_programs_types_can_still_fail() -> None:
    assert run_program(POINT, tests="assert move(Point(1)) == Point(3)").status == "failed"
    assert run_program(POINT, tests="assert move(None) == Point(3)").status == "error"


def test_broken_tests_are_an_error() -> None:
    result = run_program(ADD, tests="assert add(1, 2 == 3")
    assert result.status == "error"
    assert "cannot be used" in result.message
    assert run_program(ADD, tests="import os; os._exit(0)").status == "error"
    assert run_program(ADD, tests="raise SystemExit(0)").status == "error"
    assert run_program(ADD, tests="assert add(1, 2) == 3").passed  # the worker is whole again


def test_without_tests_a_program_passes_by_ending_well() -> None:
    result = run_program("name = input()\nprint('hello', name)", stdin="wörld\n")
    assert (result.status, result.stdout, result.stderr) == ("passed", "hello wörld\n", "")
    assert run_program("import sys\nprint(1)\nsys.exit()").status == "passed"
    assert run_program("import sys\nsys.exit('no')").status == "error"
    assert run_program("if __name__ == '__main__': print('main')").stdout == "main\n"
    failed = run_program("print('before')\n1/0")
    assert (failed.status, failed.stdout) == ("error", "before\n")
    assert "ZeroDivisionError" in failed.stderr


def test_output_is_kept_also_when_tests_run() -> None:
    result = run_program(
        "import sys\ndef f():\n    print('out')\n    print('err', file=sys.stderr)", tests="f()"
    )
    assert (result.passed, result.stdout, result.stderr) == (True, "out\n", "err\n")


def test_a_main_block_does_not_run_under_tests() -> None:
    assert run_program(ADD + "if __name__ == '__main__':\n    1 / 0", tests="assert add(1, 1) == 2").passed


def test_dataclasses_and_other_parts_of_the_library_work() -> None:
    source = """
from __future__ import annotations
import collections, dataclasses, decimal, functools, heapq, itertools, json, re, typing
@dataclasses.dataclass
class Item:
    value: typing.Optional[int] = 3
@functools.lru_cache
def f(x): return Item(x).value
"""
    assert run_program(source, tests="assert f(4) == 4").passed


@pytest.mark.parametrize("limit", [{"timeout_s": 0.0}, {"timeout_s": float("nan")}, {"memory_mib": 8}])
def test_senseless_limits_are_refused(limit: dict[str, float]) -> None:
    with pytest.raises(UserInputError, match=next(iter(limit))):
        run_program("", **limit)  # type: ignore[arg-type]
