"""Tracking on S3, with a real server: every run has its own database, and one has them all."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import zstandard
from alembic import command
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase
from mlflow.tracking import MlflowClient
from pydantic import SecretStr
from sqlalchemy import create_engine

from s3_server import S3Server
from wmtp.exceptions import (
    CheckpointError,
    ModelLoadError,
    StorageConflictError,
    StorageDamagedError,
    StorageError,
    UserInputError,
)
from wmtp.settings import Config
from wmtp.storage import S3Manager
from wmtp.tracking import (
    ObjectStore,
    TrackingWarning,
    checkpoints_of,
    create_mlflow_manager,
    create_tracker,
    download_model_artifact,
    resolve_run_uri,
)
from wmtp.tracking.checkpoint_records import CheckpointRecord
from wmtp.tracking.merging import is_database, merge_run
from wmtp.tracking.mlflow_tracker import MLflowManager
from wmtp.tracking.run_database import (
    RunDatabase,
    copy_database,
    pack_database,
    run_key,
    unpack_database,
)
from wmtp.tracking.s3_tracking import S3Tracking
from wmtp.tracking.shared_database import SharedDatabase

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def _empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def _quick(_empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making MLflow's tables takes 1.6 s, so it is done once and copied; processes make their own."""
    create = RunDatabase.__init__

    def create_with_tables(self: RunDatabase, store: ObjectStore, prefix: str) -> None:
        create(self, store, prefix)
        shutil.copy(_empty, self.path)

    monkeypatch.setattr(RunDatabase, "__init__", create_with_tables)


@pytest.fixture
def storage(s3_server: S3Server) -> S3Manager:
    return S3Manager(s3_server.settings)


@pytest.fixture
def prefix(s3_server: S3Server) -> str:
    return f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/한글 tracking"


def _manager(storage: S3Manager, prefix: str, **options: object) -> MLflowManager:
    options = {"experiment": "mtp/a/b", **options}
    return MLflowManager(prefix, open_store=lambda: storage, **options)  # type: ignore[arg-type]


@contextmanager
def _all_runs(storage: S3Manager, prefix: str) -> Iterator[MlflowClient]:
    """What a user does: download `mlflow.db` and point MLflow at it."""
    content, _ = storage.read_bytes(f"{prefix}/mlflow.db")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        path.write_bytes(content)
        yield MlflowClient(tracking_uri=f"sqlite:///{path}")


def _run_ids(client: MlflowClient) -> set[str]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_id for run in client.search_runs(experiments)}


def test_the_shared_database_has_all_runs_with_all_they_logged(storage: S3Manager, prefix: str) -> None:
    ids = []
    for number, experiment in enumerate(["mtp/a/b", "mtp/c/d", "mtp/a/b"]):
        manager = _manager(storage, prefix, experiment=experiment, run_name=f"r{number}")
        manager.log_params({"lr": number})
        for step in (1, 2):
            manager.log_metrics({"train/loss": number + step / 3}, step)
        manager.set_tags({"number": str(number)})
        manager.finish("failed" if number == 1 else "finished")
        ids.append(manager.run_id)

    with _all_runs(storage, prefix) as client:
        assert _run_ids(client) == set(ids)
        names = []
        for number, run_id in enumerate(ids):
            run = client.get_run(run_id)
            names.append(client.get_experiment(run.info.experiment_id).name)
            assert run.info.run_name == f"r{number}"
            assert run.info.status == ("FAILED" if number == 1 else "FINISHED")
            assert run.data.params == {"lr": str(number)}
            assert run.data.tags["number"] == str(number)
            assert run.data.metrics["train/loss"] == number + 2 / 3
            history = client.get_metric_history(run_id, "train/loss")
            assert [(entry.step, entry.value) for entry in history] == [
                (1, number + 1 / 3),
                (2, number + 2 / 3),
            ]
        assert names == ["mtp/a/b", "mtp/c/d", "mtp/a/b"]
        assert len({experiment.name for experiment in client.search_experiments()}) == 3  # and "Default"


