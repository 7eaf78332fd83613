"""The database of all runs on S3, `<prefix>/mlflow.db`: made from the runs' own, under conditional writes.

Each writer reads it, adds every run whose published object is not the one that was added last (not its own
run alone), and writes it on the condition that nobody else has in between; else it starts over from what the
other wrote, where mostly nothing is left to do. So runs neither wait for each other nor overwrite each other,
and what one that was killed left is added by the next. A missing or damaged database is made anew.
"""

from __future__ import annotations

import logging
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from wmtp.exceptions import StorageConflictError, StorageError, StorageMissingError
from wmtp.tracking.merging import (
    is_database,
    merge_registry,
    merge_run,
    merged_etags,
    set_merged_etag,
    upgraded,
)
from wmtp.tracking.object_store import ObjectStore
from wmtp.tracking.run_database import RUN_FOLDER, RUN_OBJECT, copy_database, unpack_database

SHARED_OBJECT = "mlflow.db"
_MAX_ATTEMPTS = 20
_LONGEST_PAUSE_S = 5.0

logger = logging.getLogger(__name__)


class SharedDatabase:
    """All runs under a prefix.

    Args:
        store: where objects are.
        prefix: `s3://bucket/prefix`.
        revision: schema of this process's MLflow, as its own databases have it.
    """

    def __init__(self, store: ObjectStore, prefix: str, revision: str) -> None:
        self.store = store
        self.prefix = prefix.rstrip("/")
        self.key = f"{self.prefix}/{SHARED_OBJECT}"
        self.revision = revision
        self._warned: set[str] = set()

    def merge_runs(self) -> None:
        """Bring the database up to what every run has published.

        Raises:
            StorageError: it cannot be read or written.
        """
        self._transact(lambda database: False)

    def register(self, change: Callable[[Path], None]) -> bytes:
        """Let `change` write to a copy in a file, publish the result, and return it.

        `change` is called again on a newer copy when somebody else has written in between.
        """

        def apply(database: sqlite3.Connection) -> bool:
            with TemporaryDirectory(prefix="wmtp-mlflow-") as folder:
                path = Path(folder) / SHARED_OBJECT
                path.write_bytes(database.serialize())
                change(path)
                database.deserialize(copy_database(path))
            return True

        return self._transact(apply)

    def _transact(self, change: Callable[[sqlite3.Connection], bool]) -> bytes:
        for attempt in range(_MAX_ATTEMPTS):
            content, etag = self._read()
            with closing(sqlite3.connect(":memory:")) as database:
                has_merged = self._merge_missing(database, content)
                if not change(database) and not has_merged:
                    return content or b""
                result = database.serialize()
            try:
                self.store.write_bytes(self.key, result, if_absent=etag is None, if_match=etag)
            except StorageConflictError:
                # Drawn at random, so that those who collided do not meet again.
                time.sleep(random.uniform(0.0, min(_LONGEST_PAUSE_S, 0.1 * 2**attempt)))
            else:
                return result
        raise StorageError(
            f"{self.key} was changed by others at each of {_MAX_ATTEMPTS} attempts",
            remedy="nothing is lost: the run has its own database, which the next run adds",
        )

    def _read(self) -> tuple[bytes | None, str | None]:
        try:
            content, etag = self.store.read_bytes(self.key)
        except StorageMissingError:
            return None, None
        if not is_database(content):
            logger.warning("%s is damaged and is made anew from the runs' own databases", self.key)
            return None, etag
        current = upgraded(content, self.revision)
        if current is None:
            raise StorageError(
                f"{self.key} was written by a newer MLflow, so the runs of this one are not added to it",
                remedy="update mlflow; nothing is lost: a process with that version will add them",
            )
        return current, etag

    def _merge_missing(self, database: sqlite3.Connection, content: bytes | None) -> bool:
        """Put `content` in place and add what it lacks; whether there was anything."""
        is_empty = content is None
        if content is not None:
            database.deserialize(content)
        known = {} if is_empty else merged_etags(database)
        has_merged = False
        for run_id, key, etag in self._published_runs():
            if known.get(run_id) == etag:
                continue
            source = self._read_run(key)
            if source is None:
                continue
            if is_empty:
                # Any run's database has the tables that are needed, its own rows among them.
                database.deserialize(source)
                is_empty = False
            else:
                merge_run(database, source, run_id)
                merge_registry(database, source)
            set_merged_etag(database, run_id, etag)
            has_merged = True
        if is_empty:
            raise StorageError(
                f"no run is published under {self.prefix}", remedy="check mlflow.tracking_uri in the config"
            )
        return has_merged

    def _published_runs(self) -> Iterator[tuple[str, str, str]]:
        folder = f"{self.prefix}/{RUN_FOLDER}/"
        for stored in self.store.list_objects(folder):
            run_id, _, name = stored.key.removeprefix(folder).partition("/")
            if name == RUN_OBJECT:
                yield run_id, stored.key, stored.etag

    def _read_run(self, key: str) -> bytes | None:
        """A run's database; None, with a warning, where it cannot be used: others must not suffer."""
        try:
            content, _ = self.store.read_bytes(key)
            database = upgraded(unpack_database(content, key), self.revision)
        except StorageError as error:
            self._warn(key, error.message)
            return None
        if database is None:
            self._warn(key, f"{key} was written by a newer MLflow; a process with that version will add it")
        return database

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning("%s: left out of %s", message, self.key)


@contextmanager
def shared_copy(store: ObjectStore, prefix: str) -> Iterator[Path]:
    """The database of all runs as a file for the length of a block; it is not written back.

    Raises:
        StorageError: there is none, or it cannot be had.
    """
    content, _ = store.read_bytes(f"{prefix.rstrip('/')}/{SHARED_OBJECT}")
    with TemporaryDirectory(prefix="wmtp-mlflow-") as folder:
        path = Path(folder) / SHARED_OBJECT
        path.write_bytes(content)
        yield path
