"""`mlflow.tracking_uri: s3://bucket/prefix`: when a run's database and that of all runs are published."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

from mlflow.tracking import MlflowClient

from wmtp.exceptions import StorageDamagedError
from wmtp.tracking.base import TrackingWarning
from wmtp.tracking.merging import copy_registrations, schema_revision
from wmtp.tracking.object_store import ObjectStore
from wmtp.tracking.run_database import RunDatabase
from wmtp.tracking.shared_database import SharedDatabase

ARTIFACTS_FOLDER = "artifacts"
_PUBLISH_S = 60.0
_MERGE_S = 600.0
# A database of many runs takes long to read and write; at most this share of the time goes into it.
_MAX_MERGE_SHARE = 0.05


class S3Tracking:
    """Keeps what a run has logged on S3.

    Args:
        store: where objects go.
        prefix: `s3://bucket/prefix`.
        publish_s: least seconds between two publications of the run's database, checkpoints aside.
        merge_s: least seconds between two additions of it to the database of all runs.
    """

    def __init__(
        self, store: ObjectStore, prefix: str, *, publish_s: float = _PUBLISH_S, merge_s: float = _MERGE_S
    ) -> None:
        self.store = store
        self.prefix = prefix.rstrip("/")
        self.artifact_location = f"{self.prefix}/{ARTIFACTS_FOLDER}"
        self._database = RunDatabase(store, self.prefix)
        self._shared: SharedDatabase | None = None
        self._publish_s = publish_s
        self._merge_s = merge_s
        self._next_publish = 0.0
        self._next_merge = 0.0

    @property
    def client_uri(self) -> str:
        """Address of the run's local database, for MLflow."""
        return f"sqlite:///{self._database.path}"

    def fetch(self, run_id: str) -> None:
        """Put the run's published database in place, so that the run can go on; a damaged one is left out
        with a warning.
        """
        try:
            self._database.fetch(run_id)
        except StorageDamagedError as error:
            warnings.warn(str(error), TrackingWarning, stacklevel=4)

    def publish_run(self, run_id: str) -> None:
        """Publish the run's own database.

        Raises:
            StorageError: it cannot be written.
        """
        self._database.publish(run_id)
        self._next_publish = time.monotonic() + self._publish_s

    def publish(self, run_id: str, *, is_due: bool = False, is_last: bool = False) -> None:
        """Publish what is new when it is time; the run's own database at once with `is_due`, and everything
        with `is_last`.

        Raises:
            StorageError: it cannot be written.
        """
        if is_due or is_last or time.monotonic() >= self._next_publish:
            self.publish_run(run_id)
        if is_last or time.monotonic() >= self._next_merge:
            began = time.monotonic()
            # Before the attempt: where it fails, the run's own database must not wait for it.
            self._next_merge = began + self._merge_s
            self._open_shared().merge_runs()
            took = time.monotonic() - began
            self._next_merge = began + max(self._merge_s, took / _MAX_MERGE_SHARE)

    def register(self, run_id: str, change: Callable[[MlflowClient], None]) -> None:
        """Let `change` register a model version where version numbers are given out: in the shared database.

        The run's own database gets a copy, so that the shared one can be made from the runs' alone.
        """
        self.publish_run(run_id)
        content = self._open_shared().register(lambda path: change(_client_of(path)))
        copy_registrations(self._database.path, content, run_id)
        self.publish_run(run_id)

    def close(self) -> None:
        """Remove the local database."""
        self._database.close()

    def _open_shared(self) -> SharedDatabase:
        if self._shared is None:
            revision = schema_revision(self._database.path)
            self._shared = SharedDatabase(self.store, self.prefix, revision)
        return self._shared


def _client_of(path: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}")
