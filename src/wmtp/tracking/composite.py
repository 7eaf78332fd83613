"""The tracker a run uses: `metrics.jsonl` always, MLflow beside it, and a dead server never stops
training."""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.tracking.base import RunStatus, Tracker, TrackingWarning
from wmtp.tracking.metrics_file import METRICS_FILE_NAME, MetricsFile

if TYPE_CHECKING:
    from wmtp.settings import Config
    from wmtp.tracking.mlflow_tracker import MLflowManager

_RETRY_S = 60.0
_MAX_ATTEMPTS = 5


@dataclass(slots=True)
class _Entry:
    send: Callable[[], None]
    num_attempts: int = 0


class CompositeTracker:
    """Writes metrics to a local file, then hands everything to another tracker, whose failures it survives.

    After a failure the entries are kept and tried again, at most once a minute and once more at the end, in
    order. An entry that fails five times is dropped, so that one bad entry cannot block the rest.

    Args:
        metrics_file: the local file.
        remote: e.g. MLflow.
        retry_s: seconds between attempts after a failure.
    """

    def __init__(self, metrics_file: MetricsFile, remote: Tracker, *, retry_s: float = _RETRY_S) -> None:
        self._metrics_file = metrics_file
        self._remote = remote
        self._retry_s = retry_s
        self._waiting: deque[_Entry] = deque()
        self._next_attempt = 0.0
        self._num_dropped = 0
        self._has_warned = False
        self._is_finished = False

    @property
    def run_id(self) -> str | None:
        """The id of the remote run."""
        return self._remote.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; nested mappings become dotted names."""
        self._deliver(lambda: self._remote.log_params(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one optimizer step, in the local file first."""
        values = {name: float(value) for name, value in metrics.items()}
        self._metrics_file.log_metrics(values, step)
        self._deliver(lambda: self._remote.log_metrics(values, step))

    def log_artifact(self, path: str | os.PathLike[str], folder: str | None = None) -> None:
        """Record a file or folder; it must stay in place until the run is finished."""
        self._deliver(lambda: self._remote.log_artifact(path, folder))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record or replace tags."""
        self._deliver(lambda: self._remote.set_tags(tags))

    def finish(self, status: RunStatus = "finished") -> None:
        """Deliver what is waiting, close the run and the file; a second call changes nothing."""
        if self._is_finished:
            return
        self._is_finished = True
        self._next_attempt = 0.0
        self._deliver(lambda: self._remote.finish(status))
        self._metrics_file.close()
        num_lost = self._num_dropped + len(self._waiting)
        if num_lost:
            warnings.warn(
                f"{num_lost} entries did not reach the tracking store. "
                f"All metrics are in {self._metrics_file.path}.",
                TrackingWarning,
                stacklevel=2,
            )

    def _deliver(self, send: Callable[[], None]) -> None:
        self._waiting.append(_Entry(send))
        if time.monotonic() < self._next_attempt:
            return
        while self._waiting:
            entry = self._waiting[0]
            try:
                entry.send()
            # Whatever the other side raises (network, database, a bug of its own), training must go on.
            except Exception as error:
                self._on_failure(entry, error)
                return
            self._waiting.popleft()
        self._next_attempt = 0.0

    def _on_failure(self, entry: _Entry, error: Exception) -> None:
        self._next_attempt = time.monotonic() + self._retry_s
        entry.num_attempts += 1
        if entry.num_attempts >= _MAX_ATTEMPTS:
            self._waiting.popleft()
            self._num_dropped += 1
        if not self._has_warned:
            self._has_warned = True
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            warnings.warn(
                f"Tracking failed ({reason}); training goes on, tracking is tried again every "
                f"{self._retry_s:.0f} s. "
                f"All metrics are in {self._metrics_file.path}.",
                TrackingWarning,
                stacklevel=4,
            )


def create_tracker(
    run_dir: str | os.PathLike[str],
    *,
    experiment: str,
    tracking_uri: str,
    run_name: str | None = None,
    run_id: str | None = None,
    resume_step: int | None = None,
    registry_uri: str | None = None,
    artifact_location: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> CompositeTracker:
    """Build the tracker of a run: `<run_dir>/metrics.jsonl` and an MLflow run.

    Args:
        run_dir: folder of the run.
        experiment: see `experiment_name`.
        tracking_uri: SQLite address, server address, or a folder (SQLite inside it).
        run_name: shown by MLflow.
        run_id: continue this MLflow run.
        resume_step: optimizer step at which the run goes on; later lines of `metrics.jsonl` are cut off.
            None: new run.
        registry_uri: MLflow's model registry; default: the tracking store.
        artifact_location: see `MLflowManager`.
        tags: set on the run.

    Raises:
        UserInputError: the tracking store cannot be used (from the start; later failures are warnings).
    """
    # Imported here: MLflow takes a second to import, and commands that do not track should not wait for it.
    from wmtp.tracking.mlflow_tracker import MLflowManager

    manager = MLflowManager(
        tracking_uri,
        experiment=experiment,
        run_name=run_name,
        run_id=run_id,
        registry_uri=registry_uri,
        artifact_location=artifact_location,
        tags=tags,
    )
    return CompositeTracker(MetricsFile(Path(run_dir) / METRICS_FILE_NAME, resume_step=resume_step), manager)


def create_mlflow_manager(
    config: Config,
    *,
    experiment: str = "mtp",
    run_name: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> MLflowManager:
    """Build the MLflow tracker that a config describes; without `mlflow.tracking_uri` it is `mlflow/` of the
    output.

    Raises:
        UserInputError: the tracking store cannot be used.
    """
    from wmtp.tracking.mlflow_tracker import MLflowManager

    return MLflowManager(
        config.mlflow.tracking_uri or str(Path(config.paths.output) / "mlflow"),
        experiment=experiment,
        run_name=run_name,
        run_id=run_id,
        registry_uri=config.mlflow.registry_uri,
        artifact_location=config.mlflow.artifact_location,
        tags=tags,
    )
