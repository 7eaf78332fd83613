"""The SQLite database of one run on S3: a file in a temporary folder, published as one object.

SQLite needs a local file that it can write to in place and lock, which an object store has no counterpart of.
So the file is in a temporary folder while the run lasts and goes with it: it is no cache, no later run reads
it. What is published is a copy made by SQLite's backup API, which is whole whatever is being written.

The object `<prefix>/runs/<run_id>/mlflow.db.zst` is a Zstandard file (`zstd -d` gives the database). A
skippable frame in front (RFC 8878, 3.1.2), which decompressors pass over, holds size and SHA-256 of the
database, so that the object is checked as one thing.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import zstandard

from wmtp.exceptions import StorageConflictError, StorageDamagedError, StorageMissingError
from wmtp.tracking.object_store import ObjectStore

RUN_FOLDER = "runs"
RUN_OBJECT = "mlflow.db.zst"
_SKIPPABLE_MAGIC = 0x184D2A50
_HEADER = struct.Struct("<II")


class RunDatabase:
    """The database of one run: a local file, and the object that is a copy of it.

    Args:
        store: where objects go.
        prefix: `s3://bucket/prefix` of all tracking.
    """

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self.store = store
        self.prefix = prefix.rstrip("/")
        # Removed by close(), by an exception that ends the process, and at exit; not by kill -9.
        self._folder = TemporaryDirectory(prefix="wmtp-mlflow-")
        self.path = Path(self._folder.name) / "mlflow.db"
        self._etag: str | None = None
        self._published: str | None = None

    def fetch(self, run_id: str) -> bool:
        """Put the published database of a run in place; False where there is none.

        Raises:
            StorageDamagedError: it is not what was published.
            StorageError: it cannot be had.
        """
        key = run_key(self.prefix, run_id)
        try:
            content, etag = self.store.read_bytes(key)
        except StorageMissingError:
            return False
        database = unpack_database(content, key)
        self.path.write_bytes(database)
        self._etag, self._published = etag, hashlib.sha256(database).hexdigest()
        return True

    def publish(self, run_id: str) -> None:
        """Publish the database as it is now, unless that has been done.

        Raises:
            StorageConflictError: another process goes on with the same run.
            StorageError: it cannot be written.
        """
        database = copy_database(self.path)
        digest = hashlib.sha256(database).hexdigest()
        if digest == self._published:
            return
        key = run_key(self.prefix, run_id)
        try:
            etag = self.store.write_bytes(
                key, pack_database(database), if_absent=self._etag is None, if_match=self._etag
            )
        except StorageConflictError as error:
            raise StorageConflictError(
                f"another process writes {key}, so the tracking of this one is not published",
                remedy="let one process at a time go on with a run",
            ) from error
        self._etag, self._published = etag, digest

    def close(self) -> None:
        """Remove the local file."""
        # What is left of it goes with the temporary folder of the machine.
        with suppress(OSError):
            self._folder.cleanup()


def run_key(prefix: str, run_id: str) -> str:
    """Key of a run's object."""
    return f"{prefix.rstrip('/')}/{RUN_FOLDER}/{run_id}/{RUN_OBJECT}"


def copy_database(path: Path) -> bytes:
    """A consistent copy of a SQLite file, whatever is being written to it."""
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(":memory:")) as copy:
        source.backup(copy)
        return copy.serialize()


def pack_database(database: bytes) -> bytes:
    """Compress a database and put its size and digest in front."""
    description = {"sha256": hashlib.sha256(database).hexdigest(), "size": len(database)}
    payload = json.dumps(description).encode()
    return _HEADER.pack(_SKIPPABLE_MAGIC, len(payload)) + payload + zstandard.compress(database)


def unpack_database(content: bytes, name: str) -> bytes:
    """The database in an object, checked against its digest.

    Raises:
        StorageDamagedError: the object is damaged; the message names `name`.
    """
    try:
        magic, length = _HEADER.unpack_from(content)
        payload = content[_HEADER.size : _HEADER.size + length]
        description = json.loads(payload) if magic == _SKIPPABLE_MAGIC else {}
        size, digest = int(description["size"]), str(description["sha256"])
        database = zstandard.decompress(content[_HEADER.size + length :], max_output_size=size)
    except (struct.error, ValueError, KeyError, TypeError, zstandard.ZstdError, MemoryError) as error:
        raise _damaged(name, f"{type(error).__name__}: {error}") from error
    if len(database) != size or hashlib.sha256(database).hexdigest() != digest:
        raise _damaged(name, "its digest is not the one it was written with")
    return database


def _damaged(name: str, reason: str) -> StorageDamagedError:
    return StorageDamagedError(
        f"{name} is no whole tracking database: {reason}",
        remedy="delete it; the metrics of the run are in its metrics.jsonl",
    )
