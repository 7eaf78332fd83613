"""pass@k end to end: a tiny Llama that knows a few answers by heart, the real sandbox, the saved verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluator_answers import ANSWERS, EXPECTED_STATUS, TESTS, task
from transformers import GPT2Config, LlamaConfig

from wmtp.components.evaluator import EvaluatorContext, MetaMtpEvaluator
from wmtp.components.evaluator.generating import context_length, problem_key
from wmtp.components.registry import evaluator_registry
from wmtp.components.tokenizer import HfTokenizer
from wmtp.decoding import generate
from wmtp.evaluation import Task, assemble_program
from wmtp.evaluation.tasks import HUMANEVAL_STOP
from wmtp.exceptions import SandboxUnavailableError, UserInputError
from wmtp.execution import SandboxStatus, run_program
from wmtp.modeling import MTPModel
from wmtp.settings.recipe_eval import EvalSettings


def settings(**changes: Any) -> EvalSettings:
    return EvalSettings(**{"max_new_tokens": 60, "timeout_s": 2.0, "num_workers": 2, **changes})


def evaluate(
    model: MTPModel,
    tokenizer: HfTokenizer,
    tasks: dict[str, list[Task]],
    *,
    path: Path | None = None,
    **changes: Any,
) -> Any:
    context = EvaluatorContext(model=model, tokenizer=tokenizer, tasks=tasks, output_dir=path)
    return MetaMtpEvaluator(settings(**changes)).run(context)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pass_at_1_counts_the_programs_that_return_right_values(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    tasks = [task(name) for name in EXPECTED_STATUS]
    result = evaluate(model, tokenizer, {"microcode": tasks}, path=tmp_path)
    assert result.metrics["microcode_pass_at_1"] == 0.25
    assert 0.0 <= result.metrics["microcode_pass_at_1_ci_low"] <= 0.25
    assert 0.25 <= result.metrics["microcode_pass_at_1_ci_high"] <= 1.0
    greedy = result.datasets["microcode"].temperatures[0]
    assert greedy.statuses == {"passed": 1, "failed": 1, "error": 1, "timeout": 1}
    assert {p.task_id: next(iter(p.statuses)) for p in greedy.problems} == EXPECTED_STATUS
    assert [problem.num_correct for problem in greedy.problems] == [1, 0, 0, 0]


def test_saved_generations_let_every_verdict_be_checked(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    tasks = {name: task(name) for name in ("right", "wrong", "broken")}
    result = evaluate(
        model,
        tokenizer,
        {"microcode": list(tasks.values())},
        path=tmp_path / "eval",
        temperatures=[0.8],
        num_samples=3,
        seed=5,
    )
    path = result.datasets["microcode"].generations
    assert path == tmp_path / "eval" / "microcode.generations.jsonl"
    lines = read_lines(path)
    assert [(line["task_id"], line["sample"]) for line in lines] == [(n, s) for n in tasks for s in range(3)]
    for line in lines:
        again = generate(
            model.causal_lm,
            [tokenizer.encode_prompt(line["prompt"])],
            tokenizer=tokenizer.tokenizer,
            max_new_tokens=line["max_new_tokens"],
            temperature=line["temperature"],
            top_k=line["top_k"],
            top_p=line["top_p"],
            seed=line["seed"],
            keys=[(line["problem_key"], line["sample"])],
        )[0]
        assert (again.text, again.token_ids) == (line["completion"], line["token_ids"])
        verdict = run_program(assemble_program(tasks[line["task_id"]], line["completion"]), tests=TESTS)
        assert (verdict.passed, verdict.status) == (line["passed"], line["status"])
        assert line["isolation"] == "bubblewrap"


def test_a_grid_reports_the_first_temperature_and_the_best(model: MTPModel, tokenizer: HfTokenizer) -> None:
    tasks = [task("right"), task("wrong"), task("broken")]
    result = evaluate(
        model, tokenizer, {"toy": tasks}, temperatures=[2.0, 0.01, 2.0], num_samples=2, k=[1, 2, 10], top_k=20
    )
    hot, cold = result.datasets["toy"].temperatures
    assert (hot.temperature, cold.temperature) == (2.0, 0.01)
    assert cold.pass_at[1].mean == pytest.approx(1 / 3)
    assert hot.pass_at[1].mean < cold.pass_at[1].mean
    metrics = result.metrics
    assert metrics["toy_pass_at_1"] == hot.pass_at[1].mean
    assert metrics["toy_pass_at_1_best"] == cold.pass_at[1].mean
    assert metrics["toy_pass_at_1_best_temperature"] == 0.01
    assert metrics["toy_pass_at_2_best"] == pytest.approx(1 / 3)
    assert not any("pass_at_10" in name for name in metrics)
    assert any("pass@10 left out" in note for note in result.notes)


def test_greedy_writes_one_program_a_problem_and_has_no_pass_at_2(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    result = evaluate(
        model,
        tokenizer,
        {"toy": [task("right")]},
        path=tmp_path,
        num_samples=5,
        k=[1, 2],
        temperatures=[0.0, 0.5],
    )
    lines = read_lines(tmp_path / "toy.generations.jsonl")
    assert [line["temperature"] for line in lines] == [0.0] + [0.5] * 5
    assert "toy_pass_at_2" not in result.metrics
    assert "toy_pass_at_2_best" in result.metrics


def test_a_problem_draws_the_same_in_a_subset_and_in_another_batch(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    tasks = [task(name) for name in ("right", "wrong", "broken")]
    changes: dict[str, Any] = {"temperatures": [1.5], "num_samples": 2, "max_new_tokens": 12}
    evaluate(model, tokenizer, {"toy": tasks}, path=tmp_path / "all", **changes)
    evaluate(model, tokenizer, {"toy": tasks[2:0:-1]}, path=tmp_path / "some", batch_size=1, **changes)
    texts = [
        {(line["task_id"], line["sample"]): line["completion"] for line in read_lines(path)}
        for path in (tmp_path / "all" / "toy.generations.jsonl", tmp_path / "some" / "toy.generations.jsonl")
    ]
    assert texts[1] == {key: text for key, text in texts[0].items() if key[0] != "right"}
    assert len(set(texts[0].values())) > 3


def test_every_task_stops_at_its_own_strings(model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path) -> None:
    tasks = [task("right"), task("right", task_id="cut", stop=(" * x",)), task("wrong", stop=("return",))]
    result = evaluate(model, tokenizer, {"toy": tasks}, path=tmp_path)
    lines = read_lines(tmp_path / "toy.generations.jsonl")
    assert [line["completion"] for line in lines] == [
        ANSWERS["right"],
        "def f(x):\n    return 2",
        "def f(x):\n    ",
    ]
    assert [line["finish_reason"] for line in lines] == ["eos", "stop", "stop"]
    assert [p.num_correct for p in result.datasets["toy"].temperatures[0].problems] == [1, 0, 0]


def test_an_answer_in_a_fence_is_written_to_its_end_though_stop_strings_stand_in_it(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    tasks = [task("right", stop=HUMANEVAL_STOP), task("fenced", stop=HUMANEVAL_STOP, entry_point="f")]
    result = evaluate(model, tokenizer, {"toy": tasks}, path=tmp_path)
    lines = read_lines(tmp_path / "toy.generations.jsonl")
    assert lines[1]["completion"] == ANSWERS["fenced"]
    assert lines[1]["program"] == "\n    pass\n\n" + ANSWERS["right"]
    assert result.datasets["toy"].temperatures[0].statuses["error"] == 1
    begun = task(
        "fenced", prompt="fenced:\n", program_prefix="def f(x):", stop=HUMANEVAL_STOP, entry_point="f"
    )
    assert evaluate(model, tokenizer, {"toy": [begun]}).metrics["toy_pass_at_1"] == 1.0


def test_contests_are_also_reported_at_five_and_run_on_their_inputs(
    model: MTPModel, tokenizer: HfTokenizer
) -> None:
    # The model answers with a function; a line before it makes it a program that reads and prints.
    prefix = "import atexit\natexit.register(lambda: print(f(int(input()))))\n"
    cases = (("3\n", "6\n"), ("0\n", " 0"))
    tasks = [
        task(name, tests="", cases=cases, program_prefix=prefix, benchmark="contest", form="program")
        for name in ("right", "wrong")
    ]
    settings = {"num_samples": 10, "temperatures": [1e-9], "k": [1]}
    result = evaluate(model, tokenizer, {"contest": tasks}, **settings)
    for k in (1, 5, 10):
        assert result.metrics[f"contest_pass_at_{k}"] == 0.5
    assert result.datasets["contest"].temperatures[0].statuses == {"passed": 10, "failed": 10}


def test_problems_without_tests_are_left_out_and_noted(model: MTPModel, tokenizer: HfTokenizer) -> None:
    tasks = {"own": [task("right"), task("text", tests="")], "texts": [task("text", tests="")]}
    result = evaluate(model, tokenizer, tasks)
    assert result.metrics["own_pass_at_1"] == 1.0
    assert "texts" not in result.datasets
    assert [note for note in result.notes if "no tests" in note] == [
        "own: 1 problem(s) have no tests that can be run; left out.",
        "texts: 1 problem(s) have no tests that can be run; left out.",
    ]


def test_a_prompt_longer_than_the_context_fails_its_problem_and_nothing_else(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path
) -> None:
    tasks = [task("right"), task("long", prompt="abc xyz " * 200)]
    result = evaluate(model, tokenizer, {"toy": tasks}, path=tmp_path)
    assert read_lines(tmp_path / "toy.generations.jsonl")[1]["token_ids"] == []
    assert [p.num_correct for p in result.datasets["toy"].temperatures[0].problems] == [1, 0]


def test_setup_and_program_prefix_reach_the_run(model: MTPModel, tokenizer: HfTokenizer) -> None:
    tasks = [
        task(
            "right", tests="assert f(three) == helper(3)\n", setup="three = 3\ndef helper(x): return 2 * x\n"
        ),
        task("right", task_id="prefixed", tests="assert g() == 4\n", program_prefix="def g(): return f(2)\n"),
    ]
    result = evaluate(model, tokenizer, {"toy": tasks})
    assert result.metrics["toy_pass_at_1"] == 1.0


def test_nothing_is_generated_or_written_where_no_sandbox_works(
    model: MTPModel, tokenizer: HfTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = SandboxStatus(available=False, kind="none", reason="no namespaces", remedy="allow them")
    monkeypatch.setattr("wmtp.components.evaluator.judging.check_sandbox", lambda: status)
    seen: list[str] = []
    context = EvaluatorContext(
        model=model,
        tokenizer=tokenizer,
        tasks={"toy": [task("right")]},
        output_dir=tmp_path / "eval",
        on_progress=lambda stage, done, total: seen.append(stage),
    )
    with pytest.raises(SandboxUnavailableError, match="no namespaces") as caught:
        MetaMtpEvaluator(settings()).run(context)
    assert caught.value.remedy == "allow them"
    assert seen == []
    assert not (tmp_path / "eval").exists()


def test_progress_counts_every_generation_and_every_run(model: MTPModel, tokenizer: HfTokenizer) -> None:
    seen: list[tuple[str, int, int]] = []
    context = EvaluatorContext(
        model=model,
        tokenizer=tokenizer,
        tasks={"toy": [task("right"), task("wrong", stop=("\n\n",))]},
        on_progress=lambda *progress: seen.append(progress),
    )
    MetaMtpEvaluator(settings()).run(context)
    assert seen == [
        ("toy: generate at temperature 0", 1, 2),
        ("toy: generate at temperature 0", 2, 2),
        ("toy: run programs", 1, 2),
        ("toy: run programs", 2, 2),
    ]


@pytest.mark.parametrize("tasks", [{}, {"toy": []}])
def test_evaluation_without_tasks_is_an_error(
    tasks: dict[str, list[Task]], model: MTPModel, tokenizer: HfTokenizer
) -> None:
    with pytest.raises(UserInputError, match="no tasks"):
        evaluate(model, tokenizer, tasks)


def test_tests_that_need_the_programs_own_types_do_not_pass_and_are_noted(
    model: MTPModel, tokenizer: HfTokenizer
) -> None:
    prefix = "class Node:\n    pass\n"
    tasks = [task("right", tests="assert isinstance(Node(), Node)\n", program_prefix=prefix)]
    result = evaluate(model, tokenizer, {"toy": tasks})
    assert result.metrics["toy_pass_at_1"] == 0.0
    assert any("unverified" in note for note in result.notes)


def test_problem_keys_differ_between_datasets_and_problems_and_never_change() -> None:
    assert len({problem_key(d, t) for d in ("a", "b") for t in ("0", "1", "10")}) == 6
    assert problem_key("humaneval", "HumanEval/0") == 10951995312185403392


def test_context_length_is_read_under_every_familys_name() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=55)) == 55


def test_evaluators_are_found_by_their_keys() -> None:
    assert {"meta-mtp", "perplexity", "token-accuracy"} <= set(evaluator_registry.keys())
    assert isinstance(evaluator_registry.create("meta-mtp", settings()), MetaMtpEvaluator)


def test_an_interval_without_width_is_explained(model: MTPModel, tokenizer: HfTokenizer) -> None:
    result = evaluate(
        model,
        tokenizer,
        {"none": [task("wrong")], "all": [task("right")], "some": [task("right"), task("wrong")]},
    )
    notes = [note for note in result.notes if "no width" in note]
    assert [note.partition(":")[0] for note in notes] == ["none", "all"]
    # 0.05 = (1 - p) ^ 1 at p = 0.95.
    assert all("may still be 95.0% away" in note for note in notes)
