"""Adding the MLflow database of one run to the database of many, in memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_SOURCE = "source"
# Tables whose rows belong to one run, by the column `run_uuid`.
_RUN_TABLES = ("runs", "params", "tags", "metrics", "latest_metrics")
_REGISTRY_TABLES = ("registered_models", "model_versions")
# Which object of each run was added last. MLflow takes no notice of tables that are not its own.
_MERGED = "wmtp_merged_runs"


def merge_run(target: sqlite3.Connection, source: bytes, run_id: str) -> None:
    """Replace what `target` has of a run by what the database `source` has.

    Experiments are told by their names: each database numbers its own.
    """
    with _attached(target, source):
        _copy(target, "experiments", verb="INSERT OR IGNORE", without=("experiment_id",))
        for table in _RUN_TABLES:
            target.execute(f"DELETE FROM main.{table} WHERE run_uuid = ?", (run_id,))
            _copy(target, table, "run_uuid = ?", (run_id,))
        target.execute(
            "UPDATE main.runs SET experiment_id = ("
            "SELECT known.experiment_id FROM source.runs AS run "
            "JOIN source.experiments AS own ON own.experiment_id = run.experiment_id "
            "JOIN main.experiments AS known ON known.name = own.name WHERE run.run_uuid = ?"
            ") WHERE run_uuid = ?",
            (run_id, run_id),
        )


def merge_registry(target: sqlite3.Connection, source: bytes) -> None:
    """Add the registered models and versions of `source` that `target` lacks."""
    with _attached(target, source):
        for table in _REGISTRY_TABLES:
            _copy(target, table, verb="INSERT OR IGNORE")


def copy_registrations(target: Path, source: bytes, run_id: str) -> None:
    """Copy the model versions of one run from the database `source` to the file `target`."""
    with closing(sqlite3.connect(target)) as database, _attached(database, source):
        condition = "name IN (SELECT name FROM source.model_versions WHERE run_id = ?)"
        _copy(database, "registered_models", condition, (run_id,), verb="INSERT OR REPLACE")
        _copy(database, "model_versions", "run_id = ?", (run_id,), verb="INSERT OR REPLACE")


def merged_etags(database: sqlite3.Connection) -> dict[str, str]:
    """Etag of the object that was added last, by run."""
    _make_merged_table(database)
    return dict(database.execute(f"SELECT run_id, etag FROM {_MERGED}"))


def set_merged_etag(database: sqlite3.Connection, run_id: str, etag: str) -> None:
    """Note that a run's object was added."""
    _make_merged_table(database)
    with database:
        database.execute(f"INSERT OR REPLACE INTO {_MERGED} VALUES (?, ?)", (run_id, etag))


def is_database(content: bytes) -> bool:
    """Whether `content` is a whole MLflow database."""
    if not content:
        return False
    with closing(sqlite3.connect(":memory:")) as database:
        try:
            database.deserialize(content)
            is_whole = database.execute("PRAGMA quick_check").fetchone() == ("ok",)
            return is_whole and database.execute("SELECT count(*) FROM runs").fetchone() is not None
        except sqlite3.Error:
            return False


def schema_revision(path: Path) -> str:
    """The version of MLflow's schema that a database file has."""
    with closing(sqlite3.connect(path)) as database:
        return _revision(database)


def upgraded(content: bytes, revision: str) -> bytes | None:
    """A database at this process's schema `revision`; None if it is at one this MLflow does not know."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(content)
        if _revision(database) == revision:
            return content
    from alembic.util import CommandError
    from mlflow.db import upgrade

    with TemporaryDirectory(prefix="wmtp-mlflow-") as folder:
        path = Path(folder) / "mlflow.db"
        path.write_bytes(content)
        try:
            # The command `mlflow db upgrade`.
            upgrade.main([f"sqlite:///{path}"], standalone_mode=False)
        except CommandError:
            return None
        return path.read_bytes()


def _copy(
    database: sqlite3.Connection,
    table: str,
    condition: str = "1",
    parameters: tuple[str, ...] = (),
    *,
    verb: str = "INSERT",
    without: tuple[str, ...] = (),
) -> None:
    names = [row[1] for row in database.execute(f"PRAGMA main.table_info({table})")]
    columns = ", ".join(f'"{name}"' for name in names if name not in without)
    database.execute(
        f"{verb} INTO main.{table} ({columns}) SELECT {columns} FROM {_SOURCE}.{table} WHERE {condition}",
        parameters,
    )


def _revision(database: sqlite3.Connection) -> str:
    return str(database.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def _make_merged_table(database: sqlite3.Connection) -> None:
    database.execute(f"CREATE TABLE IF NOT EXISTS {_MERGED} (run_id TEXT PRIMARY KEY, etag TEXT NOT NULL)")


@contextmanager
def _attached(database: sqlite3.Connection, source: bytes) -> Iterator[None]:
    """Have `source` as a second schema during a block, all of whose changes are made or none."""
    database.execute(f"ATTACH DATABASE ':memory:' AS {_SOURCE}")
    try:
        database.deserialize(source, name=_SOURCE)
        with database:
            yield
    finally:
        database.execute(f"DETACH DATABASE {_SOURCE}")
