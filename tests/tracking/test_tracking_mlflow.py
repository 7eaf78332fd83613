"""MLflow on a real SQLite file: what is recorded, resumed, and survived."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import sqlite3
import warnings
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from wmtp.exceptions import CheckpointError, UserInputError
from wmtp.settings import Config
from wmtp.tracking import (
    CompositeTracker,
    TrackingWarning,
    checkpoints_of,
    create_mlflow_manager,
    create_tracker,
    download_model_artifact,
    read_metrics,
    resolve_run_uri,
)
from wmtp.tracking.checkpoint_records import CheckpointRecord, checkpoint_records
from wmtp.tracking.mlflow_tracker import MLflowManager, resolve_registry_uri, resolve_tracking_uri


@pytest.fixture(scope="module")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Making a database takes seconds, so it is made once and copied.
    folder = tmp_path_factory.mktemp("template")
    MLflowManager(str(folder), experiment="template").finish()
    return folder / "mlflow.db"


@pytest.fixture
def store(_template: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "한글 folder"
    folder.mkdir()
    shutil.copy(_template, folder / "mlflow.db")
    return folder


def test_a_run_is_recorded_with_params_metrics_tags_and_artifacts(store: Path, tmp_path: Path) -> None:
    manager = MLflowManager(str(store), experiment="mtp/a/b", run_name="r", tags={"team": "x" * 9000})
    manager.log_params({"loss": {"lambda": 0.5}, "many": {str(i): i for i in range(250)}})
    manager.log_metrics({"train/loss": 2.5, "train/ce_head_0": math.nan, "val/loss": math.inf}, 10)
    manager.log_metrics({"train/loss": 1.5}, 20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/recipe.yaml").write_text("a: 1")
    manager.log_artifact(tmp_path / "out/recipe.yaml", "settings")
    manager.log_artifact(tmp_path / "out", "folder")
    manager.finish()

    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    run = client.get_run(manager.run_id)
    assert client.get_experiment(run.info.experiment_id).name == "mtp/a/b"
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "r"
    assert run.data.params["loss.lambda"] == "0.5"
    assert len(run.data.params) == 251
    assert len(run.data.tags["team"]) == 8000
    assert run.data.tags["wmtp_version"]
    history = client.get_metric_history(manager.run_id, "train/loss")
    assert [(entry.step, entry.value) for entry in history] == [(10, 2.5), (20, 1.5)]
    assert [item.path for item in client.list_artifacts(manager.run_id, "settings")] == [
        "settings/recipe.yaml"
    ]
    assert [item.path for item in client.list_artifacts(manager.run_id, "folder")] == ["folder/recipe.yaml"]
    assert (store / "artifacts" / manager.run_id / "artifacts/settings/recipe.yaml").is_file()


@pytest.mark.parametrize(("status", "shown"), [("failed", "FAILED"), ("interrupted", "KILLED")])
def test_the_end_of_a_run_is_told(store: Path, status: str, shown: str) -> None:
    manager = MLflowManager(str(store), experiment="e")
    manager.finish(status)  # type: ignore[arg-type]
    assert manager.client.get_run(manager.run_id).info.status == shown


def test_a_resumed_run_goes_on_under_its_id_and_says_what_changed(store: Path) -> None:
    first = MLflowManager(str(store), experiment="e")
    first.log_params({"lr": 0.1, "seed": 0})
    first.log_metrics({"x": 1.0}, 1)
    first.finish("interrupted")
    second = MLflowManager(str(store), experiment="e", run_id=first.run_id)
    assert second.run_id == first.run_id
    assert second.client.get_run(first.run_id).info.status == "RUNNING"
    second.log_params({"lr": 0.2, "seed": 0, "new": 1})
    second.log_metrics({"x": 2.0}, 2)
    data = second.client.get_run(first.run_id).data
    assert data.params == {"lr": "0.1", "seed": "0", "new": "1"}
    assert data.tags["changed_params"] == "lr: 0.1 -> 0.2"
    assert len(second.client.get_metric_history(first.run_id, "x")) == 2


def test_a_resume_whose_run_is_gone_starts_a_new_one_and_says_so(store: Path) -> None:
    with pytest.warns(TrackingWarning, match="no run 0123"):
        manager = MLflowManager(str(store), experiment="e", run_id="0123456789abcdef0123456789abcdef")
    assert manager.client.get_run(manager.run_id).data.tags["resumed_from"].startswith("0123")


def test_runs_of_one_experiment_share_it(store: Path) -> None:
    ids = set()
    for _ in range(2):
        manager = MLflowManager(str(store), experiment="shared")
        ids.add(manager.client.get_run(manager.run_id).info.experiment_id)
    assert len(ids) == 1


def test_a_deleted_experiment_is_a_clear_error(store: Path) -> None:
    manager = MLflowManager(str(store), experiment="gone")
    manager.client.delete_experiment(manager.client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(UserInputError, match="is deleted") as caught:
        MLflowManager(str(store), experiment="gone")
    assert "restore" in str(caught.value.remedy)


@pytest.mark.parametrize("name", ["plain", "with space", "한글", "a%20b"])
def test_a_folder_means_sqlite_inside_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    uri, location = resolve_tracking_uri(str(folder))
    assert uri == f"sqlite:///{folder}/mlflow.db"
    assert location == (folder / "artifacts").as_uri()
    assert folder.is_dir()


def test_addresses_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri("sqlite:///mlflow.db")[0] == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_tracking_uri(f"file://{tmp_path}/x")[0] == f"sqlite:///{tmp_path}/x/mlflow.db"
    for server in ("http://127.0.0.1:5000", "postgresql+psycopg2://u@h/db"):
        assert resolve_tracking_uri(server) == (server, None)
    with pytest.raises(UserInputError, match="unknown kind 'ftp'"):
        resolve_tracking_uri("ftp://x/y")


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(UserInputError, match="cannot be used"):
        MLflowManager(str(tmp_path), experiment="e")


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserInputError, match="cannot be made"):
        MLflowManager(str(tmp_path / "file/store"), experiment="e")


def test_a_server_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserInputError, match=r"127\.0\.0\.1:9"):
        MLflowManager("http://127.0.0.1:9", experiment="e")


def test_no_message_shows_the_password_of_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = "http://me:hunter2@127.0.0.1:9"
    tracking = Config.model_validate({"mlflow": {"tracking_uri": address}})
    calls = (
        lambda: MLflowManager(address, experiment="e"),
        lambda: checkpoints_of(tracking, "0" * 32),
        lambda: download_model_artifact(tracking, "models:/m/1", tmp_path),
        lambda: resolve_tracking_uri("ftp://me:hunter2@host/x"),
        lambda: resolve_registry_uri("s3://bucket", address),
    )
    for call in calls:
        with pytest.raises(UserInputError) as caught:
            call()
        assert "hunter2" not in str(caught.value)
        assert "**********@" in str(caught.value)


def test_a_run_that_is_gone_is_told_without_the_password(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = MLflowManager(str(store), experiment="e")
    database = f"sqlite:///{store}/mlflow.db"
    monkeypatch.setattr("wmtp.tracking.lookup.tracking_address", lambda config: f"{database}?token=hunter2")
    monkeypatch.setattr("wmtp.tracking.mlflow_tracker.resolve_tracking_uri", lambda uri: (database, None))
    with pytest.raises(CheckpointError, match=r"has recorded no checkpoint") as caught:
        resolve_run_uri(Config(), f"runs:/{found.run_id}")
    assert "hunter2" not in str(caught.value)
    with pytest.warns(TrackingWarning, match="a new run is started") as warned:
        MLflowManager(f"{store}?token=hunter2", experiment="e", run_id="0" * 32)
    assert "hunter2" not in str(warned[0].message)


def test_usage_reporting_is_off() -> None:
    import os

    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert logging.getLogger("mlflow.store.db.utils").level >= logging.WARNING


def test_a_real_store_that_breaks_in_mid_run_does_not_stop_training(store: Path, tmp_path: Path) -> None:
    tracker = create_tracker(tmp_path / "run", experiment="e", tracking_uri=str(store))
    tracker.log_metrics({"x": 1.0}, 1)
    assert tracker.flush()
    with sqlite3.connect(store / "mlflow.db") as connection:
        connection.execute("DROP TABLE metrics")
    tracker.log_metrics({"x": 2.0}, 2)
    with pytest.warns(TrackingWarning, match="Tracking failed"):
        tracker.flush()
    with pytest.warns(TrackingWarning, match="did not reach"):
        tracker.finish()
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2]


def test_a_resumed_tracker_continues_both_records(store: Path, tmp_path: Path) -> None:
    def create(**options: object) -> CompositeTracker:
        return create_tracker(tmp_path / "run", experiment="e", tracking_uri=str(store), **options)  # type: ignore[arg-type]

    with warnings.catch_warnings():
        warnings.simplefilter("error", TrackingWarning)
        first = create()
        for step in (1, 2, 3):
            first.log_metrics({"x": 1.0}, step)
        first.finish("interrupted")
        second = create(run_id=first.run_id, resume_step=2)
        second.log_metrics({"x": 1.0}, 3)
        second.finish()
    assert second.run_id == first.run_id
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]


def test_a_resume_takes_back_later_steps_and_what_mlflow_shows_as_latest(store: Path) -> None:
    first = MLflowManager(str(store), experiment="e")
    other = MLflowManager(str(store), experiment="e")
    for step in (10, 20, 30):
        first.log_metrics({"x": float(step), "late" if step == 30 else "early": 1.0}, step)
        other.log_metrics({"x": float(step)}, step)
    first.log_metrics({"x": 5.0, "nan": math.nan}, 20)
    resumed = MLflowManager(str(store), experiment="e", run_id=first.run_id, resume_step=20)
    data = resumed.client.get_run(first.run_id).data
    assert math.isnan(data.metrics.pop("nan"))
    assert data.metrics == {"x": 5.0, "early": 1.0}
    resumed.log_metrics({"x": 31.0}, 30)
    history = resumed.client.get_metric_history(first.run_id, "x")
    assert [(entry.step, entry.value) for entry in history] == [(10, 10.0), (20, 20.0), (20, 5.0), (30, 31.0)]
    assert resumed.client.get_run(first.run_id).data.metrics["x"] == 31.0
    assert len(resumed.client.get_metric_history(other.run_id, "x")) == 3, "other runs keep theirs"


def test_metrics_that_mlflow_missed_are_sent_at_a_resume(store: Path, tmp_path: Path) -> None:
    first = create_tracker(tmp_path / "run", experiment="e", tracking_uri=str(store))
    first.log_metrics({"x": 1.0}, 1)
    assert first.flush()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 1767225600.125, "x": 2.0, "y": null, "nonfinite": {"y": "nan"}}\n')
        file.write('{"step": 3, "time": 1767225601.0, "x": 3.0}\n')
    second = create_tracker(
        tmp_path / "run", experiment="e", tracking_uri=str(store), run_id=first.run_id, resume_step=2
    )
    second.finish()
    client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
    history = client.get_metric_history(str(first.run_id), "x")
    assert {(entry.step, entry.value) for entry in history} == {(1, 1.0), (2, 2.0)}
    assert {entry.timestamp for entry in history if entry.step == 2} == {1767225600125}
    assert math.isnan(client.get_metric_history(str(first.run_id), "y")[0].value)


def test_the_same_entry_sent_twice_is_there_once(store: Path) -> None:
    manager = MLflowManager(str(store), experiment="e")
    for _ in range(2):
        manager.log_metrics({"x": 1.0, "y": math.nan, "z": -math.inf}, 7, time_ms=1767225600000)
    for key in "xyz":
        assert len(manager.client.get_metric_history(manager.run_id, key)) == 1


def test_checkpoints_are_recorded_and_found_by_their_run(store: Path) -> None:
    config = Config.model_validate({"mlflow": {"tracking_uri": str(store)}})
    manager = MLflowManager(str(store), experiment="e")
    with pytest.raises(CheckpointError, match="has recorded no checkpoint"):
        resolve_run_uri(config, f"runs:/{manager.run_id}")
    for step, loss in ((2, 0.5), (10, math.nan), (9, 0.25), (2, 0.75)):
        manager.log_checkpoint(CheckpointRecord(step, f"/runs/한글/step-{step}", {"train/loss": loss}, "ab"))
    manager.set_tags({"checkpoints/step_11": "of somebody else", "checkpoints/step_12": "[]"})
    records = checkpoints_of(config, manager.run_id)
    assert [(record.step, record.metrics) for record in records] == [
        (10, {}),
        (9, {"train/loss": 0.25}),
        (2, {"train/loss": 0.75}),
    ]
    assert records[0].manifest_sha256 == "ab"
    expected = [f"/runs/한글/step-{step}" for step in (10, 9, 2)]
    assert resolve_run_uri(config, f"runs:/{manager.run_id}") == expected
    tag = manager.client.get_run(manager.run_id).data.tags["checkpoints/step_9"]
    assert json.loads(tag) == {
        "step": 9,
        "uri": "/runs/한글/step-9",
        "manifest_sha256": "ab",
        "metrics": {"train/loss": 0.25},
    }


def test_a_checkpoint_that_was_moved_keeps_the_metrics_of_its_step(store: Path) -> None:
    manager = MLflowManager(str(store), experiment="e")
    manager.log_checkpoint(CheckpointRecord(2, "/fallback/step-2", {"train/loss": 0.5, "score": 1.0}, "ab"))
    manager.log_checkpoint(CheckpointRecord(2, "s3://runs/step-2", {"score": 1.0}, "cd"))
    expected = CheckpointRecord(2, "s3://runs/step-2", {"train/loss": 0.5, "score": 1.0}, "cd")
    assert manager.checkpoints() == [expected]
    # Saved again, in the same place: what was measured at the older state is not its own.
    manager.log_checkpoint(CheckpointRecord(2, "s3://runs/step-2", {"score": 3.0}, "ef"))
    assert manager.checkpoints() == [CheckpointRecord(2, "s3://runs/step-2", {"score": 3.0}, "ef")]


@pytest.mark.parametrize("uri", ["runs:/", "runs:/a/b", "run", "runs:/" + "0123" * 8])
def test_a_name_of_no_run_is_a_clear_error(store: Path, uri: str) -> None:
    config = Config.model_validate({"mlflow": {"tracking_uri": str(store)}})
    with pytest.raises(CheckpointError, match=re.escape(uri.removeprefix("runs:/") or uri)):
        resolve_run_uri(config, uri)


def test_a_record_always_fits_a_tag() -> None:
    metrics = {f"train/metric_number_{number}": number / 7 for number in range(1000)}
    key, value = CheckpointRecord(3, "s3://bucket/" + "x" * 1000, metrics, "ab" * 32).to_tag()
    assert key == "checkpoints/step_3"
    assert len(value) <= 5000
    record = checkpoint_records({key: value})[0]
    assert len(record.metrics) > 50
    assert record.metrics.items() <= metrics.items()


def test_a_model_is_registered_once_a_run_in_the_registry_that_is_named(store: Path, tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    registry = str(tmp_path / "registry")
    shutil.copytree(store, registry)
    config = Config.model_validate({"mlflow": {"tracking_uri": str(store), "registry_uri": registry}})
    for number in (1, 2):
        manager = MLflowManager(str(store), experiment="e", registry_uri=registry)
        for text in ("first", "second"):
            (tmp_path / "head/value_head.safetensors").write_text(f"{text} {number}")
            manager.log_model("head", tmp_path / "head", "critic/value_head")
        manager.finish()
        tags = manager.client.get_run(manager.run_id).data.tags
        assert tags["model.head"] == f"models:/head/{number}"
        folder = download_model_artifact(config, f"models:/head/{number}", tmp_path / f"got{number}")
        assert (folder / "value_head.safetensors").read_text() == f"second {number}"
    assert len(MlflowClient(registry_uri=f"sqlite:///{registry}/mlflow.db").search_model_versions()) == 2
    assert not MlflowClient(registry_uri=f"sqlite:///{store}/mlflow.db").search_model_versions()


def test_a_config_gives_the_tracker_it_describes(store: Path, tmp_path: Path) -> None:
    config = Config.model_validate({"paths": {"output": str(tmp_path / "runs")}})
    (tmp_path / "runs").mkdir()
    shutil.copytree(store, tmp_path / "runs/mlflow")
    manager = create_mlflow_manager(config)
    assert manager.tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db"
    config = Config.model_validate({"mlflow": {"tracking_uri": str(store)}})
    assert create_mlflow_manager(config, experiment="e").tracking_uri == f"sqlite:///{store}/mlflow.db"
