"""A whole run whose S3 dies in the middle: nothing is lost, and all of it gets to its place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from mlflow.tracking import MlflowClient

from s3_server import S3Server, run_s3_server
from wmtp.components.loader.step_stores import open_fallback_store, open_run_store
from wmtp.components.trainer.callbacks import CheckpointCallback
from wmtp.distributed.checkpoint import list_checkpoints
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.exceptions import StorageError, StorageUnavailableError
from wmtp.pipelines import RunOptions, run_training_pipeline
from wmtp.settings import Config, Recipe
from wmtp.storage import S3Manager

pytestmark = [pytest.mark.s3, pytest.mark.slow]

ResultT = TypeVar("ResultT")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    with run_s3_server(tmp_path / "server") as server:
        yield server


def _recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "train": {
                "algo": "baseline-mtp",
                "max_steps": 4,
                "save_every_steps": 2,
                "log_every_steps": 1,
            },
            "model": {"base_id": "builtin:micro-llama", "mtp": {"horizon": 2}},
            "data": {
                "train": {"sources": ["microcode"], "batch_size": 1, "max_length": 64},
                "microcode": {"num_examples": 40},
            },
            "eval": {"datasets": [], "types": ["perplexity"]},
        }
    )


def _when_it_is_up(call: Callable[[], ResultT]) -> ResultT:
    give_up = time.monotonic() + 60
    while True:
        try:
            return call()
        except StorageError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.5)


def test_a_run_at_its_last_step_is_resumed_and_brings_everything_to_s3(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    s3 = {**server.settings.model_dump(), "deadline_s": 2.0, "fallback_dir": str(tmp_path / "fallback")}
    config = Config.model_validate(
        {
            "s3": s3,
            "paths": {"output": f"s3://{server.bucket}/out", "work": str(tmp_path / "work")},
            "devices": {"accelerator": "cpu", "num_threads": 1},
            "mlflow": {"tracking_uri": tracking},
        }
    )
    uri = f"{config.paths.output}/models/run"
    store, fallback = open_run_store(config, uri), open_fallback_store(config, uri)
    assert fallback is not None
    end = CheckpointCallback.on_step_end

    def end_without_s3(callback: CheckpointCallback, run: Any, result: Any) -> None:
        if run.step == 3:
            callback.saver.wait()
            server.kill()
        end(callback, run, result)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointCallback, "on_step_end", end_without_s3)
        with pytest.raises(StorageUnavailableError):
            run_training_pipeline(config, _recipe(), options=RunOptions(run_name="run"))
    assert [info.step for info in list_checkpoints(fallback)] == [4]
    assert "the last checkpoints are in" in caplog.text

    server.start()
    _when_it_is_up(lambda: S3Manager(config.s3).write_bytes("s3://wmtp/probe", b"x"))
    outputs = run_training_pipeline(config, _recipe(), resume_checkpoint=uri)

    assert outputs.checkpoint == f"{uri}/step-4"
    assert [(info.step, info.sequence) for info in list_checkpoints(store)] == [(2, 1), (4, 2)]
    assert Checkpoint(store, "step-4").problems() == []
    assert list_checkpoints(fallback) == []
    run = MlflowClient(tracking).get_run(str(outputs.mlflow_run_id))
    records = {step: json.loads(run.data.tags[f"checkpoints/step_{step}"]) for step in (2, 4)}
    assert {step: record["uri"] for step, record in records.items()} == {
        step: f"{uri}/step-{step}" for step in (2, 4)
    }
    assert all("train/loss" in record["metrics"] for record in records.values())