def test_a_runs_database_and_folder_are_as_documented(storage: S3Manager, prefix: str) -> None:
    manager = _manager(storage, prefix)
    local = Path(manager.client.tracking_uri.removeprefix("sqlite:///"))
    assert local.is_file()
    manager.finish()
    assert not local.parent.exists(), "the working copy goes with the run"
    keys = [stored.key.removeprefix(f"{prefix}/") for stored in storage.list_objects(f"{prefix}/")]
    assert keys == ["mlflow.db", f"runs/{manager.run_id}/mlflow.db.zst"]
    content, _ = storage.read_bytes(run_key(prefix, manager.run_id))
    # Any decompressor passes over the frame with the digest.
    with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as reader:
        assert is_database(reader.read())


def test_a_run_is_published_at_the_start_with_checkpoints_and_at_intervals(
    storage: S3Manager, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def published() -> dict[str, object]:
        content, _ = storage.read_bytes(run_key(prefix, manager.run_id))
        with closing(sqlite3.connect(":memory:")) as database:
            database.deserialize(unpack_database(content, ""))
            steps = [row[0] for row in database.execute("SELECT step FROM metrics ORDER BY step")]
            status = database.execute("SELECT status FROM runs").fetchone()[0]
        return {"steps": steps, "status": status}

    now = 1000.0
    monkeypatch.setattr("wmtp.tracking.s3_tracking.time.monotonic", lambda: now)
    manager = _manager(storage, prefix)
    assert published() == {"steps": [], "status": "RUNNING"}
    manager.log_metrics({"x": 1.0}, 1)
    now += 59
    manager.log_metrics({"x": 1.0}, 2)
    assert published()["steps"] == []
    now += 2
    manager.log_metrics({"x": 1.0}, 3)
    assert published()["steps"] == [1, 2, 3]
    manager.log_metrics({"x": 1.0}, 4)
    assert published()["steps"] == [1, 2, 3]
    manager.log_checkpoint(CheckpointRecord(4, "/a", {}, "00"))
    assert published()["steps"] == [1, 2, 3, 4]
    manager.log_metrics({"x": 1.0}, 5)
    manager.finish()
    assert published() == {"steps": [1, 2, 3, 4, 5], "status": "FINISHED"}


def test_a_resumed_run_fetches_its_database_and_has_each_step_once(
    storage: S3Manager, prefix: str, tmp_path: Path
) -> None:
    def create(**options: object) -> object:
        return create_tracker(
            tmp_path / "run",
            experiment="e",
            tracking_uri=prefix,
            open_store=lambda: storage,
            **options,  # type: ignore[arg-type]
        )

    first = create()
    first.log_params({"lr": 1})  # type: ignore[attr-defined]
    for step in range(1, 6):
        first.log_metrics({"x": float(step)}, step)  # type: ignore[attr-defined]
        if step == 3:
            first.log_checkpoint(3, uri="/c/step-3", metrics={}, manifest_sha256="00")  # type: ignore[attr-defined]
    first.finish("interrupted")  # type: ignore[attr-defined]
    second = create(run_id=first.run_id, resume_step=3)  # type: ignore[attr-defined]
    for step in range(4, 7):
        second.log_metrics({"x": step + 0.5}, step)  # type: ignore[attr-defined]
    second.finish()  # type: ignore[attr-defined]
    assert second.run_id == first.run_id  # type: ignore[attr-defined]
    with _all_runs(storage, prefix) as client:
        run = client.get_run(first.run_id)  # type: ignore[attr-defined]
        history = client.get_metric_history(first.run_id, "x")  # type: ignore[attr-defined]
        assert [(entry.step, entry.value) for entry in history] == [
            (1, 1.0),
            (2, 2.0),
            (3, 3.0),
            (4, 4.5),
            (5, 5.5),
            (6, 6.5),
        ]
        assert run.info.status == "FINISHED"
        assert run.data.metrics["x"] == 6.5
        assert run.data.params == {"lr": "1"}


def test_metrics_that_never_left_a_killed_machine_come_from_the_local_file(
    storage: S3Manager, prefix: str, tmp_path: Path
) -> None:
    tracker = create_tracker(tmp_path, experiment="e", tracking_uri=prefix, open_store=lambda: storage)
    for step in range(1, 5):
        tracker.log_metrics({"x": float(step)}, step)
    # As kill -9 leaves it: the lines are on the disk, the database was not published since the start.
    resumed = create_tracker(
        tmp_path,
        experiment="e",
        tracking_uri=prefix,
        run_id=tracker.run_id,
        resume_step=3,
        open_store=lambda: storage,
    )
    resumed.log_metrics({"x": 4.5}, 4)
    resumed.finish()
    with _all_runs(storage, prefix) as client:
        history = client.get_metric_history(str(tracker.run_id), "x")
    assert [(entry.step, entry.value) for entry in history] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5)]


