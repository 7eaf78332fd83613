"""MLflow: the run's place in an experiment, on a SQLite file, a server or S3.

Measured with MLflow 3.17 on two cores: importing it takes 1.1 s, the first use of a SQLite file 1.6 s (68
schema migrations, nearly all of it imports of their modules), opening an existing one 0.01 s, a call 4 ms. So
this module is imported on use, all runs of one output folder share one database, and metrics of a step go in
one call. MLflow's usage reporting is switched off before the import: nothing is sent anywhere but to the
tracking store.
"""

from __future__ import annotations

import getpass
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from wmtp.exceptions import UserInputError
from wmtp.settings.redaction import redact_text
from wmtp.tracking.base import RunStatus, TrackingWarning, flatten_params, git_commit
from wmtp.tracking.checkpoint_records import CheckpointRecord, checkpoint_records
from wmtp.tracking.mlflow_artifacts import upload_artifacts
from wmtp.tracking.mlflow_history import (
    MetricHistory,
    delete_later_metrics,
    missing_metrics,
    read_history,
)
from wmtp.tracking.object_store import OpenStore, is_s3, open_object_store
from wmtp.tracking.s3_tracking import S3Tracking

DATABASE_NAME = "mlflow.db"
ARTIFACTS_NAME = "artifacts"
_SQLITE = "sqlite:///"
_DATABASE_SCHEMES = ("postgresql", "mysql", "mssql")
_SERVER_SCHEMES = ("http", "https", "databricks", *_DATABASE_SCHEMES)
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_MAX_PER_BATCH = 100
_MAX_METRICS_PER_BATCH = 1000
_MAX_TAG = 8000


