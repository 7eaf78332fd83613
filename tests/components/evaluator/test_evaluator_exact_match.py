"""Exact match: what counts as the reference, and the metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluator_answers import ANSWERS, task

from wmtp.components.evaluator import EvaluatorContext, ExactMatchEvaluator
from wmtp.components.evaluator.exact_match import is_match
from wmtp.components.registry import evaluator_registry
from wmtp.components.tokenizer import HfTokenizer
from wmtp.evaluation import Task, custom_task, mbpp_task
from wmtp.evaluation.records import read_records
from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel
from wmtp.settings.recipe_eval import EvalSettings

CODE = "def double(x):\n    return 2 * x\n"
MBPP = mbpp_task({"task_id": 11, "text": "Double.", "code": CODE, "test_list": ["assert double(1) == 2"]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CODE, True),
        ("\n\n" + CODE.replace("\n", "  \r\n") + "\n", True),
        (CODE + "\nassert double(1) == 2\n", True),
        (f"```python\n{CODE}```", True),
        (CODE + "[DONE]", True),
        (CODE.replace("2 * x", "x * 2"), False),
        (CODE.replace("    ", "  "), False),
        (CODE + "\ndef other(): pass\n", False),
        ("", False),
    ],
)
def test_a_program_matches_up_to_blanks_at_ends(text: str, expected: bool) -> None:
    assert is_match(MBPP, text) is expected


def test_a_text_matches_as_it_is_and_any_reference_will_do() -> None:
    text = custom_task("r", {"prompt": "1+1=", "completion": "2"})
    assert text is not None
    assert is_match(text, "2\n")
    assert not is_match(text, "2 [DONE]")
    several = Task("t", "", "", reference="a", other_references=("b",), form="text")
    assert [is_match(several, each) for each in ("a", "b", "c", "")] == [True, True, False, False]


def run(
    model: MTPModel, tokenizer: HfTokenizer, tasks: dict[str, list[Task]], path: Path | None = None
) -> Any:
    context = EvaluatorContext(model=model, tokenizer=tokenizer, tasks=tasks, output_dir=path)
    return ExactMatchEvaluator(EvalSettings(max_new_tokens=60, num_samples=9, temperatures=[0.8])).run(
        context
    )


def test_the_metric_is_the_share_of_greedy_completions_that_match(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    tasks = [task(name, reference=answer, tests="") for name, answer in ANSWERS.items()]
    tasks[1] = task("wrong", reference="something else")
    result = run(model, tokenizer, {"mbpp": tasks, "own": [*tasks[:1], task("wrong")]}, tmp_path)
    assert result.metrics["mbpp_exact_match"] == pytest.approx(4 / 5)
    assert result.metrics["mbpp_exact_match_ci_low"] < 4 / 5 < result.metrics["mbpp_exact_match_ci_high"]
    assert result.metrics["own_exact_match"] == 1.0
    assert result.notes == ["own: 1 problem(s) have no reference to match; left out."]
    records = [*read_records(tmp_path / "mbpp.exact_match.jsonl")]
    assert [record["matched"] for record in records] == [True, False, True, True, True]
    assert {record["temperature"] for record in records} == {0.0}
    assert records[1]["references"] == ["something else"]


def test_nothing_to_match_is_an_error(model: MTPModel, tokenizer: HfTokenizer) -> None:
    with pytest.raises(UserInputError, match="no problem has a reference"):
        run(model, tokenizer, {"toy": [task("right")]})


def test_the_evaluator_is_found_by_its_key() -> None:
    assert isinstance(evaluator_registry.create("exact-match", EvalSettings()), ExactMatchEvaluator)
