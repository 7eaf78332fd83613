"""An evaluation killed in the middle goes on; what was measured otherwise is not used."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluator_answers import task

from wmtp.components.evaluator import (
    EvaluationResult,
    EvaluatorContext,
    ExactMatchEvaluator,
    MetaMtpEvaluator,
    model_fingerprint,
)
from wmtp.components.evaluator.generating import SampleFiles
from wmtp.components.tokenizer import HfTokenizer
from wmtp.evaluation.records import read_records, write_records
from wmtp.modeling import MTPModel
from wmtp.settings.recipe_eval import EvalSettings

TASKS = [task("right"), task("wrong"), task("broken"), task("right", task_id="cut", stop=(" * x",))]
# What a second run of the same program measures anew.
TIMES = ("wall_s",)


def settings(**changes: Any) -> EvalSettings:
    return EvalSettings(
        **{
            "max_new_tokens": 30,
            "timeout_s": 5.0,
            "num_workers": 1,
            "batch_size": 3,
            "num_samples": 4,
            "temperatures": [0.0, 0.9],
            "k": [1, 2],
            **changes,
        }
    )


def evaluate(
    model: MTPModel, tokenizer: HfTokenizer, folder: Path, **changes: Any
) -> tuple[EvaluationResult, list[str]]:
    """The result, and the stages that had anything to do, once for each thing done."""
    stages: list[str] = []
    context = EvaluatorContext(
        model=model,
        tokenizer=tokenizer,
        tasks={"toy": TASKS},
        output_dir=folder,
        on_progress=lambda stage, done, total: stages.append(stage),
    )
    return MetaMtpEvaluator(settings(**changes)).run(context), stages


def kept(folder: Path) -> list[dict[str, Any]]:
    """The result file without times."""
    records = read_records(SampleFiles(folder=folder, dataset="toy").judged)
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def run_and_kill(work: Callable[[], object], is_time: Callable[[], bool]) -> bool:
    """Do the work in a process of its own and kill that when it is time; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ended, _ = os.waitpid(child, os.WNOHANG)
        if ended:
            return False
        if is_time():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.001)
    raise AssertionError("the evaluation did not end")


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_seeded_moments_it_ends_as_if_left_alone(
    seed: int, model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    whole, _ = evaluate(model, tokenizer, tmp_path / "whole")
    files = SampleFiles(folder=tmp_path / "killed", dataset="toy")
    source = random.Random(seed)
    num_killed = 0
    for path, growth in (
        (files.generations, 5),
        (files.generations, 4),
        (files.verdicts, 2),
        (files.verdicts, 3),
    ):
        goal = num_lines(path) + source.randint(1, growth)

        def is_time(path: Path = path, goal: int = goal) -> bool:
            return num_lines(path) >= goal and source.random() < 0.3

        before = num_lines(files.generations)
        num_killed += run_and_kill(lambda: evaluate(model, tokenizer, files.folder), is_time)
        assert num_lines(files.generations) >= before or files.judged.exists()
    assert num_killed >= 3
    resumed, stages = evaluate(model, tokenizer, files.folder)
    assert resumed.metrics == whole.metrics
    assert kept(files.folder) == kept(tmp_path / "whole")
    assert len(stages) < len(TASKS) * 5 * 2
    assert [path.name for path in files.folder.iterdir()] == [files.judged.name]


def test_an_evaluation_that_ended_is_not_repeated(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    first, _ = evaluate(model, tokenizer, tmp_path)
    before = kept(tmp_path)
    again, stages = evaluate(model, tokenizer, tmp_path)
    assert (again.metrics, stages) == (first.metrics, [])
    assert kept(tmp_path) == before
    # More samples are more work, but only as much as there is to do.
    _, stages = evaluate(model, tokenizer, tmp_path, num_samples=5)
    assert stages.count("toy: generate at temperature 0.9") == len(TASKS)
    assert "toy: generate at temperature 0" not in stages


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"max_new_tokens": 29}],
)
def test_other_settings_do_not_use_what_was_generated_before(
    changes: dict[str, Any],
    model: MTPModel,
    tokenizer: HfTokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    evaluate(model, tokenizer, tmp_path / "one")
    fresh, _ = evaluate(model, tokenizer, tmp_path / "fresh", **changes)
    result, stages = evaluate(model, tokenizer, tmp_path / "one", **changes)
    assert stages.count("toy: generate at temperature 0.9") == len(TASKS) * 4
    assert "20 recorded completions are of another model, prompt or settings" in caplog.text
    assert result.metrics == fresh.metrics
    assert kept(tmp_path / "one") == kept(tmp_path / "fresh")


def test_another_model_does_not_use_what_was_generated_before(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    evaluate(model, tokenizer, tmp_path / "one")
    weight = model.causal_lm.get_input_embeddings().weight
    original = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3, 3] += 1e-3
        fingerprint = model_fingerprint(model)
        _, stages = evaluate(model, tokenizer, tmp_path / "one")
    finally:
        with torch.no_grad():
            weight.copy_(original)
    assert fingerprint != model_fingerprint(model)
    assert sum(stage.startswith("toy: generate") for stage in stages) == len(TASKS) * 5


def test_a_batch_that_is_recorded_in_part_is_generated_whole_and_the_same(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    evaluate(model, tokenizer, tmp_path / "whole")
    files = SampleFiles(folder=tmp_path / "part", dataset="toy")
    records = [*read_records(SampleFiles(folder=tmp_path / "whole", dataset="toy").judged)]
    greedy = [record for record in records if record["temperature"] == 0]
    write_records(files.generations, greedy[:1])
    with open(files.generations, "ab") as file:
        file.write(json.dumps(greedy[1]).encode()[:-7])
    _, stages = evaluate(model, tokenizer, files.folder)
    # One of the first batch of three is there, so two were counted; the other group of stop strings has one.
    assert stages.count("toy: generate at temperature 0") == len(TASKS) - 1
    assert kept(files.folder) == kept(tmp_path / "whole")


def test_verdicts_reached_without_a_sandbox_are_not_taken_over(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    evaluate(model, tokenizer, tmp_path)
    files = SampleFiles(folder=tmp_path, dataset="toy")
    forged = [
        {**record, "isolation": "process-limits", "passed": True} for record in read_records(files.judged)
    ]
    write_records(files.judged, forged)
    result, stages = evaluate(model, tokenizer, tmp_path)
    assert "toy: run programs" in stages
    assert result.metrics["toy_pass_at_1"] == 0.25


def test_equal_programs_of_a_problem_run_once_and_count_each(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    result, stages = evaluate(model, tokenizer, tmp_path, temperatures=[1e-9])
    assert stages.count("toy: generate at temperature 1e-09") == len(TASKS) * 4
    assert stages.count("toy: run programs") == len({record["program"] for record in kept(tmp_path)}) == 4
    assert [each.num_correct for each in result.datasets["toy"].temperatures[0].problems] == [4, 0, 0, 0]


def test_exact_match_and_pass_at_k_share_greedy_completions(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    tasks = [task(name, reference="def f(x):\n    return 2 * x\n") for name in ("right", "wrong")]
    stages: list[str] = []
    context = EvaluatorContext(
        model=model,
        tokenizer=tokenizer,
        tasks={"toy": tasks},
        output_dir=tmp_path,
        on_progress=lambda stage, done, total: stages.append(stage),
    )
    both = settings(temperatures=[0.0])
    assert ExactMatchEvaluator(both).run(context).metrics["toy_exact_match"] == 0.5
    MetaMtpEvaluator(both).run(context)
    assert stages.count("toy: generate at temperature 0") == 2