class MLflowManager:
    """One MLflow run: created, or continued under its id.

    Args:
        tracking_uri: `sqlite:///file.db`, a server's address, a folder, which means SQLite inside that
            folder, or `s3://bucket/prefix`.
        experiment: e.g. `mtp/baseline-mtp/mbpp`; created where absent.
        run_name: shown by MLflow; None lets it choose.
        run_id: continue this run; if the store does not know it, warn and start one tagged `resumed_from`.
        resume_step: step at which it goes on; what it logged of later steps is taken back (see
            `mlflow_history`).
        registry_uri: model registry; default: the tracking store.
        artifact_location: root of artifacts of a new experiment; default: `artifacts` beside the SQLite
            file or under the prefix, or the server's own.
        tags: set on the run, beside user, source, package version and git commit.
        open_store: gives access to S3, where one of the addresses is there.

    Raises:
        UserInputError: the store cannot be reached or used.
    """

    def __init__(
        self,
        tracking_uri: str,
        *,
        experiment: str,
        run_name: str | None = None,
        run_id: str | None = None,
        resume_step: int | None = None,
        registry_uri: str | None = None,
        artifact_location: str | None = None,
        tags: Mapping[str, str] | None = None,
        open_store: OpenStore | None = None,
    ) -> None:
        self._open_store = open_store
        self._s3: S3Tracking | None = None
        self._history: MetricHistory | None = None
        if is_s3(tracking_uri):
            self._s3 = S3Tracking(open_object_store(open_store, tracking_uri), tracking_uri)
            self.tracking_uri = tracking_uri
            default_location: str | None = self._s3.artifact_location
            if run_id is not None:
                self._s3.fetch(run_id)
        else:
            self.tracking_uri, default_location = resolve_tracking_uri(tracking_uri)
        try:
            self.client = MlflowClient(self._client_uri, resolve_registry_uri(registry_uri, tracking_uri))
            if run_id is not None and self._continue(run_id):
                self._run_id = run_id
                if resume_step is not None:
                    self._take_back(resume_step)
            else:
                experiment_id = self._experiment_id(experiment, artifact_location or default_location)
                run = self.client.create_run(experiment_id, run_name=run_name, tags=_own_tags())
                self._run_id = str(run.info.run_id)
                if run_id is not None:
                    self.set_tags({"resumed_from": run_id})
            self._artifact_uri = str(self.client.get_run(self._run_id).info.artifact_uri)
            self.set_tags(tags or {})
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserInputError(
                redact_text(f"MLflow cannot be used at {self.tracking_uri}: {_first_line(error)}"),
                remedy="Check mlflow.tracking_uri in the config; without it a SQLite file is used.",
            ) from error
        self._registers_on_s3 = self._s3 is not None and (registry_uri is None or is_s3(registry_uri))
        if self._s3 is not None:
            self._s3.publish_run(self._run_id)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return self._run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; MLflow never changes one, so changes go to the tag `changed_params`."""
        flat = flatten_params(params)
        known = self.client.get_run(self._run_id).data.params
        changed = {key: value for key, value in flat.items() if known.get(key, value) != value}
        if changed:
            listed = "\n".join(f"{key}: {known[key]} -> {value}" for key, value in sorted(changed.items()))
            self.set_tags({"changed_params": listed})
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), _MAX_PER_BATCH):
            self.client.log_batch(self._run_id, params=new[start : start + _MAX_PER_BATCH])
        self._publish()

    def log_metrics(self, metrics: Mapping[str, float], step: int, *, time_ms: int | None = None) -> None:
        """Record one step's metrics in one call; the same call with the same `time_ms` again changes
        nothing.
        """
        time_ms = int(time.time() * 1000) if time_ms is None else time_ms
        self._log(
            [
                Metric(key, float(value), time_ms, step)
                for key, value in metrics.items()
                if self._history is None or not self._history.is_known(key, step, float(value))
            ]
        )
        self._publish()

    def restore_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Record what the run lacks of these rows of a metrics file."""
        self._log(missing_metrics(read_history(self.client, self._run_id), rows))
        self._publish()

    def log_artifact(self, path: str | os.PathLike[str], folder: str | None = None) -> None:
        """Copy a file, or a folder with all it holds, into the run's artifacts."""
        if is_s3(self._artifact_uri) and self._open_store is not None:
            upload_artifacts(self._open_store(), self._artifact_uri, path, folder)
        elif Path(path).is_dir():
            self.client.log_artifacts(self._run_id, os.fspath(path), folder)
        else:
            self.client.log_artifact(self._run_id, os.fspath(path), folder)

    def log_model(self, name: str, path: str | os.PathLike[str], folder: str) -> None:
        """Record a folder's files as artifacts and register them as a version of the model `name`.

        A run has one version of a model: when it registers again, that version's files are replaced. The tag
        `model.<name>` says which it is: `models:/<name>/<version>`.
        """
        self.log_artifact(path, folder)
        if self._s3 is not None and self._registers_on_s3:
            self._s3.register(self._run_id, lambda client: self._register(client, name, folder))
        else:
            self._register(self.client, name, folder)
        # On S3, the run's own database now has a copy of the version.
        number = _version_of(self.client, name, self._run_id)
        self.set_tags({f"model.{name}": f"models:/{name}/{number}"})
        self._publish()

    def log_checkpoint(self, record: CheckpointRecord) -> None:
        """Record a committed checkpoint; on S3 it is published at once, with all that came before it.

        One that was recorded at another address was brought from there, perhaps many steps later: what had
        been measured at its step stays in the record.
        """
        earlier = next((found for found in self.checkpoints() if found.step == record.step), None)
        if earlier is not None and earlier.uri != record.uri:
            record = replace(record, metrics={**earlier.metrics, **record.metrics})
        key, value = record.to_tag()
        self.set_tags({key: value})
        self._publish(is_due=True)

    def checkpoints(self) -> list[CheckpointRecord]:
        """The checkpoints recorded in this run, newest first."""
        return checkpoint_records(self.client.get_run(self._run_id).data.tags)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a value longer than MLflow allows is cut."""
        if tags:
            entries = [RunTag(key, str(value)[:_MAX_TAG]) for key, value in tags.items()]
            self.client.log_batch(self._run_id, tags=entries)

    def finish(self, status: RunStatus = "finished") -> None:
        """Mark the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self._run_id, status=_STATUS[status])
        if self._s3 is not None:
            self._s3.publish(self._run_id, is_last=True)
            self._s3.close()

    @property
    def _client_uri(self) -> str:
        return self.tracking_uri if self._s3 is None else self._s3.client_uri

    def _publish(self, *, is_due: bool = False) -> None:
        if self._s3 is not None:
            self._s3.publish(self._run_id, is_due=is_due)

    def _log(self, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), _MAX_METRICS_PER_BATCH):
            self.client.log_batch(self._run_id, metrics=metrics[start : start + _MAX_METRICS_PER_BATCH])

    def _register(self, client: MlflowClient, name: str, folder: str) -> None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if _version_of(client, name, self._run_id) is None:
            client.create_model_version(name, f"{self._artifact_uri}/{folder}", run_id=self._run_id)

    def _take_back(self, resume_step: int) -> None:
        if self._client_uri.startswith(_SQLITE) or _scheme(self._client_uri) in _DATABASE_SCHEMES:
            delete_later_metrics(self._client_uri, self._run_id, resume_step)
            # Of that very step some may have been logged after the checkpoint, and will be again.
            self._history = read_history(self.client, self._run_id, from_step=resume_step)
        else:
            self._history = read_history(self.client, self._run_id)

    def _continue(self, run_id: str) -> bool:
        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            warnings.warn(
                f"MLflow at {redact_text(self.tracking_uri)} has no run {run_id}; a new run is started. "
                "Give the tracking_uri of the run that is resumed to continue its curves.",
                TrackingWarning,
                stacklevel=3,
            )
            return False
        return True

    def _experiment_id(self, name: str, artifact_location: str | None) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=artifact_location))
            except MlflowException:
                # Another run created it in between; any other cause shows again in the next line.
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise UserInputError(
                f"The MLflow experiment {name!r} is deleted.",
                remedy=f"Restore it: mlflow experiments restore --experiment-id {found.experiment_id}",
            )
        return str(found.experiment_id)


