"""A run whose output is on S3: what is written beside the checkpoints goes there in whole files.

Steps go to S3 directly. Metrics, report, tokenizer, rewarded programs and the export are made in `paths.work`
on this machine, because they are appended to or written by libraries that know local files only, and are
copied from there whenever they are done.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from wmtp.distributed.publishing import (
    MANIFEST_NAME,
    parse_manifest,
    publish_directory,
    read_manifest,
    write_bytes_atomic,
)
from wmtp.exceptions import CheckpointError, StorageError, StorageMissingError
from wmtp.pipelines.environment import RunPaths
from wmtp.settings import Config
from wmtp.storage import PathResolver, S3Manager, create_s3_manager

logger = logging.getLogger(__name__)

# Without these nobody takes a folder for a model, so they are written last, and removed first.
_LAST = ("config.json", MANIFEST_NAME)
# Beside the metrics in the work folder: the MLflow run that wrote what is there.
_MARK_NAME = ".run-id"


class RemoteOutput:
    """Copies folders of a run between this machine and S3; does nothing where the output is local."""

    def __init__(self, config: Config, paths: RunPaths) -> None:
        self._paths = paths
        self._manager: S3Manager | None = None if paths.remote is None else create_s3_manager(config)

    def upload(self, path: Path) -> None:
        """Copy a file or folder of the run to its place on S3; files that are there already are left out.

        Raises:
            StorageError: S3 does not take it.
        """
        if self._manager is None or not path.exists():
            return
        if path.is_file():
            self._put(path)
            return
        files = [file for file in path.rglob("*") if file.is_file()]
        if (path / MANIFEST_NAME).is_file():
            here, there = dict(read_manifest(path)["files"]), self._digests(path)
            if here == there:
                return
            last = [path / name for name in _LAST if (path / name).is_file()]
            self._manager.delete([f"{self._uri(path)}/{name}" for name in reversed(_LAST)])
            names = {file: file.relative_to(path).as_posix() for file in files if file not in last}
            files = [file for file, name in names.items() if name not in there or there[name] != here[name]]
            files = sorted(files) + last
        for file in files:
            self._put(file)

    def try_upload(self, path: Path) -> None:
        """As `upload`, but a failure is a warning: for what a run can do without."""
        try:
            self.upload(path)
        except StorageError as error:
            logger.warning("%s was not copied to %s: %s", path, self._uri(path), error.message)

    def exists(self, path: Path) -> bool:
        """Whether a file or a published folder of the run is on this machine or on S3.

        Raises:
            StorageError: S3 cannot be asked.
        """
        if path.exists():
            return True
        if self._manager is None:
            return False
        uri = self._uri(path)
        return any(self._manager.stat(name) is not None for name in (uri, f"{uri}/{MANIFEST_NAME}"))

    def mark(self, run_id: str | None) -> None:
        """Note whose files are in the work folder from here on: the MLflow run's."""
        if self._manager is not None:
            write_bytes_atomic(self._mark, f"{run_id}\n".encode())

    def download(self, path: Path, *, run_id: str | None) -> None:
        """Copy a folder or file of the run from S3, for a run that goes on elsewhere.

        A file that is here stays if it is of the MLflow run `run_id` too and not shorter than that on S3: it
        may have rows that did not get there.

        Raises:
            StorageError: S3 does not give it.
        """
        if self._manager is None:
            return
        is_own = self._mark.is_file() and self._mark.read_text(encoding="utf-8").strip() == run_id
        uri = self._uri(path)
        for found in self._manager.list_objects(uri):
            inside = found.key.removeprefix(uri)
            if inside and not inside.startswith("/"):
                continue
            target = Path(f"{path}{inside}")
            if is_own and target.exists() and target.stat().st_size >= found.size:
                continue
            _fetch(self._manager, found.key, target)

    @property
    def _mark(self) -> Path:
        return self._paths.report / _MARK_NAME

    def _uri(self, path: Path) -> str:
        return f"{self._paths.remote}/{path.relative_to(self._paths.output).as_posix()}"

    def _put(self, file: Path) -> None:
        assert self._manager is not None
        with open(file, "rb") as source, self._manager.upload(self._uri(file)) as target:
            shutil.copyfileobj(source, target, 2**20)

    def _digests(self, folder: Path) -> dict[str, object]:
        """The files of the folder's manifest on S3; none where there is no whole one."""
        assert self._manager is not None
        try:
            raw, _ = self._manager.read_bytes(f"{self._uri(folder)}/{MANIFEST_NAME}")
            return dict(parse_manifest(raw)["files"])
        except StorageMissingError:
            return {}
        except StorageError:
            raise
        except ValueError:
            return {}


def copy_folder(config: Config, source: str, target: Path) -> None:
    """Copy a folder of another run, local or on S3, to this machine; it appears whole or not at all.

    Raises:
        CheckpointError: there is no such folder.
        StorageError: S3 does not give it.
    """
    kind, resolved = PathResolver().resolve(source)
    with publish_directory(target, replace=True) as staging:
        if kind == "s3":
            manager = create_s3_manager(config)
            for found in manager.list_objects(f"{resolved}/"):
                _fetch(manager, found.key, staging / found.key.removeprefix(f"{resolved}/"))
        elif Path(resolved).is_dir():
            shutil.copytree(resolved, staging, dirs_exist_ok=True)
        if not any(staging.iterdir()):
            raise CheckpointError(f"{source} does not exist", remedy="name the run folder that has it")
        (staging / MANIFEST_NAME).unlink(missing_ok=True)


def _fetch(manager: S3Manager, uri: str, target: Path) -> None:
    """Copy an object to a file, which is replaced once all of it is here."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with manager.stream_model(uri) as source, open(part, "wb") as file:
        shutil.copyfileobj(source, file)
    part.replace(target)
