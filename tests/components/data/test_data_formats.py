"""Rows are known by their fields; what cannot be used is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from wmtp.components.data.examples import Example
from wmtp.components.data.formats import FORMATS, mbpp_split, missing_fields, recognise
from wmtp.exceptions import DataError

MBPP_FULL = {
    "task_id": 601,
    "text": "Write a function to add.",
    "code": "def add(a, b):\r\n    return a + b",
    "test_list": ["assert add(1, 2) == 3"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MBPP_SANITIZED = {
    "task_id": 2,
    "prompt": "Write a function to add.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3"],
    "test_imports": ["import math"],
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}
CONTEST = {
    "description": "Print the sum.",
    "solutions": {
        "language": [2, 3, 1, 3],
        "solution": ["int main(){}", "print(1)", "print 1", "print(2)\r\n"],
    },
    "incorrect_solutions": {"language": [3, 4], "solution": ["print(0)", "class A {}"]},
    "time_limit": {"seconds": 1},
}


def name_of(fields: dict[str, Any]) -> str | None:
    row_format = recognise(fields)
    return None if row_format is None else row_format.name


def examples(fields: dict[str, Any]) -> list[Example]:
    row_format = recognise(fields)
    assert row_format is not None
    return row_format.convert("f:1", fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (MBPP_FULL, "MBPP"),
        (MBPP_SANITIZED, "MBPP"),
        (HUMANEVAL, "HumanEval"),
        ({key: value for key, value in HUMANEVAL.items() if key != "task_id"}, "HumanEval"),
        (CONTEST, "CodeContests"),
        ({"text": "a", "other": 1}, "custom"),
        ({"prompt": "a", "completion": "b"}, "custom"),
        ({"messages": []}, "custom"),
        ({"prompt": "a"}, None),
        ({"task_id": 1, "prompt": "a", "test": "b"}, None),
        ({}, None),
    ],
)
def test_rows_are_recognised_by_their_fields(fields: dict[str, Any], name: str | None) -> None:
    assert name_of(fields) == name


def test_a_row_of_no_known_form_is_told_what_is_there_and_what_is_accepted() -> None:
    problem, remedy = missing_fields({"question": "a", "answer": "b"}, None)
    assert "found answer, question" in problem
    for row_format in FORMATS:
        for form in row_format.forms:
            assert " + ".join(form) in remedy


@pytest.mark.parametrize("row", [MBPP_FULL, MBPP_SANITIZED])
def test_mbpp_rows_become_a_task_with_its_reference(row: dict[str, Any]) -> None:
    (example,) = examples(row)
    assert "Write a function to add." in example.prompt
    assert "assert add(1, 2) == 3" in example.prompt
    assert example.completion == "def add(a, b):\n    return a + b\n"
    assert example.task is not None
    assert example.task.prompt == example.prompt
    assert example.row_id == "f:1"


@pytest.mark.parametrize(
    ("task_id", "split"),
    [
        (1, "prompt"),
        (10, "prompt"),
        (11, "test"),
        (510, "test"),
        (511, "validation"),
        (600, "validation"),
        (601, "train"),
        (974, "train"),
    ],
)
def test_mbpp_splits_are_the_published_ones(task_id: int, split: str) -> None:
    assert mbpp_split({"task_id": task_id}) == split


def test_an_mbpp_row_without_a_number_has_no_split() -> None:
    with pytest.raises(DataError, match="'x'"):
        mbpp_split({"task_id": "x"})


def test_humaneval_rows_continue_their_prompt() -> None:
    (example,) = examples(HUMANEVAL)
    assert example.prompt == HUMANEVAL["prompt"]
    assert example.completion == HUMANEVAL["canonical_solution"]
    assert example.task is not None
    assert example.task.task_id == "HumanEval/0"


def test_contest_rows_give_one_example_per_python3_solution_with_its_reward() -> None:
    found = [(example.row_id, example.completion, example.reward) for example in examples(CONTEST)]
    assert found == [
        ("f:1#solutions[1]", "print(1)\n", 1.0),
        ("f:1#solutions[3]", "print(2)\n", 1.0),
        ("f:1#incorrect_solutions[0]", "print(0)\n", -1.0),
    ]
    records = [{"language": "PYTHON3", "solution": "print(1)"}, {"language": "CPP", "solution": "x"}]
    assert [e.completion for e in examples({"description": "d", "solutions": records})] == ["print(1)\n"]


def test_custom_rows_keep_reward_and_weights() -> None:
    (plain,) = examples({"text": "abc", "reward": 0, "weight": 2})
    assert (plain.prompt, plain.completion, plain.reward, plain.weight) == ("", "abc", 0.0, 2.0)
    (pair,) = examples({"prompt": "ab", "completion": "cd", "weights": [1, 0.5]})
    assert (pair.prompt, pair.completion, pair.reward, pair.weight) == ("ab", "cd", None, [1.0, 0.5])
    (spans,) = examples(
        {"prompt": "ab", "completion": "cd", "weights": [{"start": 1, "end": 4, "weight": 3}]}
    )
    assert spans.weight == [{"start": 1.0, "end": 4.0, "weight": 3.0}]


def test_chat_rows_keep_roles_contents_and_weights() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "weight": 0}]
    (example,) = examples({"messages": turns})
    assert example.messages == ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    assert example.weight == [1.0, 0.0]


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ""}, "'text' is empty"),
        ({"text": 3}, "'text' must be text; got 3"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"text": "a", "reward": "good"}, "'reward' must be a finite number; got 'good'"),
        ({"text": "a", "reward": float("nan")}, "'reward' must be a finite number"),
        ({"text": "a", "weight": -1}, "must not be negative"),
        ({"text": "a", "weight": 1, "weights": [1]}, "both weight and weights"),
        ({"text": "a", "weights": []}, "empty list"),
        ({"text": "a", "weights": [1, "x"]}, r"weights\[1\]"),
        ({"text": "abc", "weights": [{"start": 0, "end": 4, "weight": 1}]}, "not inside the text of 3"),
        ({"text": "abc", "weights": [{"start": 2, "end": 2, "weight": 1}]}, "not inside the text"),
        ({"text": "abc", "weights": [{"start": 0.5, "end": 2, "weight": 1}]}, "not inside the text"),
        ({"text": "abc", "weights": [{"start": 0, "end": 2}]}, "start, end and weight"),
        (
            {
                "text": "abc",
                "weights": [{"start": 1, "end": 3, "weight": 1}, {"start": 0, "end": 2, "weight": 1}],
            },
            "overlaps",
        ),
        ({"messages": []}, "non-empty list"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] must have a role and a text"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "role 'robot'"),
        ({"messages": [USER, ASSISTANT], "weights": [1]}, "one number per message"),
        ({"messages": [USER, {**ASSISTANT, "weight": 1}], "weight": 1}, "for the row and in its messages"),
        ({**CONTEST, "solutions": {"language": [3], "solution": []}}, "1 languages and 0 solutions"),
        ({**CONTEST, "solutions": "x"}, "must hold language and solution"),
        ({**CONTEST, "solutions": [{"language": 3, "solution": None}]}, "not text"),
        ({**MBPP_FULL, "test_list": []}, "non-empty list of asserts"),
    ],
)
def test_rows_that_cannot_be_used_say_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples(fields)
