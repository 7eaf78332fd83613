"""Runs whose output is on S3: all of a run is there, and it goes on where the disk has nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from s3_server import S3Server
from wmtp.components.loader.step_stores import find_checkpoint
from wmtp.modeling import MTPModel
from wmtp.pipelines import RunOptions, run_evaluation_pipeline, run_training_pipeline
from wmtp.pipelines.checkpoints import locate_model
from wmtp.pipelines.environment import run_paths
from wmtp.pipelines.remote_output import RemoteOutput
from wmtp.settings import Config, Recipe
from wmtp.storage import S3Manager, publish_directory
from wmtp.tracking import read_metrics


def _config(server: S3Server, prefix: str, work: Path, **s3: Any) -> Config:
    return Config.model_validate(
        {
            "s3": {**server.settings.model_dump(), **s3},
            "paths": {"output": f"s3://{server.bucket}/{prefix}", "work": str(work)},
            "devices": {"accelerator": "cpu", "num_threads": 1},
        }
    )


def _recipe(max_steps: int) -> Recipe:
    return Recipe.model_validate(
        {
            "train": {
                "algo": "baseline-mtp",
                "max_steps": max_steps,
                "save_every_steps": 2,
                "eval_every_steps": 2,
                "keep_best": 1,
                "keep_last": 1,
                "log_every_steps": 1,
            },
            "model": {"base_id": "builtin:micro-llama", "mtp": {"horizon": 2}},
            "data": {
                "train": {"sources": ["microcode"], "batch_size": 1, "max_length": 64},
                "eval": {"sources": ["microcode"], "max_examples": 4},
                "microcode": {"num_examples": 40},
            },
            # So that a longer run begins like a shorter one.
            "optim": {"scheduler": "constant"},
            "eval": {"datasets": [], "types": ["perplexity"]},
        }
    )


def test_a_run_on_s3_goes_on_elsewhere_and_ends_like_one_that_never_stopped(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = _config(s3_server, "whole", tmp_path / "whole")
    expected = run_training_pipeline(whole, _recipe(6), options=RunOptions(run_name="run"))

    first = _config(s3_server, "split", tmp_path / "here")
    begun = run_training_pipeline(first, _recipe(4), options=RunOptions(run_name="run"))
    second = _config(s3_server, "split", tmp_path / "elsewhere")
    ended = run_training_pipeline(second, _recipe(6), resume_checkpoint=f"runs:/{begun.mlflow_run_id}")

    assert ended.mlflow_run_id == begun.mlflow_run_id
    assert ended.checkpoint == f"s3://{s3_server.bucket}/split/models/run/step-6"
    for group in ("model", "optimizer"):
        left, right = (
            find_checkpoint(config, f"{config.paths.output}/models/run").read(group)
            for config in (whole, second)
        )
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    rows = read_metrics(run_paths(second, "run").metrics_file)
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert expected.step == ended.step == 6

    names = {found.key for found in S3Manager(second.s3).list_objects(second.paths.output)}
    for part in (
        "models/run/final/model.safetensors",
        "models/run/tokenizer/tokenizer.json",
        "models/run/latest",
    ):
        assert f"{second.paths.output}/{part}" in names
    assert f"{second.paths.output}/reports/run/report.html" in names
    assert not any(name.endswith("writer.json") for name in names)


def test_models_and_checkpoints_on_s3_are_evaluated_and_loaded_by_their_addresses(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = _config(s3_server, "evaluated", tmp_path / "work")
    outputs = run_training_pipeline(config, _recipe(2), options=RunOptions(run_name="run"))
    recipe = _recipe(2)
    run = f"{config.paths.output}/models/run"
    measured = {}
    for name, path in {
        "run": run,
        "step": f"{run}/step-2",
        "mlflow": f"runs:/{outputs.mlflow_run_id}",
    }.items():
        options = RunOptions(run_name=f"eval-{name}")
        measured[name] = run_evaluation_pipeline(config, recipe, path, options=options).metrics
    assert measured["step"] == measured["mlflow"]
    assert measured["step"]
    assert isinstance(MTPModel.from_pretrained(run_paths(config, "run").export), MTPModel)


def test_the_longer_file_wins_when_a_run_goes_on_and_another_runs_file_never(
    s3_server: S3Server, tmp_path: Path
) -> None:
    config = _config(s3_server, "copied", tmp_path / "work")
    paths = run_paths(config, "run")
    paths.report.mkdir(parents=True)
    paths.metrics_file.write_text("one\ntwo\n")
    remote = RemoteOutput(config, paths)
    remote.mark("mine")
    remote.upload(paths.metrics_file)
    paths.metrics_file.write_text("one\n")
    remote.download(paths.metrics_file, run_id="mine")
    assert paths.metrics_file.read_text() == "one\ntwo\n"
    paths.metrics_file.write_text("one\ntwo\nthree\n")
    remote.download(paths.metrics_file, run_id="mine")
    assert paths.metrics_file.read_text() == "one\ntwo\nthree\n"
    remote.download(paths.metrics_file, run_id="another")
    assert paths.metrics_file.read_text() == "one\ntwo\n"


def test_a_model_on_its_way_to_s3_is_not_taken_for_one(s3_server: S3Server, tmp_path: Path) -> None:
    config = _config(s3_server, "cut", tmp_path / "work")
    paths = run_paths(config, "run")
    manager = S3Manager(config.s3)
    remote = RemoteOutput(config, paths)
    _publish_model(paths.export, b"old")
    remote.upload(paths.export)
    assert locate_model(config, paths.run_uri).path == f"{paths.run_uri}/final"
    before = {found.key: found.modified for found in manager.list_objects(paths.run_uri)}
    remote.upload(paths.export)
    assert before == {found.key: found.modified for found in manager.list_objects(paths.run_uri)}

    _publish_model(paths.export, b"new")
    with _cut_after(1), pytest.raises(InterruptedError):
        remote.upload(paths.export)
    names = {found.key.rpartition("/")[2] for found in manager.list_objects(f"{paths.run_uri}/final/")}
    assert names == {"a.safetensors", "b.safetensors"}
    manager.write_bytes(f"{paths.run_uri}/step-2/manifest.json", b"")
    assert locate_model(config, paths.run_uri).is_training_state
    remote.upload(paths.export)
    assert locate_model(config, paths.run_uri).path == f"{paths.run_uri}/final"
    assert {manager.read_bytes(f"{paths.run_uri}/final/{name}.safetensors")[0] for name in "ab"} == {b"new"}


def _publish_model(folder: Path, content: bytes) -> None:
    with publish_directory(folder, replace=True) as staging:
        for name in ("config.json", "a.safetensors", "b.safetensors"):
            (staging / name).write_bytes(content)


@contextmanager
def _cut_after(num_files: int) -> Iterator[None]:
    """Uploads end after so many files, as if the process had been killed."""
    put, calls = RemoteOutput._put, []

    def counted(self: RemoteOutput, file: Path) -> None:
        if len(calls) == num_files:
            raise InterruptedError
        calls.append(file)
        put(self, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteOutput, "_put", counted)
        yield


def test_a_copy_that_fails_is_a_warning_where_the_run_can_do_without(
    s3_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(s3_server, "refused", tmp_path / "work", secret_access_key="wrong")
    paths = run_paths(config, "run")
    paths.report.mkdir(parents=True)
    paths.metrics_file.write_text("one\n")
    RemoteOutput(config, paths).try_upload(paths.metrics_file)
    assert "was not copied to" in caplog.text
    assert "wrong" not in caplog.text.replace("wrong key", "")
