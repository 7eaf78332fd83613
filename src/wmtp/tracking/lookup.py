"""Asking MLflow for what runs have recorded: checkpoints by run, files by model version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.exceptions import CheckpointError, ModelLoadError, StorageMissingError
from wmtp.settings.redaction import redact_text
from wmtp.tracking.checkpoint_records import CheckpointRecord, checkpoint_records
from wmtp.tracking.create import tracking_address
from wmtp.tracking.object_store import OpenStore, is_s3, open_object_store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from wmtp.settings import Config

_RUN_URI = re.compile(r"^runs:/(?P<run_id>[0-9a-zA-Z_-]+)/?$")
_MODEL_URI = re.compile(r"^models:/(?P<name>[^/@]+)(/(?P<version>[0-9]+)|@(?P<alias>[^/@]+))$")


def resolve_run_uri(config: Config, uri: str, *, open_store: OpenStore | None = None) -> list[str]:
    """Addresses of the checkpoints recorded in the run `runs:/<id>`, newest first.

    They are what was recorded: some may have been deleted since, to keep the last few only.

    Raises:
        CheckpointError: there is no such run, or it has recorded none.
        UserInputError: the tracking store cannot be used.
    """
    match = _RUN_URI.match(uri)
    if match is None:
        raise CheckpointError(f"{uri!r} does not name a run", remedy="give runs:/<id of an MLflow run>")
    records = checkpoints_of(config, match["run_id"], open_store=open_store)
    if not records:
        address = redact_text(tracking_address(config))
        raise CheckpointError(
            f"the run {match['run_id']} at {address} has recorded no checkpoint",
            remedy="give the folder of its checkpoints",
        )
    return [record.uri for record in records]


def checkpoints_of(
    config: Config, run_id: str, *, open_store: OpenStore | None = None
) -> list[CheckpointRecord]:
    """The checkpoints recorded in a run, newest first.

    Raises:
        CheckpointError: the tracking store does not know the run.
        UserInputError: the tracking store cannot be used.
    """
    from mlflow.exceptions import MlflowException

    address = tracking_address(config)
    unknown = CheckpointError(
        f"MLflow at {redact_text(address)} has no run {run_id}",
        remedy="check the id and mlflow.tracking_uri in the config",
    )
    with _run_client(address, run_id, open_store, unknown) as client:
        try:
            tags = client.get_run(run_id).data.tags
        except MlflowException as error:
            raise unknown from error
    return checkpoint_records(tags)


def download_model_artifact(
    config: Config, uri: str, folder: Path, *, open_store: OpenStore | None = None
) -> Path:
    """Copy the files of a registered model into a local folder; return the folder that holds them.

    Args:
        config: its tracking store and registry.
        uri: `models:/<name>/<version>` or `models:/<name>@<alias>`.
        folder: where they go, or a folder of theirs in it; made where absent.
        open_store: gives access to S3.

    Raises:
        ModelLoadError: there is no such version, or its files cannot be had.
        UserInputError: the registry cannot be used.
    """
    from mlflow.artifacts import download_artifacts as mlflow_download
    from mlflow.exceptions import MlflowException

    from wmtp.tracking.mlflow_artifacts import download_artifacts

    match = _MODEL_URI.match(uri)
    if match is None:
        raise ModelLoadError(
            f"{uri!r} does not name a registered model", remedy="give models:/<name>/<version>"
        )
    folder.mkdir(parents=True, exist_ok=True)
    address = config.mlflow.registry_uri or tracking_address(config)
    with _registry_client(address, open_store) as client:
        try:
            version = (
                match["version"] or client.get_model_version_by_alias(match["name"], match["alias"]).version
            )
            source = client.get_model_version_download_uri(match["name"], str(version))
            if is_s3(source):
                download_artifacts(open_object_store(open_store, source), source, folder)
                return folder
            return Path(
                mlflow_download(artifact_uri=source, dst_path=str(folder), tracking_uri=client.tracking_uri)
            )
        except (MlflowException, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ModelLoadError(
                redact_text(f"{uri} cannot be had from {address}: {reason}"),
                remedy="check the name, the version and mlflow.registry_uri in the config",
            ) from error


@contextmanager
def _run_client(
    address: str, run_id: str, open_store: OpenStore | None, unknown: CheckpointError
) -> Iterator[MlflowClient]:
    """A client that knows the run, on S3 of a copy of its own database."""
    from mlflow.tracking import MlflowClient

    from wmtp.tracking.mlflow_tracker import resolve_tracking_uri
    from wmtp.tracking.run_database import RunDatabase

    if not is_s3(address):
        yield MlflowClient(resolve_tracking_uri(address)[0])
        return
    database = RunDatabase(open_object_store(open_store, address), address)
    try:
        if not database.fetch(run_id):
            raise unknown
        yield MlflowClient(f"sqlite:///{database.path}")
    finally:
        database.close()


@contextmanager
def _registry_client(address: str, open_store: OpenStore | None) -> Iterator[MlflowClient]:
    from mlflow.tracking import MlflowClient

    from wmtp.tracking.mlflow_tracker import resolve_tracking_uri
    from wmtp.tracking.shared_database import shared_copy

    if not is_s3(address):
        uri = resolve_tracking_uri(address)[0]
        yield MlflowClient(uri, uri)
        return
    try:
        with shared_copy(open_object_store(open_store, address), address) as path:
            yield MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}")
    except StorageMissingError as error:
        raise ModelLoadError(
            f"there is no tracking database at {redact_text(address)}",
            remedy="check mlflow.tracking_uri in the config",
        ) from error
