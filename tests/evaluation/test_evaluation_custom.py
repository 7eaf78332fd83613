"""Custom rows as tasks: with tests for pass@k, without for exact match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wmtp.components.data import UnifiedDataLoader
from wmtp.evaluation import assemble_program, custom_task
from wmtp.exceptions import DataError


def test_a_prompt_and_a_completion_ask_for_a_text() -> None:
    task = custom_task("f:1", {"prompt": "1+1=", "completion": "2"})
    assert task is not None
    assert (task.task_id, task.form, task.has_tests, task.references) == ("f:1", "text", False, ("2",))
    assert assemble_program(task, "2\nassert") == "2\nassert"


def test_tests_make_it_a_program() -> None:
    row = {"prompt": "# double\n", "tests": ["assert f(1) == 2", "assert f(2) == g(4)"], "setup": "g = int"}
    task = custom_task("f:1", row | {"task_id": 7})
    assert task is not None
    assert (task.task_id, task.form, task.program_prefix) == ("7", "program", "")
    assert (task.tests, task.setup) == ("assert f(1) == 2\nassert f(2) == g(4)\n", "g = int")
    begun = custom_task("f:1", row | {"prompt": "def f(x):\n", "prompt_is_code": True, "stop": ["\ndef"]})
    assert begun is not None
    assert assemble_program(begun, "    return 2 * x\ndef g") == "def f(x):\n    return 2 * x"


@pytest.mark.parametrize("row", [{"text": "abc"}, {"messages": [{"role": "user", "content": "a"}]}])
def test_rows_without_a_prompt_ask_nothing(row: dict[str, Any]) -> None:
    assert custom_task("f:1", row) is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tests": 3}, "tests"),
        ({"tests": ["a", 1]}, "tests"),
        ({"stop": "x"}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"prompt_is_code": "yes"}, "prompt_is_code"),
        ({"prompt": 1}, "prompt"),
        ({"completion": None}, "completion"),
        ({"setup": []}, "setup"),
    ],
)
def test_a_bad_field_is_an_error_that_names_it(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(DataError, match=field):
        custom_task("f:1", {"prompt": "a", "completion": "b", **changes})


def test_problems_without_an_answer_can_be_asked_and_not_learnt_from(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "# double\n", "tests": "assert f(1) == 2"}, {"prompt": "a", "completion": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = UnifiedDataLoader()
    assert [task.has_tests for task in loader.load_tasks(str(path))] == [True, False]
    assert [example.completion for example in loader.load(str(path))] == ["b"]
