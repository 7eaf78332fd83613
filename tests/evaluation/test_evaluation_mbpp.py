"""MBPP: the authors' few-shot prompt, splits, and every reference through it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wmtp.components.data import UnifiedDataLoader
from wmtp.evaluation import assemble_program, few_shot_tasks, mbpp_task
from wmtp.exceptions import DataError

MBPP_FILE = Path(__file__).parents[3] / "shared" / "data" / "mbpp" / "mbpp.jsonl"


def row(task_id: int, **changes: Any) -> dict[str, Any]:
    return {
        "task_id": task_id,
        "text": f"Write a function f{task_id}.",
        "code": f"def f{task_id}(x):\r\n  return x + {task_id}\r\n",
        "test_list": [f"assert f{task_id}(0) == {task_id}", f"assert f{task_id}(1) == {task_id + 1}"],
        "test_setup_code": "",
        **changes,
    }


def sanitized(task_id: int) -> dict[str, Any]:
    fields = row(task_id)
    fields["prompt"] = fields.pop("text")
    return {**fields, "test_imports": []}


@pytest.mark.parametrize("kind", [row, sanitized])
def test_the_few_shot_prompt_is_the_authors_to_the_letter(kind: Any) -> None:
    shown = [mbpp_task(kind(task_id)) for task_id in range(1, 11)]
    (task,) = few_shot_tasks([mbpp_task(kind(11))], shown)
    expected = "".join(
        "You are an expert Python programmer, and here is your task: "
        f"Write a function f{number}. Your code should pass these tests:\n\n"
        f"assert f{number}(0) == {number}\nassert f{number}(1) == {number + 1}\n[BEGIN]\n"
        + (f"def f{number}(x):\n  return x + {number}\n[DONE]\n\n" if number < 11 else "")
        for number in (2, 3, 4, 11)
    )
    assert task.prompt == expected
    assert task.tests == mbpp_task(kind(11)).tests
    assert "[DONE]" in task.stop


def test_a_missing_example_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match="lacks 3, 4") as caught:
        few_shot_tasks([mbpp_task(row(11))], [mbpp_task(row(2))])
    assert "mbpp_shots: 0" in str(caught.value.remedy)


def test_tasks_of_a_split_are_those_of_the_published_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in (1, 10, 11, 510, 511, 600, 601)))
    loader = UnifiedDataLoader()
    ids = {
        split: [task.task_id for task in loader.load_tasks(str(path), split=split)]  # type: ignore[arg-type]
        for split in ("prompt", "test", "validation", "train")
    }
    assert ids == {
        "prompt": ["1", "10"],
        "test": ["11", "510"],
        "validation": ["511", "600"],
        "train": ["601"],
    }
    assert [task.task_id for task in loader.load_tasks(str(path), limit=1)] == ["11"]


def test_every_mbpp_reference_survives_both_prompts_and_a_fence() -> None:
    if not MBPP_FILE.exists():
        pytest.skip("the MBPP file is not here")
    loader = UnifiedDataLoader()
    tasks = loader.load_tasks(str(MBPP_FILE), split=None)
    shots = few_shot_tasks(tasks, loader.load_tasks(str(MBPP_FILE), split="prompt"))
    assert len(tasks) == 974
    assert len(loader.load_tasks(str(MBPP_FILE))) == 500
    for task, shot in zip(tasks, shots, strict=True):
        assert assemble_program(task, task.reference) == task.reference
        assert assemble_program(shot, f"{task.reference}[DONE]\n\nYou are") == task.reference
        assert assemble_program(task, f"Here:\n```python\n{task.reference}```\n") == task.reference
        assert assemble_program(task, f"{task.reference}\nThis is how it works.\n").strip() == (
            task.reference.strip()
        )
