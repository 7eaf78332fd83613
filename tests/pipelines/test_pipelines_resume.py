"""A resumed run equals an uninterrupted one bit for bit; a changed recipe is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_pipelines_matrix import run_cli, train_arguments

from wmtp.tracking import read_metrics

STEPS = "--max-steps"


def _losses(output: Path, run: str) -> dict[int, str]:
    rows = read_metrics(output / "reports" / run / "metrics.jsonl")
    return {int(row["step"]): float(row["train/loss"]).hex() for row in rows if "train/loss" in row}


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("mtp_baseline", marks=pytest.mark.slow),
        "rho1_wmtp_weighted",
        pytest.param("rho1_wmtp_tokenskip", marks=pytest.mark.slow),
        "critic_wmtp",
    ],
)
def test_two_interruptions_leave_losses_and_weights_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    constant = ["--set", "optim.scheduler=constant", "--set", "train.gradient_accumulation_steps=2"]
    whole = train_arguments(recipe, tmp_path, "--run-name", "whole", STEPS, "6", *constant)
    assert run_cli(*whole) == 0
    parts = train_arguments(recipe, tmp_path, *constant)
    assert run_cli(*parts, "--run-name", "parts", STEPS, "2") == 0
    assert run_cli(*parts, "--resume", str(tmp_path / "models/parts"), STEPS, "4") == 0
    assert run_cli(*parts, "--resume", str(tmp_path / "models/parts/step-4"), STEPS, "6") == 0
    assert _losses(tmp_path, "parts") == _losses(tmp_path, "whole")
    for group in ("model", "optimizer"):
        one = load_file(tmp_path / "models/whole/step-6" / f"{group}.safetensors")
        other = load_file(tmp_path / "models/parts/step-6" / f"{group}.safetensors")
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)


def test_a_changed_recipe_is_refused_with_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*train_arguments("mtp_baseline", tmp_path, "--run-name", "run", STEPS, "2")) == 0
    capsys.readouterr()
    changed = train_arguments(
        "mtp_baseline", tmp_path, "--resume", str(tmp_path / "models/run"), "--set", "optim.lr=0.5"
    )
    assert run_cli(*changed) == 2
    assert "optim.lr: 0.001 -> 0.5" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_arguments("mtp_baseline", tmp_path, "--set", "train.save_every_steps=2")
    assert run_cli(*arguments, "--run-name", "run") == 0
    model = tmp_path / "models/run/step-4/model.safetensors"
    damaged = bytearray(model.read_bytes())
    damaged[-1] ^= 1
    model.write_bytes(damaged)
    capsys.readouterr()
    assert run_cli(*arguments, "--resume", str(tmp_path / "models/run")) == 0
    assert "step-4" in capsys.readouterr().err
    assert len(_losses(tmp_path, "run")) == 4
