"""MLflow: the run's place in an experiment, on a SQLite file or a server.

Measured with MLflow 3.17 on two cores: importing it takes 1.1 s, the first use of a SQLite file 1.6 s (68
schema migrations, nearly all of it imports of their modules), opening an existing one 0.01 s, a call 4 ms. So
this module is imported on use, all runs of one output folder share one database, and metrics of a step go in
one call. MLflow's usage reporting is switched off before the import: nothing is sent anywhere but to the
tracking store.
"""

from __future__ import annotations

import getpass
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# The defaults (7 retries, 120 s each) would hold up training for minutes when a server dies.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from wmtp.exceptions import UserInputError
from wmtp.tracking.base import RunStatus, TrackingWarning, flatten_params, git_commit

DATABASE_NAME = "mlflow.db"
ARTIFACTS_NAME = "artifacts"
_SERVER_SCHEMES = ("http", "https", "databricks", "postgresql", "mysql", "mssql")
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_MAX_PER_BATCH = 100
_MAX_TAG = 8000

for _name in ("mlflow.store.db.utils", "alembic", "alembic.runtime.migration", "mlflow.tracking.fluent"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class MLflowManager:
    """One MLflow run: created, or continued under its id.

    Args:
        tracking_uri: `sqlite:///file.db`, a server's address, or a folder, which means SQLite inside that
            folder.
        experiment: e.g. `mtp/baseline-mtp/mbpp`; created where absent.
        run_name: shown by MLflow; None lets it choose.
        run_id: continue this run; if the store does not know it, warn and start one tagged `resumed_from`.
        registry_uri: model registry; default: the tracking store.
        artifact_location: root of artifacts of a new experiment; default: `artifacts` beside the SQLite file,
            or the server's own.
        tags: set on the run, beside user, source, package version and git commit.

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
        registry_uri: str | None = None,
        artifact_location: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.tracking_uri, default_location = resolve_tracking_uri(tracking_uri)
        try:
            self.client = MlflowClient(tracking_uri=self.tracking_uri, registry_uri=registry_uri)
            if run_id is not None and self._continue(run_id):
                self._run_id = run_id
            else:
                experiment_id = self._experiment_id(experiment, artifact_location or default_location)
                run = self.client.create_run(experiment_id, run_name=run_name, tags=_own_tags())
                self._run_id = str(run.info.run_id)
                if run_id is not None:
                    self.set_tags({"resumed_from": run_id})
            self.set_tags(tags or {})
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserInputError(
                f"MLflow cannot be used at {self.tracking_uri}: {_first_line(error)}",
                remedy="Check mlflow.tracking_uri in the config; without it a SQLite file is used.",
            ) from error

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

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one step's metrics in one call."""
        now_ms = int(time.time() * 1000)
        values = [Metric(key, float(value), now_ms, step) for key, value in metrics.items()]
        self.client.log_batch(self._run_id, metrics=values)

    def log_artifact(self, path: str | os.PathLike[str], folder: str | None = None) -> None:
        """Copy a file, or a folder with all it holds, into the run's artifacts."""
        if Path(path).is_dir():
            self.client.log_artifacts(self._run_id, os.fspath(path), folder)
        else:
            self.client.log_artifact(self._run_id, os.fspath(path), folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a value longer than MLflow allows is cut."""
        if tags:
            entries = [RunTag(key, str(value)[:_MAX_TAG]) for key, value in tags.items()]
            self.client.log_batch(self._run_id, tags=entries)

    def finish(self, status: RunStatus = "finished") -> None:
        """Mark the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self._run_id, status=_STATUS[status])

    def _continue(self, run_id: str) -> bool:
        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            warnings.warn(
                f"MLflow at {self.tracking_uri} has no run {run_id}; a new run is started. "
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
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).expanduser().absolute()
    else:
        scheme = urlsplit(uri).scheme
        if scheme.partition("+")[0] in _SERVER_SCHEMES:
            return uri, None
        if scheme not in ("", "file"):
            raise UserInputError(
                f"mlflow.tracking_uri {uri!r} is of the unknown kind {scheme!r}.",
                remedy="Use a folder, sqlite:///file.db, or the address of an MLflow server (http, https).",
            )
        path = Path(uri.removeprefix("file://")).expanduser().absolute() / DATABASE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserInputError(
            f"The folder {path.parent} for MLflow cannot be made: {error.strerror}.",
            remedy="Set mlflow.tracking_uri to a place that can be written.",
        ) from error
    return f"sqlite:///{path}", (path.parent / ARTIFACTS_NAME).as_uri()


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
