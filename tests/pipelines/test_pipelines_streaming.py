"""Streamed training through the whole pipeline: exact resume, refusals, and what `auto` chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_pipelines_matrix import CONFIGS, run_cli, train_arguments

from wmtp.components.data import StreamingData, TrainingData
from wmtp.components.tokenizer import HfTokenizer
from wmtp.pipelines.data import prepare_data
from wmtp.settings import ConfigError, load_config, load_recipe
from wmtp.tracking import read_metrics

STEPS = "--max-steps"


def losses(output: Path, run: str) -> dict[int, str]:
    rows = read_metrics(output / "reports" / run / "metrics.jsonl")
    return {int(row["step"]): float(row["train/loss"]).hex() for row in rows if "train/loss" in row}


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "data/rows.jsonl"
    path.parent.mkdir()
    rows = [
        {"prompt": f"# add {n}\n", "completion": f"def add(a):\n    return a + {n}\n" * (1 + n % 3)}
        for n in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def streamed(recipe: str, output: Path, rows_file: Path, *more: str) -> list[str]:
    settings = (
        "data.train.streaming=true",
        "data.train.shuffle_buffer=12",
        f"data.train.sources=[microcode, {rows_file}]",
        "data.microcode.num_examples=40",
        "optim.scheduler=constant",
        "train.gradient_accumulation_steps=2",
    )
    return train_arguments(recipe, output, *(part for key in settings for part in ("--set", key)), *more)


@pytest.mark.parametrize(
    ("recipe", "num_workers"),
    [("mtp_baseline", 2), pytest.param("rho1_wmtp_weighted", 0, marks=pytest.mark.slow)],
)
def test_six_steps_equal_three_and_three_bit_for_bit(
    recipe: str, num_workers: int, tmp_path: Path, rows_file: Path
) -> None:
    arguments = streamed(recipe, tmp_path, rows_file, "--set", f"data.train.num_workers={num_workers}")
    assert run_cli(*arguments, "--run-name", "whole", STEPS, "6") == 0
    assert run_cli(*arguments, "--run-name", "parts", STEPS, "3") == 0
    assert run_cli(*arguments, "--resume", str(tmp_path / "models/parts"), STEPS, "6") == 0
    assert len(losses(tmp_path, "whole")) == 6
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")


def test_a_resume_with_changed_data_is_refused_by_name(
    tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = streamed("mtp_baseline", tmp_path, rows_file)
    assert run_cli(*arguments, "--run-name", "run", STEPS, "2") == 0
    with rows_file.open("a") as file:
        file.write('{"text": "one more"}\n')
    capsys.readouterr()
    assert run_cli(*arguments, "--resume", str(tmp_path / "models/run"), STEPS, "4") == 2
    assert "rows.jsonl: " in capsys.readouterr().err


def test_a_dry_run_of_a_stream_measures_its_first_block(
    tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*streamed("mtp_baseline", tmp_path / "out", rows_file, "--dry-run")) == 0
    assert "not known before it has been read" in capsys.readouterr().out


def prepare(recipe: str, **train: Any) -> Any:
    config = load_config(CONFIGS / "config.local_test.yaml")
    loaded = load_recipe(CONFIGS / f"recipe.{recipe}.yaml")
    changed = loaded.model_copy(
        update={"data": loaded.data.model_copy(update={"train": loaded.data.train.model_copy(update=train)})}
    )
    return prepare_data(config, changed, HfTokenizer({"path": "builtin:micro-llama"}), {})


@pytest.mark.parametrize(
    ("recipe", "train", "is_streamed"),
    [
        ("mtp_baseline", {}, False),
        ("mtp_baseline", {"in_memory_mib": 0}, True),
        ("mtp_baseline", {"in_memory_mib": 0, "streaming": False}, False),
        ("mtp_baseline", {"streaming": True}, True),
        ("critic_wmtp", {"in_memory_mib": 0}, False),
    ],
)
def test_auto_streams_above_the_limit_where_the_algorithm_can(
    recipe: str, train: dict[str, Any], is_streamed: bool
) -> None:
    data = prepare(recipe, **train)
    assert isinstance(data.training_data(), StreamingData if is_streamed else TrainingData)
    assert data.features
    assert data.validation
    assert bool(data.examples) != is_streamed


def test_held_out_rows_of_a_stream_are_not_trained_on(rows_file: Path) -> None:
    loaded = load_recipe(CONFIGS / "recipe.mtp_baseline.yaml")
    held_out_sources = loaded.data.eval.model_copy(update={"sources": [], "max_examples": 5})
    train = loaded.data.train.model_copy(update={"sources": [str(rows_file)], "streaming": True})
    recipe = loaded.model_copy(
        update={"data": loaded.data.model_copy(update={"train": train, "eval": held_out_sources})}
    )
    config = load_config(CONFIGS / "config.local_test.yaml")
    data = prepare_data(config, recipe, HfTokenizer({"path": "builtin:micro-llama"}), {})
    batches = data.training_data()
    seen: set[str] = set()
    for index, batch in enumerate(batches.batches()):
        if batches.epoch_at(index) == 1:
            break
        seen |= {name for row in batch["row_ids"] for name in row}
    held_out = {feature["row_id"] for feature in data.validation}
    assert len(held_out) == 5
    assert not seen & held_out
    assert len(seen) + len(held_out) == 200


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("streaming", "sometimes", "data.train.streaming"),
        ("in_memory_mib", "-1", "data.train.in_memory_mib"),
        ("shuffle_buffer", "0", "data.train.shuffle_buffer"),
    ],
)
def test_settings_of_streams_are_checked(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(CONFIGS / "recipe.mtp_baseline.yaml", overrides=[f"data.train.{key}={value}"])


def test_the_critic_cannot_stream_and_says_why() -> None:
    with pytest.raises(ConfigError, match=r"goes through all examples"):
        load_recipe(CONFIGS / "recipe.critic_wmtp.yaml", overrides=["data.train.streaming=true"])
