"""Dataset files on S3, with the credentials, retries and deadline of the config."""

from __future__ import annotations

from typing import Any, BinaryIO

from wmtp.exceptions import StorageMissingError
from wmtp.storage.s3 import S3Manager


class S3Files:
    """The part of an fsspec filesystem that data files are found and read by; paths are `s3://` addresses.

    Args:
        manager: access to S3.
    """

    def __init__(self, manager: S3Manager) -> None:
        self._manager = manager

    def isfile(self, path: str) -> bool:
        """Whether there is such an object."""
        return not path.endswith("/") and self._manager.stat(path) is not None

    def isdir(self, path: str) -> bool:
        """Whether objects are below it."""
        try:
            self._manager.folder(path)
        except StorageMissingError:
            return False
        return True

    def find(self, path: str) -> list[str]:
        """All objects below it."""
        return [found.key for found in self._manager.list_objects(path.rstrip("/") + "/")]

    def info(self, path: str) -> dict[str, Any]:
        """Size and version of an object.

        Raises:
            StorageMissingError: there is no such object.
        """
        found = self._manager.stat(path)
        if found is None:
            raise StorageMissingError(f"{path} does not exist", remedy="check bucket and key")
        return {"size": found.size, "ETag": found.etag}

    def invalidate_cache(self, path: str) -> None:
        """Nothing is remembered."""

    def open(self, path: str, mode: str) -> BinaryIO:
        """Open an object as a seekable stream of bytes; only what is read is fetched."""
        return self._manager.stream_model(path)