_WRITER = """
import sys
from wmtp.settings.config import S3Settings
from wmtp.storage import S3Manager
from wmtp.tracking import create_tracker
settings, prefix, name, folder = sys.argv[1:]
store = S3Manager(S3Settings.model_validate_json(settings))
tracker = create_tracker(folder, experiment=f"mtp/{name[0]}/x", tracking_uri=prefix, run_name=name,
                         open_store=lambda: store)
print("ready", flush=True)
sys.stdin.readline()
for step in range(50):
    tracker.log_metrics({"train/loss": step / 7}, step)
    if step % 10 == 0:
        tracker.log_checkpoint(step, uri=f"/{name}/step-{step}", metrics={}, manifest_sha256="00")
        assert tracker.flush()
tracker.finish()
print(tracker.run_id, flush=True)
"""


def test_processes_that_write_to_one_prefix_at_the_same_time_all_survive(
    s3_server: S3Server, storage: S3Manager, prefix: str, tmp_path: Path
) -> None:
    settings = json.dumps(
        {
            "endpoint_url": s3_server.endpoint_url,
            "bucket": s3_server.bucket,
            "access_key_id": s3_server.access_key,
            "secret_access_key": s3_server.secret_key,
        }
    )
    names = ["a1", "b1"]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, settings, prefix, name, str(tmp_path / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n", writer.communicate()[1]
    ids = []
    outputs = []
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        outputs.append(writer.communicate(timeout=60))
    for writer, (stdout, stderr) in zip(writers, outputs, strict=True):
        assert writer.returncode == 0, stderr
        assert "TrackingWarning" not in stderr
        ids.append(stdout.strip())
    with _all_runs(storage, prefix) as client:
        assert _run_ids(client) == set(ids)
        for name, run_id in zip(names, ids, strict=True):
            run = client.get_run(run_id)
            assert run.info.run_name == name
            assert run.info.status == "FINISHED"
            assert client.get_experiment(run.info.experiment_id).name == f"mtp/{name[0]}/x"
            history = client.get_metric_history(run_id, "train/loss")
            assert [entry.step for entry in history] == list(range(50))
            assert sum(key.startswith("checkpoints/") for key in run.data.tags) == 5


@pytest.mark.parametrize("is_first", [True, False])
def test_a_write_in_between_is_not_lost(
    storage: S3Manager, prefix: str, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    if not is_first:
        _manager(storage, prefix).finish()
    first = _manager(storage, prefix)
    second = _manager(storage, prefix)
    write = S3Manager.write_bytes
    conflicts = []

    def write_after_another(self: S3Manager, key: str, *arguments: object, **options: object) -> str:
        if key.endswith("mlflow.db") and not conflicts:
            conflicts.append(options)
            second.finish()
        return write(self, key, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(S3Manager, "write_bytes", write_after_another)
    first.finish()
    assert conflicts[0]["if_absent"] == is_first  # type: ignore[call-overload]
    with _all_runs(storage, prefix) as client:
        assert {client.get_run(manager.run_id).info.status for manager in (first, second)} == {"FINISHED"}


def test_a_second_process_with_the_same_run_is_refused(storage: S3Manager, prefix: str) -> None:
    first = _manager(storage, prefix)
    second = _manager(storage, prefix, run_id=first.run_id)
    second.log_metrics({"x": 2.0}, 2)
    second.log_checkpoint(CheckpointRecord(2, "/second", {}, "00"))
    first.log_metrics({"x": 1.0}, 1)
    with pytest.raises(StorageConflictError, match="another process writes"):
        first.log_checkpoint(CheckpointRecord(1, "/first", {}, "00"))
    second.finish()
    with _all_runs(storage, prefix) as client:
        assert [entry.value for entry in client.get_metric_history(first.run_id, "x")] == [2.0]


@pytest.mark.parametrize("damage", ["missing", "cut", "noise", "no tables"])
def test_a_lost_shared_database_is_made_anew_from_the_runs(
    storage: S3Manager, prefix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = _manager(storage, prefix, experiment="one")
    first.log_metrics({"x": 1.0}, 1)
    first.finish()
    key = f"{prefix}/mlflow.db"
    content, _ = storage.read_bytes(key)
    if damage == "missing":
        storage.delete([key])
    else:
        bad = {"cut": content[: len(content) // 2], "noise": b"\x01" * 5000, "no tables": b""}[damage]
        storage.write_bytes(key, bad)
    second = _manager(storage, prefix, experiment="two")
    with caplog.at_level(logging.WARNING):
        second.finish()
    assert ("is damaged" in caplog.text) == (damage != "missing")
    with _all_runs(storage, prefix) as client:
        assert _run_ids(client) == {first.run_id, second.run_id}
        assert [entry.value for entry in client.get_metric_history(first.run_id, "x")] == [1.0]


def test_a_run_that_never_got_to_merging_is_added_by_the_next(storage: S3Manager, prefix: str) -> None:
    killed = _manager(storage, prefix)
    next_run = _manager(storage, prefix)
    next_run.finish()
    with _all_runs(storage, prefix) as client:
        assert _run_ids(client) == {killed.run_id, next_run.run_id}
        assert client.get_run(killed.run_id).info.status == "RUNNING"


def _flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_every_damage_of_a_runs_database_is_noticed(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection, connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS x")
    database = copy_database(tmp_path / "a.db")
    content = pack_database(database)
    assert unpack_database(content, "x") == database
    for place in range(len(content)):
        # A flip in the compressed stream can be one that means the same.
        with suppress(StorageDamagedError):
            assert unpack_database(_flip(content, place), "x") == database
        with pytest.raises(StorageDamagedError):
            unpack_database(content[:place], "x")


def test_an_object_that_claims_a_huge_size_is_refused_at_once() -> None:
    bomb = zstandard.compress(bytes(10_000_000))
    description = json.dumps({"size": 100, "sha256": "0" * 64}).encode()
    header = struct.pack("<II", 0x184D2A50, len(description))
    with pytest.raises(StorageDamagedError):
        unpack_database(header + description + bomb, "x")


def test_a_damaged_run_does_not_keep_others_out_and_its_resume_starts_anew(
    storage: S3Manager, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken, other = _manager(storage, prefix), _manager(storage, prefix)
    key = run_key(prefix, broken.run_id)
    content, _ = storage.read_bytes(key)
    storage.write_bytes(key, _flip(content, len(content) // 2))
    with caplog.at_level(logging.WARNING):
        other.finish()
    assert broken.run_id in caplog.text
    with _all_runs(storage, prefix) as client:
        assert _run_ids(client) == {other.run_id}
    with pytest.warns(TrackingWarning) as caught:
        resumed = _manager(storage, prefix, run_id=broken.run_id)
    assert ["is no whole tracking database" in str(w.message) for w in caught] == [True, False]
    assert "has no run" in str(caught[1].message)
    assert resumed.client.get_run(resumed.run_id).data.tags["resumed_from"] == broken.run_id
    resumed.finish()


def test_what_a_newer_mlflow_wrote_is_left_to_its_like(
    storage: S3Manager, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager = _manager(storage, prefix)
    manager.finish()
    content, etag = storage.read_bytes(f"{prefix}/mlflow.db")
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(content)
        with database:
            database.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
        storage.write_bytes(f"{prefix}/mlflow.db", database.serialize(), if_match=etag)
    late = _manager(storage, prefix)
    with pytest.raises(UserInputError, match="newer MLflow"):
        late.finish()
    published, _ = storage.read_bytes(run_key(prefix, late.run_id))
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(unpack_database(published, ""))
        assert database.execute("SELECT status FROM runs").fetchone() == ("FINISHED",), "nothing is lost"

    # A newer one's run is left out of a database that this MLflow makes.
    storage.delete([f"{prefix}/mlflow.db"])
    key = run_key(prefix, manager.run_id)
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(unpack_database(storage.read_bytes(key)[0], ""))
        with database:
            database.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
        storage.write_bytes(key, pack_database(database.serialize()))
    third = _manager(storage, prefix)
    with caplog.at_level(logging.WARNING):
        third.finish()
    assert "written by a newer MLflow" in caplog.text
    with _all_runs(storage, prefix) as client:
        assert _run_ids(client) == {late.run_id, third.run_id}


def _older_copy(database: bytes, run_id: str, path: Path) -> bytes:
    """A run's database as an MLflow of some dozen schema versions ago would have written it."""
    engine = create_engine(f"sqlite:///{path}")
    InitialBase.metadata.create_all(engine)
    config = _get_alembic_config(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "f5a4f2784254")
    with closing(sqlite3.connect(path)) as older:
        assert [row[1] for row in older.execute("PRAGMA table_info(experiments)")][-1] != "workspace"
        older.execute("INSERT INTO experiments (experiment_id, name) VALUES (0, 'Default')")
        merge_run(older, database, run_id)
    return copy_database(path)


def test_what_an_older_mlflow_wrote_is_brought_up(storage: S3Manager, prefix: str, tmp_path: Path) -> None:
    manager = _manager(storage, prefix)
    manager.log_metrics({"x": 1.0}, 1)
    manager.finish()
    key = run_key(prefix, manager.run_id)
    older = _older_copy(
        unpack_database(storage.read_bytes(key)[0], ""), manager.run_id, tmp_path / "older.db"
    )
    storage.write_bytes(key, pack_database(older))
    storage.write_bytes(f"{prefix}/mlflow.db", older)
    newer = _manager(storage, prefix)
    newer.finish()
    with _all_runs(storage, prefix) as client:
        assert _run_ids(client) == {manager.run_id, newer.run_id}
        assert [entry.value for entry in client.get_metric_history(manager.run_id, "x")] == [1.0]
        assert len({client.get_run(m.run_id).info.experiment_id for m in (manager, newer)}) == 1


def test_a_prefix_that_cannot_be_written_is_a_clear_error_at_the_start(
    s3_server: S3Server, prefix: str
) -> None:
    denied = S3Manager(
        s3_server.settings.model_copy(update={"secret_access_key": SecretStr("wrong"), "max_attempts": 1})
    )
    with pytest.raises(StorageError, match="runs/"):
        _manager(denied, prefix)
    with pytest.raises(UserInputError, match="needs access to S3"):
        MLflowManager(prefix, experiment="e")
    with pytest.raises(UserInputError, match="registry"):
        _manager(denied, prefix, registry_uri="s3://other/registry")


def test_artifacts_are_written_with_the_credentials_of_the_config(
    s3_server: S3Server, storage: S3Manager, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "out/report.md").write_text("한글")
    (tmp_path / "out/deep/x.bin").write_bytes(bytes(300_000))
    for tracking_uri, root in (
        (prefix, f"{prefix}/artifacts"),
        (str(tmp_path / "local"), f"{prefix}/elsewhere"),
    ):
        location = None if tracking_uri == prefix else root
        manager = _manager(storage, tracking_uri, artifact_location=location)
        manager.log_artifact(tmp_path / "out")
        manager.log_artifact(tmp_path / "out/report.md", "settings/more")
        uri = f"{root}/{manager.run_id}/artifacts"
        assert manager.client.get_run(manager.run_id).info.artifact_uri == uri
        keys = [stored.key.removeprefix(f"{uri}/") for stored in storage.list_objects(f"{uri}/")]
        assert keys == ["deep/x.bin", "report.md", "settings/more/report.md"]
        assert storage.read_bytes(f"{uri}/deep/x.bin")[0] == bytes(300_000)
        manager.finish()


def _config(s3_server: S3Server, **mlflow: str) -> Config:
    return Config.model_validate(
        {
            "s3": {
                "endpoint_url": s3_server.endpoint_url,
                "access_key_id": s3_server.access_key,
                "secret_access_key": s3_server.secret_key,
            },
            "mlflow": mlflow,
        }
    )


def test_checkpoints_are_found_by_the_run_newest_first(
    s3_server: S3Server, storage: S3Manager, prefix: str
) -> None:
    config = _config(s3_server, tracking_uri=prefix)
    manager = create_mlflow_manager(config, open_store=lambda: storage)
    for step in (2, 10, 9):
        manager.log_checkpoint(CheckpointRecord(step, f"s3://b/r/step-{step}", {"train/loss": 0.1}, "ab"))
    expected = [
        CheckpointRecord(step, f"s3://b/r/step-{step}", {"train/loss": 0.1}, "ab") for step in (10, 9, 2)
    ]
    assert manager.checkpoints() == expected
    assert checkpoints_of(config, manager.run_id, open_store=lambda: storage) == expected
    uris = [f"s3://b/r/step-{step}" for step in (10, 9, 2)]
    assert resolve_run_uri(config, f"runs:/{manager.run_id}", open_store=lambda: storage) == uris
    with pytest.raises(CheckpointError, match="no run 0123"):
        resolve_run_uri(config, f"runs:/{'0123' * 8}", open_store=lambda: storage)
    manager.finish()


def _write_head(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "value_head.safetensors").write_text(text)
    (folder / "value_head.json").write_text("{}")
    return folder


def test_models_of_all_runs_have_one_sequence_of_versions_that_survives(
    s3_server: S3Server, storage: S3Manager, prefix: str, tmp_path: Path
) -> None:
    config = _config(s3_server, tracking_uri=prefix)
    managers = [_manager(storage, prefix, experiment=f"e{number}") for number in range(3)]
    for number, manager in enumerate(managers):
        manager.log_model(
            "head", _write_head(tmp_path / str(number), f"weights {number}"), "critic/value_head"
        )
        tags = manager.client.get_run(manager.run_id).data.tags
        assert tags["model.head"] == f"models:/head/{number + 1}"
    managers[1].log_model("head", _write_head(tmp_path / "1", "weights 1, later"), "critic/value_head")
    for manager in managers:
        manager.finish()
    # The versions are in the runs' own databases too.
    storage.delete([f"{prefix}/mlflow.db"])
    _manager(storage, prefix).finish()
    for number, text in ((1, "weights 0"), (2, "weights 1, later"), (3, "weights 2")):
        target = download_model_artifact(
            config, f"models:/head/{number}", tmp_path / f"read {number}", open_store=lambda: storage
        )
        assert (target / "value_head.safetensors").read_text() == text
        assert (target / "value_head.json").read_text() == "{}"
    for uri, reason in (("models:/head/4", "head"), ("models:/none/1", "none"), ("models:/x", "registered")):
        with pytest.raises(ModelLoadError, match=reason):
            download_model_artifact(config, uri, tmp_path / "none", open_store=lambda: storage)


def test_merging_takes_a_bounded_share_of_the_time(
    storage: S3Manager, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, merged_at = 0.0, []
    manager = _manager(storage, prefix)
    tracking = S3Tracking(storage, prefix, merge_s=10.0)
    tracking.fetch(manager.run_id)

    def merge(self: SharedDatabase) -> None:
        nonlocal now
        merged_at.append(now)
        now += 2.0

    monkeypatch.setattr("wmtp.tracking.s3_tracking.time.monotonic", lambda: now)
    monkeypatch.setattr(SharedDatabase, "merge_runs", merge)
    while now < 100:
        tracking.publish(manager.run_id)
        now += 1.0
    assert merged_at == [0.0, 40.0, 80.0], "2 s of every 40"
    tracking.close()
    manager.finish()