def resolve_tracking_uri(uri: str) -> tuple[str, str | None]:
    """Return `(uri for MLflow, default artifact location)`; a folder means `mlflow.db` inside it.

    Raises:
        UserInputError: a kind of address that cannot hold runs.
    """
    if uri.startswith(_SQLITE):
        path = Path(uri.removeprefix(_SQLITE)).expanduser().absolute()
    else:
        if _scheme(uri) in _SERVER_SCHEMES:
            return uri, None
        if _scheme(uri) not in ("", "file"):
            raise UserInputError(
                f"mlflow.tracking_uri {redact_text(uri)!r} is of the unknown kind {urlsplit(uri).scheme!r}.",
                remedy="Use a folder, sqlite:///file.db, s3://bucket/prefix, or the address of an MLflow "
                "server (http, https).",
            )
        path = Path(uri.removeprefix("file://")).expanduser().absolute() / DATABASE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserInputError(
            f"The folder {path.parent} for MLflow cannot be made: {error.strerror}.",
            remedy="Set mlflow.tracking_uri to a place that can be written.",
        ) from error
    return f"{_SQLITE}{path}", (path.parent / ARTIFACTS_NAME).as_uri()


def resolve_registry_uri(registry_uri: str | None, tracking_uri: str) -> str | None:
    """The registry's address for MLflow; None where it is the tracking store.

    Raises:
        UserInputError: a kind of address that cannot be a registry.
    """
    if registry_uri is None or registry_uri.rstrip("/") == tracking_uri.rstrip("/"):
        return None
    if is_s3(registry_uri):
        raise UserInputError(
            f"mlflow.registry_uri {registry_uri!r} is not mlflow.tracking_uri, {redact_text(tracking_uri)!r}",
            remedy="a registry on S3 is in the tracking database there: remove registry_uri, or use a server",
        )
    return resolve_tracking_uri(registry_uri)[0]


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme.partition("+")[0]


def _version_of(client: MlflowClient, name: str, run_id: str) -> str | None:
    """The version of a model that a run has registered."""
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return str(versions[0].version) if versions else None


def _own_tags() -> dict[str, str]:
    tags = {"mlflow.source.name": Path(sys.argv[0]).name or "wmtp"}
    # A container can run under a user number that has no name, and a source tree need not be installed.
    with suppress(KeyError, OSError):
        tags["mlflow.user"] = getpass.getuser()
    with suppress(PackageNotFoundError):
        tags["wmtp_version"] = version("wmtp")
    commit = git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    return tags


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
