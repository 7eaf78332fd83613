"""A run that diverges: exit code 3, a report, a failed MLflow run, and checkpoints that are unharmed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pipelines_matrix import run_cli, train_arguments

# The first update throws every matrix so far out that the next forward overflows.
DIVERGING = ("--set", "optim.lr=1e30", "--set", "optim.warmup_steps=0", "--set", "train.save_every_steps=1")


@pytest.mark.parametrize("recipe", ["mtp_baseline", "rho1_wmtp_weighted"])
def test_a_run_that_diverges_exits_3_with_a_report_and_a_failed_run(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    assert run_cli(*train_arguments(recipe, tmp_path, "--run-name", "run", *DIVERGING)) == 3
    printed = capsys.readouterr().err
    report = tmp_path / "reports/run/nonfinite.json"
    assert "step 2: the cross entropy of heads [0, 1, 2, 3] is NaN or infinite in micro-batch 0" in printed
    assert str(report) in printed
    assert "Traceback" not in printed
    (step,) = json.loads(report.read_text())["steps"]
    assert step["step"] == 2
    row_ids = [row_id for row in step["findings"][0]["row_ids"] for row_id in row]
    assert row_ids
    assert all(row_id.startswith("microcode") for row_id in row_ids)
    # The step that ends the run is never saved, so a resume does not go on as if it had not been.
    assert [path.name for path in (tmp_path / "models/run").glob("step-*")] == ["step-1"]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert run.info.status == "FAILED"
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert "nonfinite.json" in artifacts


def test_skipping_has_a_bound_that_a_resume_does_not_reset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skipping = ("--set", "train.on_nonfinite=skip", "--set", "train.max_nonfinite_steps=2")
    start = ("--run-name", "run", "--set", "optim.scheduler=constant", *DIVERGING, *skipping)
    # Steps 2 and 3 are skipped, which is still allowed.
    assert run_cli(*train_arguments("mtp_baseline", tmp_path, *start, "--max-steps", "3")) == 0
    capsys.readouterr()
    resume = ("--resume", str(tmp_path / "models/run"), *start[2:], "--max-steps", "6")
    assert run_cli(*train_arguments("mtp_baseline", tmp_path, *resume)) == 3
    assert "3 steps in a row" in capsys.readouterr().err
    # Skipped steps are steps: their checkpoints differ in nothing that learns.
    first, third = (load_model(tmp_path / f"models/run/step-{step}") for step in (2, 3))
    assert first.keys() == third.keys()
    assert all(torch.equal(first[name], third[name]) for name in first)


def load_model(step: Path) -> dict[str, torch.Tensor]:
    """All model tensors of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(step.glob("model*.safetensors")):
        tensors.update(load_file(file))
    return tensors
