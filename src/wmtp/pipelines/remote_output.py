"""A run whose output is on S3: what is written beside the checkpoints goes there in whole files.

Steps go to S3 directly. Metrics, report, tokenizer, rewarded programs and the export are made in `paths.work`
on this machine, because they are appended to or written by libraries that know local files only, and are
copied from there whenever they are done.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from wmtp.distributed.publishing import MANIFEST_NAME, parse_manifest, read_manifest
from wmtp.exceptions import StorageError, StorageMissingError
from wmtp.pipelines.environment import RunPaths
from wmtp.settings import Config
from wmtp.storage import S3Manager, create_s3_manager

logger = logging.getLogger(__name__)

# Read first by whoever opens a folder, so they are written last.
_LAST = ("config.json", MANIFEST_NAME)


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
        published = (path / MANIFEST_NAME).is_file()
        known = self._digests(path) if published else {}
        files = [file for file in path.rglob("*") if file.is_file()]
        digests = read_manifest(path)["files"] if published else {}
        for file in sorted(
            files, key=lambda file: (_LAST.index(file.name) + 1 if file.name in _LAST else 0, file)
        ):
            entry = digests.get(file.relative_to(path).as_posix())
            if entry is None or known.get(file.relative_to(path).as_posix()) != entry:
                self._put(file)

    def try_upload(self, path: Path) -> None:
        """As `upload`, but a failure is a warning: for what a run can do without."""
        try:
            self.upload(path)
        except StorageError as error:
            logger.warning("%s was not copied to %s: %s", path, self._uri(path), error.message)

    def download(self, path: Path) -> None:
        """Copy a folder or file of the run from S3, for a run that goes on elsewhere.

        A file that this machine has stays, unless the one on S3 is longer: what is appended to went on there.

        Raises:
            StorageError: S3 does not give it.
        """
        if self._manager is None:
            return
        uri = self._uri(path)
        for found in self._manager.list_objects(uri):
            inside = found.key.removeprefix(uri)
            if inside and not inside.startswith("/"):
                continue
            target = Path(f"{path}{inside}")
            if target.exists() and target.stat().st_size >= found.size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._manager.stream_model(found.key) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)

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
