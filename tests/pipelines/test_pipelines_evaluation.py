"""`wmtp eval` end to end: benchmarks, checkpoints of every kind, interruptions, bad input."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

from wmtp.cli.app import main
from wmtp.components.loader.builtin import build_micro_llama, micro_tokenizer
from wmtp.evaluation.records import read_records
from wmtp.exceptions import UserInputError
from wmtp.execution import SandboxStatus
from wmtp.modeling import MTPModel
from wmtp.pipelines import RunOptions, run_evaluation_pipeline, run_training_pipeline
from wmtp.pipelines.benchmarks import dataset_labels
from wmtp.settings import Config, Recipe

MBPP = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\n    return x + {number}\n",
        "test_list": [f"assert add(1) == {number + 1}"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for number in (2, 3, 4, 11, 12, 601)
]
CONTEST = [
    {
        "name": "7_A. Echo",
        "description": "Print the number.",
        "public_tests": {"input": ["1\n"], "output": ["1\n"]},
        "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": ["2\n"], "output": ["2\n"]},
        "solutions": {"language": [3], "solution": ["print(input())\n"]},
        "incorrect_solutions": {"language": [3], "solution": ["print(1)\n"]},
        "time_limit": {"seconds": 5, "nanos": 0},
        "memory_limit_bytes": 256000000,
    }
]
CUSTOM = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "# one\n", "tests": "assert one() == 1"}]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database; making one takes seconds, and a file can be copied."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def tracked(tmp_path: Path, database: Path) -> Config:
    """A config whose output has a database already."""
    (tmp_path / "runs/mlflow").mkdir(parents=True)
    shutil.copy(database, tmp_path / "runs/mlflow/mlflow.db")
    return make_config(tmp_path)


def make_config(folder: Path, **datasets: str) -> Config:
    rows = {"mbpp": MBPP, "contest": CONTEST, "custom": CUSTOM}
    for name, fields in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fields))
    paths = {
        "models": {"base": "builtin:micro-llama"},
        "datasets": {
            **{name: str(folder / f"{name}.jsonl") for name in rows},
            "humaneval": "builtin:humaneval",
            **datasets,
        },
        "output": str(folder / "runs"),
    }
    devices = {"accelerator": "cpu", "precision": "fp32", "num_threads": 1}
    return Config.model_validate({"paths": paths, "devices": devices})


def make_recipe(**changes: Any) -> Recipe:
    evaluation = {
        "datasets": ["mbpp"],
        "max_new_tokens": 6,
        "max_problems": 4,
        "batch_size": 2,
        "num_workers": 1,
        "timeout_s": 5,
        "k": [1],
        **changes,
    }
    return Recipe.model_validate(
        {
            "train": {"algo": "baseline-mtp", "max_steps": 1},
            "model": {"mtp": {"horizon": 2}},
            "data": {"train": {"sources": ["microcode"], "max_length": 128}, "eval": {"batch_size": 2}},
            "eval": evaluation,
        }
    )


def save_model(folder: Path, seed: int = 0) -> MTPModel:
    model = MTPModel.from_causal_lm(build_micro_llama(seed), horizon=2)
    with torch.no_grad():
        for parameter in model.extra_heads.parameters():
            parameter.add_(0.01)
    model.save_pretrained(folder, tokenizer=micro_tokenizer())
    return model


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def write_settings(folder: Path, config: Config, recipe: Recipe) -> list[str]:
    (folder / "config.yaml").write_text(config.model_dump_json(by_alias=True))
    (folder / "recipe.yaml").write_text(recipe.model_dump_json(by_alias=True))
    return ["--config", str(folder / "config.yaml"), "--recipe", str(folder / "recipe.yaml")]


def test_every_benchmark_and_type_in_one_evaluation(
    tracked: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(num_samples=5, temperatures=[0.9], k=[1, 5], max_problems=2)
    arguments = write_settings(tmp_path, tracked, recipe)
    arguments += ["--checkpoint", "builtin:micro-llama", "--run-name", "all", "--tags", "mine, yours"]
    arguments += ["--datasets", "mbpp,contest,humaneval,custom,mbpp"]
    arguments += ["--types", "meta-mtp,exact-match,perplexity,token-accuracy", "--verbose"]
    assert run_cli("eval", *arguments) == 0
    printed = capsys.readouterr()
    assert "max_new_tokens: 6" in printed.err
    names = {"mbpp_pass_at_1", "mbpp_pass_at_5", "contest_pass_at_1", "contest_pass_at_5", "custom_pass_at_1"}
    names |= {"humaneval_pass_at_1", "mbpp_exact_match", "custom_exact_match", "contest_exact_match"}
    names |= {"perplexity_head_1", "val/ce_head_0", "token_accuracy_head_1", "acceptance_proxy_head_1"}
    assert all(name in printed.out for name in names)

    report = tmp_path / "runs/reports/all"
    for dataset, problems in {"mbpp": 2, "contest": 1, "humaneval": 2, "custom": 1}.items():
        records = [*read_records(report / f"evaluation/{dataset}.generations.jsonl")]
        assert len(records) == problems * 5
        assert {record["seed"] for record in records} == {0}
    html, markdown = (report / "report.html").read_text(), (report / "report.md").read_text()
    for text in ("In detail: contest", "Perplexity per head", "Exact match", "Accuracy per head"):
        assert text in html
        assert text in markdown
    assert (report / "evaluation/mbpp.page-1.html").is_file()
    # Of the five programs that failed a problem one is shown.
    shown = re.findall(r"^### (.+?) \(all\)", markdown.partition("## Generated programs")[2], re.MULTILINE)
    assert len(set(shown)) == len(shown) == 6

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("mtp/baseline-mtp/mbpp+contest+humaneval+custom")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "all")
    assert {"mine", "yours", "checkpoint"} <= run.data.tags.keys()
    assert names <= run.data.metrics.keys()
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "evaluation")}
    assert {"evaluation/mbpp.generations.jsonl", "evaluation/mbpp.page-1.html"} <= artifacts


def test_three_shots_show_the_models_the_solved_tasks_and_ask_the_test_split(tracked: Config) -> None:
    recipe = make_recipe(mbpp_shots=3)
    outputs = run_evaluation_pipeline(
        tracked, recipe, "builtin:micro-llama", options=RunOptions(run_name="shots")
    )
    assert "mbpp_pass_at_1" in outputs.metrics
    assert outputs.folder is not None
    records = [*read_records(outputs.folder / "mbpp.generations.jsonl")]
    assert [record["task_id"] for record in records] == ["11", "12"]
    assert [record["prompt"].count("[DONE]") for record in records] == [3, 3]
    assert all(record["prompt"].endswith("[BEGIN]\n") for record in records)


def test_a_single_state_dict_evaluates_like_the_export_it_was_saved_from(
    tracked: Config, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "export", seed=3)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "old.pt")
    recipe = make_recipe(types=["meta-mtp", "perplexity"])
    measured = [
        run_evaluation_pipeline(tracked, recipe, str(tmp_path / name), options=RunOptions(run_name=name))
        for name in ("export", "weights.pt", "old.pt")
    ]
    assert measured[0].metrics == measured[1].metrics == measured[2].metrics
    assert "perplexity_head_1" in measured[0].metrics
    completions = [
        [record["completion"] for record in read_records(outputs.folder / "mbpp.generations.jsonl")]
        for outputs in measured
        if outputs.folder is not None
    ]
    assert completions[0] == completions[1] == completions[2]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(temperatures=[0.0, 0.5], num_samples=3)
    arguments = write_settings(tmp_path, make_config(tmp_path), recipe)
    before = sorted(tmp_path.rglob("*"))
    assert run_cli("eval", *arguments, "--checkpoint", "builtin:micro-llama", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "mbpp: problems" in printed
    # Two problems, one greedy program and three sampled ones each.
    assert any(line.split() == ["mbpp:", "programs", "8"] for line in printed.splitlines())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--datasets", "mbp"], ["mbp", "did you mean mbpp"]),
        (["--datasets", ","], ["--datasets", "names nothing"]),
        (["--datasets", "no/such/rows.jsonl"], ["no/such/rows.jsonl"]),
        (["--datasets", "a]: {b"], ["a]: {b"]),
        (["--datasets", "{folder}/empty.jsonl"], ["empty.jsonl", "no usable rows"]),
        (["--datasets", "{folder}/texts.jsonl"], ["texts.jsonl", "no usable rows with tests"]),
        (["--datasets", "{folder}/bad.jsonl"], ["bad.jsonl:2", "time_limit"]),
        (["--types", "pass@k"], ["eval.types", "pass@k", "meta-mtp"]),
        (["--types", " , "], ["--types", "names nothing"]),
        (["--set", "eval.datasets=[]"], ["eval.datasets is empty", "--datasets"]),
        (["--types", "perplexity", "--set", "eval.datasets=[]"], ["no held-out data", "data.eval.sources"]),
        (["--run-name", "a/b"], ["a/b", "folder name"]),
        (["--set", "eval.mbpp_shots=1"], ["eval.mbpp_shots", "3"]),
        (["--set", "eval.min_p=2"], ["eval.min_p"]),
        (["--set", "eval.mbpp_shots=3", "--datasets", "{folder}/few.jsonl"], ["lacks 2, 3, 4"]),
        (["--checkpoint", "no/such/folder/x"], ["no/such/folder/x"]),
        (["--checkpoint", "{folder}/broken.pt"], ["broken.pt"]),
        (["--checkpoint", "runs:/0123"], ["0123"]),
    ],
)
def test_bad_input_is_one_message_exit_2_and_nothing_is_written(
    arguments: list[str],
    expected: list[str],
    tracked: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    common = write_settings(tmp_path, tracked, make_recipe())
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "texts.jsonl").write_text('{"text": "abc"}\n')
    bad = [CONTEST[0], {**CONTEST[0], "time_limit": "two"}]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    (tmp_path / "few.jsonl").write_text(json.dumps(MBPP[3]) + "\n")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 no")
    before = sorted(tmp_path.rglob("*"))
    given = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    if "--checkpoint" not in given:
        given += ["--checkpoint", "builtin:micro-llama"]
    assert run_cli("eval", *common, *given) == 2
    captured = capsys.readouterr()
    for text in expected:
        assert text in captured.err
    assert captured.out == ""
    assert captured.err.count("error:") == 1
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_without_a_sandbox_pass_at_k_exits_2_before_anything_is_written_and_other_types_go_on(
    tracked: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = SandboxStatus(available=False, kind="none", reason="no namespaces", remedy="allow them")
    for module in ("wmtp.pipelines.evaluation", "wmtp.components.evaluator.judging"):
        monkeypatch.setattr(f"{module}.check_sandbox", lambda: status)
    arguments = write_settings(tmp_path, tracked, make_recipe())
    arguments += ["--checkpoint", "builtin:micro-llama", "--run-name", "eval"]
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--dry-run"]):
        assert run_cli("eval", *arguments, *more) == 2
        printed = capsys.readouterr()
        assert "no namespaces" in printed.err
        assert "allow them" in printed.err
        assert sorted(tmp_path.rglob("*")) == before
    assert run_cli("eval", *arguments, "--types", "exact-match") == 0


def kill_when(records: Path, count: int, config: Config, recipe: Recipe, name: str | None) -> None:
    """Evaluate in a process of its own, and kill that when so many records are there."""
    child = os.fork()
    if child == 0:
        try:
            run_evaluation_pipeline(config, recipe, "builtin:micro-llama", options=RunOptions(run_name=name))
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [*records.parent.parent.parent.glob(f"*/evaluation/{records.name}")]
        if found and found[0].read_bytes().count(b"\n") >= count:
            break
        assert os.waitpid(child, os.WNOHANG)[0] == 0, "the evaluation ended before it could be killed"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def kept(folder: Path) -> list[dict[str, Any]]:
    records = read_records(folder / "mbpp.generations.jsonl")
    return [{key: value for key, value in record.items() if key != "wall_s"} for record in records]


@pytest.mark.parametrize("name", [pytest.param("mine", marks=pytest.mark.slow), None])
def test_killed_it_goes_on_in_its_folder_under_its_mlflow_run_and_ends_the_same(
    name: str | None, tracked: Config, tmp_path: Path
) -> None:
    config = tracked
    recipe = make_recipe(num_samples=6, temperatures=[0.8], max_new_tokens=40)
    whole = run_evaluation_pipeline(
        config, recipe, "builtin:micro-llama", options=RunOptions(run_name="whole")
    )
    reports = tmp_path / "runs/reports"
    partial = reports / "x/evaluation/mbpp.generations.partial.jsonl"
    kill_when(partial, 4, config, recipe, name)
    kill_when(partial, 6, config, recipe, name)
    if name is not None:
        with pytest.raises(UserInputError, match=r"something else:\n  eval.seed: 0 -> 1"):
            run_evaluation_pipeline(
                config,
                make_recipe(num_samples=6, temperatures=[0.8], max_new_tokens=40, seed=1),
                "builtin:micro-llama",
                options=RunOptions(run_name=name),
            )
    outputs = run_evaluation_pipeline(
        config, recipe, "builtin:micro-llama", options=RunOptions(run_name=name)
    )
    assert outputs.metrics == whole.metrics
    assert outputs.folder is not None
    assert whole.folder is not None
    assert kept(outputs.folder) == kept(whole.folder)
    assert {folder.name for folder in reports.iterdir()} == {"whole", outputs.run_name}
    state = json.loads((reports / str(outputs.run_name) / "evaluation.json").read_text())
    assert state["finished"] is True
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("mtp/baseline-mtp/mbpp")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == sorted(["whole", str(outputs.run_name)])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert state["mlflow_run_id"] in {run.info.run_id for run in runs}
    # Once it is finished, its name is taken, and the same command without a name measures anew.
    with pytest.raises(UserInputError, match="already has results"):
        run_evaluation_pipeline(
            config, recipe, "builtin:micro-llama", options=RunOptions(run_name=outputs.run_name)
        )


def test_ctrl_c_exits_4_and_says_how_to_go_on(
    tracked: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = write_settings(tmp_path, tracked, make_recipe(num_samples=6, temperatures=[0.8]))
    arguments += ["--checkpoint", "builtin:micro-llama", "--run-name", "stopped"]
    partial = tmp_path / "runs/reports/stopped/evaluation/mbpp.generations.partial.jsonl"
    child = os.fork()
    if child == 0:
        # An interrupt that arrives in a callback of the collector (a test library has one) is dropped.
        gc.disable()
        try:
            os._exit(run_cli("eval", *arguments))
        finally:
            os._exit(99)
    deadline = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, signal.SIGINT)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 4
    printed = capfd.readouterr().err
    assert "--run-name stopped" in printed
    assert "Traceback" not in printed
    assert run_cli("eval", *arguments) == 0


@pytest.mark.slow
def test_a_training_run_killed_while_it_evaluates_goes_on_with_the_evaluation(
    tracked: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(num_samples=20, temperatures=[0.8], datasets=["mbpp"])
    whole = run_training_pipeline(tracked, recipe, options=RunOptions(run_name="whole"))
    partial = tmp_path / "runs/reports/run/evaluation/mbpp.generations.partial.jsonl"
    child = os.fork()
    if child == 0:
        try:
            run_training_pipeline(tracked, recipe, options=RunOptions(run_name="run"))
        finally:
            os._exit(0)
    while not partial.exists() or partial.read_bytes().count(b"\n") < 4:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    caplog.set_level("INFO")
    resumed = run_training_pipeline(tracked, recipe, resume_checkpoint=str(tmp_path / "runs/models/run"))
    assert "of 40 completions are there already" in caplog.text
    name = "mbpp_pass_at_1"
    assert resumed.metrics[name] == whole.metrics[name]
    reports = tmp_path / "runs/reports"
    assert kept(reports / "run/evaluation") == kept(reports / "whole/evaluation")


def test_an_evaluation_that_is_running_is_not_joined(tracked: Config, tmp_path: Path) -> None:
    config, recipe = tracked, make_recipe(num_samples=6, temperatures=[0.8])
    partial = tmp_path / "runs/reports/x/evaluation/mbpp.generations.partial.jsonl"
    kill_when(partial, 2, config, recipe, "busy")
    with open(tmp_path / "runs/reports/busy/.evaluation.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserInputError, match="another process is running"):
            run_evaluation_pipeline(
                config, recipe, "builtin:micro-llama", options=RunOptions(run_name="busy")
            )
        outputs = run_evaluation_pipeline(config, recipe, "builtin:micro-llama")
        assert outputs.run_name != "busy"


def test_labels_of_datasets_are_short_and_unique() -> None:
    sources = [
        "mbpp",
        "data/own rows.jsonl.gz",
        "s3://bucket/own rows.jsonl",
        "builtin:humaneval",
        "/x/mbpp/",
    ]
    assert dataset_labels(sources) == ["mbpp", "own_rows", "own_rows_2", "humaneval", "mbpp_2"]
