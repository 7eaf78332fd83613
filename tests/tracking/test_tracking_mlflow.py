"""MLflow on a real SQLite file: what is recorded, resumed, and survived."""

from __future__ import annotations

import logging
import math
import shutil
import sqlite3
import warnings
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from wmtp.exceptions import UserInputError
from wmtp.settings import Config
from wmtp.tracking import (
    CompositeTracker,
    TrackingWarning,
    create_mlflow_manager,
    create_tracker,
    read_metrics,
)
from wmtp.tracking.mlflow_tracker import MLflowManager, resolve_tracking_uri


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


def test_a_config_gives_the_tracker_it_describes(store: Path, tmp_path: Path) -> None:
    config = Config.model_validate({"paths": {"output": str(tmp_path / "runs")}})
    (tmp_path / "runs").mkdir()
    shutil.copytree(store, tmp_path / "runs/mlflow")
    manager = create_mlflow_manager(config)
    assert manager.tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db"
    config = Config.model_validate({"mlflow": {"tracking_uri": str(store)}})
    assert create_mlflow_manager(config, experiment="e").tracking_uri == f"sqlite:///{store}/mlflow.db"
