"""Artifacts on S3, written and read with the credentials of `config.s3`.

MLflow's own way there needs the package boto3, which pins another botocore than s3fs, and takes endpoint and
credentials from the environment alone. The files are the same: `<artifact_uri>/<folder>/<name>`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from wmtp.exceptions import StorageError
from wmtp.tracking.object_store import ObjectStore

_CHUNK_BYTES = 8 * 1024 * 1024


def upload_artifacts(store: ObjectStore, uri: str, path: str | os.PathLike[str], folder: str | None) -> None:
    """Copy a file, or all files of a folder, to `folder` under the artifact address of a run."""
    root = Path(path)
    base = uri.rstrip("/") if folder is None else f"{uri.rstrip('/')}/{folder.strip('/')}"
    if root.is_dir():
        files = {
            file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()
        }
    else:
        files = {root.name: root}
    for name, file in files.items():
        with file.open("rb") as source, store.upload(f"{base}/{name}") as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)


def download_artifacts(store: ObjectStore, uri: str, folder: Path) -> None:
    """Copy all objects under an address into a local folder.

    Raises:
        StorageError: there are none, or one has a name that leads out of the folder.
    """
    prefix = f"{uri.rstrip('/')}/"
    objects = store.list_objects(prefix)
    if not objects:
        raise StorageError(f"{uri} holds no files", remedy="check the address")
    for stored in objects:
        name = stored.key.removeprefix(prefix)
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise StorageError(f"{stored.key} leads out of its folder", remedy="remove the object")
        target.parent.mkdir(parents=True, exist_ok=True)
        with store.stream_model(stored.key) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, _CHUNK_BYTES)
