"""CodeContests rows, written here in the published form: limits, tests, languages, and real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wmtp.components.data import UnifiedDataLoader
from wmtp.components.evaluator.judging import program_job
from wmtp.evaluation import Task, contest_task
from wmtp.exceptions import DataError
from wmtp.execution import run_programs
from wmtp.settings.recipe_eval import EvalSettings

SUM = "n = int(input())\nprint(sum(map(int, input().split())))\n"


def contest_row(**changes: Any) -> dict[str, Any]:
    """A problem as the published files have it: columns of tests and solutions, a protobuf duration."""
    return {
        "name": "1575_A. Sum of Numbers",
        "description": "Add up n numbers.\r\n\r\nInput\r\n\r\nn, n numbers.\r\n\r\nExample\r\n3\r\n1 2 3",
        "public_tests": {"input": ["3\n1 2 3\n"], "output": ["6\n"]},
        "private_tests": {"input": ["1\n5\n"], "output": ["5 \n"]},
        "generated_tests": {"input": ["2\n-1 1\n", "0\n\n"], "output": ["0\n", "0\n"]},
        "source": 2,
        "difficulty": 7,
        "solutions": {
            "language": [2, 3, 1, 3],
            "solution": ["int main(){}", SUM.replace("\n", "\r\n"), "print input()", SUM + "\n# second\n"],
        },
        "incorrect_solutions": {"language": [3], "solution": ["print(6)"]},
        "cf_contest_id": 1575,
        "time_limit": {"seconds": 2, "nanos": 500000000},
        "memory_limit_bytes": 256000000,
        "input_file": "",
        "output_file": "",
        **changes,
    }


def test_a_row_becomes_a_task_with_all_its_tests_and_its_own_limits() -> None:
    task = contest_task("f:1", contest_row())
    assert task.task_id == "1575_A. Sum of Numbers"
    assert task.prompt.startswith('"""\nAdd up n numbers.\n\nInput')
    assert task.prompt.endswith('1 2 3\n"""\n')
    assert task.cases == (("3\n1 2 3\n", "6\n"), ("1\n5\n", "5 \n"), ("2\n-1 1\n", "0\n"), ("0\n\n", "0\n"))
    assert task.timeout_s == 2.5
    # 256,000,000 bytes are 244.1 MiB; 32 more are the interpreter's.
    assert task.memory_mib == 245 + 32
    assert task.references == (SUM, SUM + "\n# second\n")
    assert (task.form, task.has_tests) == ("program", True)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, None),
        ({"seconds": 0, "nanos": 0}, None),
        ({"seconds": 1}, 1.0),
        (3, 3.0),
        ({"nanos": 5e8}, 0.5),
    ],
)
def test_time_limits_are_read_in_every_published_form(limit: Any, expected: float | None) -> None:
    assert contest_task("r", contest_row(time_limit=limit)).timeout_s == expected


def test_limits_that_the_row_lacks_are_the_settings() -> None:
    row = contest_row(memory_limit_bytes=0)
    del row["time_limit"]
    settings = EvalSettings(timeout_s=3.0, memory_mib=300)
    job = program_job(contest_task("r", row), SUM, settings)
    assert (job.timeout_s, job.memory_mib) == (3.0, 300)
    job = program_job(contest_task("r", contest_row()), SUM, settings)
    assert (job.timeout_s, job.memory_mib) == (2.5, 277)


def test_tests_and_solutions_may_be_lists_of_records() -> None:
    tests = [{"input": "3\n1 2 3\n", "output": "6\n"}]
    solutions = [{"language": "PYTHON3", "solution": SUM}, {"language": "CPP", "solution": "x"}]
    row = contest_row(public_tests=tests, private_tests=[], generated_tests=None, solutions=solutions)
    task = contest_task("r", row)
    assert task.cases == (("3\n1 2 3\n", "6\n"),)
    assert task.references == (SUM,)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"description": ""}, "description"),
        ({"public_tests": {"input": ["1"], "output": []}}, "1 inputs and 0 outputs"),
        ({"public_tests": {"input": "1", "output": "2"}}, "must be lists"),
        ({"public_tests": "3"}, "public_tests"),
        ({"private_tests": {"input": [1], "output": ["2"]}}, "private_tests"),
        ({"solutions": {"language": [3], "solution": [4]}}, "not text"),
        ({"time_limit": "2s"}, "time_limit"),
        ({"time_limit": {"seconds": -1}}, "time_limit.seconds"),
        ({"memory_limit_bytes": "256M"}, "memory_limit_bytes"),
    ],
)
def test_a_bad_field_is_an_error_that_names_it(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        contest_task("r", contest_row(**changes))


def test_problems_that_read_files_cannot_be_judged() -> None:
    assert not contest_task("r", contest_row(input_file="input.txt")).has_tests


def test_every_row_is_a_problem_whatever_languages_solved_it_and_names_that_recur_get_a_number(
    tmp_path: Path,
) -> None:
    unsolved = contest_row(solutions={"language": [2], "solution": ["int main(){}"]})
    path = tmp_path / "code_contests_test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (contest_row(), unsolved)))
    loader = UnifiedDataLoader()
    tasks = loader.load_tasks(str(path))
    assert [task.task_id for task in tasks] == ["1575_A. Sum of Numbers", "1575_A. Sum of Numbers (2)"]
    assert [len(task.references) for task in tasks] == [2, 0]
    # For training there is an example a solution in Python 3.
    assert len(loader.load(str(path), split=None)) == 4


PROGRAMS = {
    "right": (SUM, "passed"),
    "right with other blanks": ("input()\nprint('  ', sum(map(int, input().split())), '\\n\\n')\n", "passed"),
    "right as a decimal": ("input()\nprint(float(sum(map(int, input().split()))))\n", "passed"),
    "wrong on a hidden test": ("n = int(input())\nprint(6 if n == 3 else 5)\n", "failed"),
    "prints more": (SUM + "print(0)\n", "failed"),
    "prints nothing": ("pass\n", "failed"),
    "raises": ("print(int(input()) // 0)\n", "error"),
    "exits early with the answer of the example": ("print(6)\nraise SystemExit\n", "failed"),
    "right, then a bad exit status": (SUM + "raise SystemExit(3)\n", "error"),
    "endless": ("while True: pass\n", "timeout"),
    "too much memory": ("x = bytearray(2**29)\nprint(len(x))\n", "memory"),
    "not Python": ("#include <iostream>\nint main() {}\n", "error"),
}


def test_programs_are_judged_by_what_they_print_for_every_input() -> None:
    row = contest_row(time_limit={"seconds": 1, "nanos": 0})
    task: Task = contest_task("r", row)
    settings = EvalSettings(timeout_s=30.0)
    results = run_programs([program_job(task, source, settings) for source, _ in PROGRAMS.values()])
    statuses = {name: result.status for name, result in zip(PROGRAMS, results, strict=True)}
    assert statuses == {name: expected for name, (_, expected) in PROGRAMS.items()}
