"""Every shipped test recipe through the command line: dry and real, one head and four."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wmtp.cli.app import main
from wmtp.modeling import MTPModel
from wmtp.tracking import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = ("mtp_baseline", "critic_wmtp", "rho1_wmtp_weighted", "rho1_wmtp_tokenskip")


def run_cli(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def train_arguments(recipe: str, output: Path, *more: str) -> list[str]:
    """Arguments of `wmtp train` on a shipped test recipe."""
    return [
        "train",
        "--config",
        str(CONFIGS / "config.local_test.yaml"),
        "--recipe",
        str(CONFIGS / f"recipe.{recipe}.yaml"),
        "--set",
        f"paths.output={output}",
        *more,
    ]


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_builds_everything_and_writes_nothing(
    recipe: str,
    horizon: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = train_arguments(
        recipe, tmp_path / "out", "--set", f"model.mtp.horizon={horizon}", "--dry-run"
    )
    assert run_cli(*arguments) == 0
    printed = capsys.readouterr().out
    assert f"(2, 128, {horizon})" in printed
    assert "peak memory" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_real_run_trains_evaluates_reports_and_exports(recipe: str, horizon: int, tmp_path: Path) -> None:
    arguments = train_arguments(
        recipe, tmp_path, "--set", f"model.mtp.horizon={horizon}", "--run-name", "run", "--tags", "a,b"
    )
    assert run_cli(*arguments) == 0
    history = read_metrics(tmp_path / "reports/run/metrics.jsonl")
    training = [row for row in history if "train/loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3, 4]
    assert all(f"train/ce_head_{head}" in training[0] for head in range(horizon))
    assert f"train/ce_head_{horizon}" not in training[0]
    assert {"train/lr", "train/grad_norm", "train/tokens_per_second", "train/mfu"} <= training[0].keys()
    if recipe != "mtp_baseline":
        assert training[0]["train/weight_mean"] == pytest.approx(1.0, abs=1e-5)
    assert any("microcode_pass_at_1" in row for row in history)
    generations = (tmp_path / "reports/run/evaluation/microcode.generations.jsonl").read_text().splitlines()
    assert len(generations) == 4
    assert {"completion", "status", "seed", "isolation"} <= json.loads(generations[0]).keys()
    report = (tmp_path / "reports/run/report.html").read_text()
    assert "train.algo" in report or "algo:" in report
    assert (tmp_path / "reports/run/report.md").is_file()
    export = tmp_path / "models/run/final"
    plain = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = torch.tensor([tokenizer("def f(xs):\n")["input_ids"]])
    loaded = MTPModel.from_pretrained(export)
    assert loaded.horizon == horizon
    assert torch.equal(plain(ids).logits, loaded(ids).logits()[:, :, 0])
    assert (tmp_path / "models/run/step-4/manifest.json").is_file()
    assert (tmp_path / "mlflow/mlflow.db").is_file()


def test_mlflow_has_the_experiment_the_settings_and_the_report(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    arguments = train_arguments("mtp_baseline", tmp_path, "--run-name", "run", "--tags", "mine")
    assert run_cli(*arguments, "--trust-remote-code") == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("mtp/baseline-mtp/microcode")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["model.mtp.horizon"] == "4"
    # What only the command line may allow is on record with the run.
    assert (run.data.tags["mine"], run.data.tags["trust_remote_code"]) == ("true", "true")
    assert "unsafe_execution" not in run.data.tags
    assert "train/ce_head_3" in run.data.metrics
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "metrics.jsonl", "config.yaml", "recipe.yaml"} <= names


@pytest.mark.parametrize("what", ["run folder", "step", "export"])
def test_eval_takes_a_run_folder_a_step_and_an_export(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*train_arguments("mtp_baseline", tmp_path, "--run-name", "run")) == 0
    checkpoint = {
        "run folder": tmp_path / "models/run",
        "step": tmp_path / "models/run/step-4",
        "export": tmp_path / "models/run/final",
    }[what]
    arguments = train_arguments(
        "mtp_baseline", tmp_path, "--checkpoint", str(checkpoint), "--run-name", "eval"
    )
    capsys.readouterr()
    assert (
        run_cli(
            "eval",
            *arguments[1:],
            "--types",
            "meta-mtp,perplexity,token-accuracy",
            "--set",
            "data.eval.sources=[microcode]",
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "microcode_pass_at_1" in printed
    assert "perplexity_head_3" in printed
    assert "token_accuracy_head_0" in printed
    assert (tmp_path / "reports/eval/report.html").is_file()


def test_a_checkpoint_is_evaluated_with_the_heads_it_has_and_a_step_can_be_a_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_arguments("mtp_baseline", tmp_path, "--run-name", "run")
    assert run_cli(*arguments, "--set", "model.mtp={horizon: 3, head: medusa, offsets: [1, 2, 5]}") == 0
    # The recipe of the evaluation says nothing of the form of the heads.
    same_horizon = ("--set", "model.mtp.horizon=3", "--set", "data.eval.sources=[microcode]")
    for checkpoint in ("models/run/final", "models/run/step-4"):
        evaluation = train_arguments("mtp_baseline", tmp_path, "--checkpoint", str(tmp_path / checkpoint))
        name = checkpoint.replace("/", "-")
        types = ("--types", "perplexity", "--run-name", name)
        assert run_cli("eval", *evaluation[1:], *types, *same_horizon) == 0
        assert "perplexity_head_2" in capsys.readouterr().out
    base = ("--set", f"paths.models.base={tmp_path / 'models/run/step-4'}")
    heads = ("--set", "model.mtp={horizon: 3, head: medusa, offsets: [1, 2, 5]}")
    tokenizer = ("--set", "model.tokenizer.path=builtin:micro-llama")
    validation = train_arguments("mtp_baseline", tmp_path)[1:]
    assert run_cli("validate", *validation, *base, *heads, *tokenizer) == 0
    printed = capsys.readouterr().out
    assert "3 heads (medusa)" in printed
    following = train_arguments("mtp_baseline", tmp_path, "--run-name", "next")
    assert run_cli(*following, *base, *heads, *tokenizer) == 0


def test_a_second_run_of_the_same_name_is_refused_and_the_first_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_arguments("mtp_baseline", tmp_path, "--run-name", "run")
    assert run_cli(*arguments) == 0
    before = (tmp_path / "reports/run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run_cli(*arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "reports/run/metrics.jsonl").read_bytes() == before
