"""The tracker a run uses: `metrics.jsonl` always, MLflow beside it, and a dead server never stops
training."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from typing import Any

from wmtp.settings.redaction import redact_text
from wmtp.tracking.base import RemoteTracker, RunStatus, TrackingWarning
from wmtp.tracking.checkpoint_records import CheckpointRecord
from wmtp.tracking.delivery import Delivery
from wmtp.tracking.metrics_file import MetricsFile, read_metrics

_RETRY_S = 60.0
# Longer than the retries of one call to a server that hangs, so that only a call without an end of its own
# is given up.
_PATIENCE_S = 120.0


class CompositeTracker:
    """Writes metrics to a local file, then hands everything to another tracker, whose failures it survives.

    The other tracker is called from a thread of its own, in order, so that training does not wait for it.
    After a failure the entries are kept and tried again, at most once a minute and once more at the end.

    Args:
        metrics_file: the local file.
        remote: e.g. MLflow.
        retry_s: seconds between attempts after a failure.
        patience_s: at the end, seconds to wait for a call that does not return.
    """

    def __init__(
        self,
        metrics_file: MetricsFile,
        remote: RemoteTracker,
        *,
        retry_s: float = _RETRY_S,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self._metrics_file = metrics_file
        self._remote = remote
        self._patience_s = patience_s
        self._delivery = Delivery(retry_s=retry_s)
        self._latest: dict[str, tuple[int, float]] = {}
        self._has_warned = False
        self._is_finished = False

    @property
    def run_id(self) -> str | None:
        """The id of the remote run."""
        return self._remote.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; nested mappings become dotted names."""
        self._warn_once()
        self._delivery.put(lambda: self._remote.log_params(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of one optimizer step, in the local file first.

        What a step has with the same value already is left out: a run that goes on from its last step
        measures again what it had measured there after the checkpoint.
        """
        self._warn_once()
        values = {
            name: float(value) for name, value in metrics.items() if not self._is_known(name, step, value)
        }
        if not values:
            return
        self._latest.update({name: (step, value) for name, value in values.items()})
        # Told once for both: an entry that is sent twice is then the same entry.
        time_ms = int(time.time() * 1000)
        self._metrics_file.log_metrics(values, step, time_ms=time_ms)
        self._delivery.put(lambda: self._remote.log_metrics(values, step, time_ms=time_ms))

    def log_artifact(self, path: str | os.PathLike[str], folder: str | None = None) -> None:
        """Record a file or folder; it must stay in place until the run is finished."""
        self._delivery.put(lambda: self._remote.log_artifact(path, folder))

    def log_model(self, name: str, path: str | os.PathLike[str], folder: str) -> None:
        """Record a folder and register it as the model `name`; it must stay in place until the run is
        finished.
        """
        self._delivery.put(lambda: self._remote.log_model(name, path, folder))

    def log_checkpoint(
        self, step: int, *, uri: str, metrics: Mapping[str, float], manifest_sha256: str
    ) -> None:
        """Record a committed checkpoint as `checkpoints/step_{step}`, with the metrics last logged."""
        logged = {name: value for name, (at, value) in self._latest.copy().items() if at <= step}
        values = {**logged, **{name: float(value) for name, value in metrics.items()}}
        record = CheckpointRecord(step, uri, values, manifest_sha256)
        self._delivery.put(lambda: self._remote.log_checkpoint(record))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record or replace tags."""
        self._delivery.put(lambda: self._remote.set_tags(tags))

    def restore_metrics(self, up_to_step: int) -> None:
        """Send again what the remote run lacks of the local file's steps up to `up_to_step`."""
        rows = [row for row in read_metrics(self._metrics_file.path) if row["step"] <= up_to_step]
        for row in rows:
            self._latest.update({name: (int(row["step"]), value) for name, value in row.items()})
        if rows:
            self._delivery.put(lambda: self._remote.restore_metrics(rows))

    def flush(self, timeout_s: float = _PATIENCE_S) -> bool:
        """Wait until everything so far was sent or sending failed; whether nothing is left to send."""
        is_sent = self._delivery.flush(timeout_s)
        self._warn_once()
        return is_sent

    def finish(self, status: RunStatus = "finished") -> None:
        """Send what is waiting, close the run and the file; a second call changes nothing."""
        if self._is_finished:
            return
        self._is_finished = True
        self._delivery.put(lambda: self._remote.finish(status))
        num_lost = self._delivery.close(self._patience_s)
        self._metrics_file.close()
        self._warn_once()
        if num_lost:
            warnings.warn(
                f"{num_lost} entries did not reach the tracking store.{self._where_all_is()}",
                TrackingWarning,
                stacklevel=2,
            )

    def _is_known(self, name: str, step: int, value: float) -> bool:
        # As text, because NaN is the same as NaN here.
        known_step, known_value = self._latest.get(name, (-1, 0.0))
        return known_step == step and known_value.hex() == float(value).hex()

    def _warn_once(self) -> None:
        # From the thread of the caller, so that the warning appears where the user looks for it.
        error = self._delivery.first_error
        if error is None or self._has_warned:
            return
        self._has_warned = True
        reason = redact_text(str(error).strip().partition("\n")[0]) or type(error).__name__
        warnings.warn(
            f"Tracking failed ({reason}); training goes on, tracking is tried again every "
            f"{self._delivery.retry_s:.0f} s.{self._where_all_is()}",
            TrackingWarning,
            stacklevel=3,
        )

    def _where_all_is(self) -> str:
        return "" if self._metrics_file.num_waiting else f" All metrics are in {self._metrics_file.path}."
