"""Reading from S3, and from servers that speak its protocol: folders of files, and files as seekable streams.

Nothing is copied to this machine's disk: a stream fetches the byte ranges that are read from it, long ones in
parts that are requested side by side. Built on s3fs (`pip install "wmtp[s3]"`), which is imported on use.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from wmtp.exceptions import StorageError
from wmtp.settings.config import Config, S3Settings

# What small reads (headers, JSON) are rounded up to.
_BUFFER_BYTES = 1024 * 1024
_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 60.0


def create_s3_manager(config: Config) -> S3Manager:
    """The access to S3 that `config.s3` describes."""
    return S3Manager(config.s3)


class S3Manager:
    """Access to S3 with the settings of a config. Keys without `s3://` are keys of `s3.bucket`."""

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self._filesystem = _open_filesystem(settings)

    def stream_model(self, key: str) -> BinaryIO:
        """Open an object as a seekable stream; only the ranges that are read are fetched.

        Args:
            key: a key of `s3.bucket`, or `s3://bucket/key`.

        Raises:
            StorageError: there is no such object, or it cannot be had.
        """
        path = self._path(key)
        with _explained(f"s3://{path}", self.settings):
            size = int(self._filesystem.info(path)["size"])
        stream = _ObjectStream(self._filesystem, path, size, self.settings)
        return cast(BinaryIO, io.BufferedReader(stream, _BUFFER_BYTES))

    def folder(self, key: str) -> S3Folder:
        """The files under a prefix, as the model loaders read them.

        Raises:
            StorageError: nothing is there, or it cannot be had.
        """
        path = self._path(key).rstrip("/")
        files: list[str] = []
        folders: list[str] = []
        with _explained(f"s3://{path}", self.settings):
            for entry in self._filesystem.ls(path, detail=True):
                name = entry["name"].rstrip("/").rpartition("/")[2]
                if entry["name"].rstrip("/") != path:
                    (folders if entry["type"] == "directory" else files).append(name)
        return S3Folder(self, path, frozenset(files), tuple(sorted(folders)))

    def _path(self, key: str) -> str:
        if key.startswith("s3://"):
            return key.removeprefix("s3://")
        if self.settings.bucket is None:
            raise StorageError(
                f"{key!r} names no bucket", remedy="give s3://bucket/key, or set s3.bucket in the config"
            )
        return f"{self.settings.bucket}/{key.lstrip('/')}"


@dataclass(frozen=True, slots=True)
class S3Folder:
    """The files under one prefix: a `wmtp.modeling.formats.sources.ModelSource`."""

    manager: S3Manager
    path: str
    files: frozenset[str]
    folders: tuple[str, ...]

    def names(self) -> frozenset[str]:
        """Names of the files directly under the prefix."""
        return self.files

    def open(self, name: str) -> BinaryIO:
        """Open a file as a seekable stream.

        Raises:
            StorageError: there is no such file, or it cannot be had.
        """
        if name not in self.files:
            raise StorageError(f"{self} has no {name}", remedy="copy the whole folder there again")
        return self.manager.stream_model(f"s3://{self.path}/{name}")

    def find(self, name: str) -> Path | None:
        """Nothing of S3 is on this machine."""
        return None

    def parent(self) -> S3Folder | None:
        """The folder above; None for the root of the bucket."""
        above, _, _ = self.path.rpartition("/")
        return self.manager.folder(f"s3://{above}") if above else None

    def subfolder(self, name: str) -> S3Folder:
        """One of the folders directly under the prefix."""
        return self.manager.folder(f"s3://{self.path}/{name}")

    def subfolders(self) -> list[str]:
        """Names of the folders directly under the prefix, sorted."""
        return list(self.folders)

    def __str__(self) -> str:
        return f"s3://{self.path}"


class _ObjectStream(io.RawIOBase):
    """A seekable, read-only view of an object; each read fetches its range and no more."""

    def __init__(self, filesystem: Any, path: str, size: int, settings: S3Settings) -> None:
        self._filesystem = filesystem
        self._path = path
        self._size = size
        self._settings = settings
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readall(self) -> bytes:
        # Python's own asks for 8 KiB at a time.
        return self.read(self._size - self._position) or b""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size)
        if end <= self._position:
            return 0
        part = self._settings.part_size_mib * 2**20
        starts = list(range(self._position, end, part))
        ends = [min(start + part, end) for start in starts]
        with _explained(f"s3://{self._path}", self._settings):
            parts = self._filesystem.cat_ranges(
                [self._path] * len(starts),
                starts,
                ends,
                batch_size=self._settings.max_concurrency,
                on_error="raise",
            )
        for start, stop, content in zip(starts, ends, parts, strict=True):
            if len(content) != stop - start:
                raise StorageError(
                    f"s3://{self._path} gave {len(content)} bytes where {stop - start} were asked for",
                    remedy="the object was changed or cut off while it was read; try again",
                )
            view[start - self._position : stop - self._position] = content
        count = end - self._position
        self._position = end
        return count


def _open_filesystem(settings: S3Settings) -> Any:
    try:
        import s3fs
    except ImportError as error:
        raise StorageError(
            "s3:// paths need the package s3fs, which is not installed", remedy='pip install "wmtp[s3]"'
        ) from error

    def plain(secret: Any) -> str | None:
        return None if secret is None else str(secret.get_secret_value())

    return s3fs.S3FileSystem(
        key=plain(settings.access_key_id),
        secret=plain(settings.secret_access_key),
        token=plain(settings.session_token),
        endpoint_url=settings.endpoint_url,
        client_kwargs={"region_name": settings.region},
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": settings.max_attempts},
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "max_pool_connections": settings.max_concurrency,
        },
        # Another process may write the folder between two runs of this one.
        use_listings_cache=False,
        skip_instance_cache=True,
    )


@contextmanager
def _explained(uri: str, settings: S3Settings) -> Iterator[None]:
    """Turn what the S3 libraries raise into one message with a remedy."""
    from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

    where = settings.endpoint_url or f"AWS, region {settings.region}"
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{uri} does not exist", remedy="check bucket and key") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StorageError(
            f"{uri} cannot be read: there are no credentials for {where}",
            remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or s3.access_key_id and "
            "s3.secret_access_key",
        ) from error
    except PermissionError as error:
        raise StorageError(
            f"{uri} cannot be read: {where} refuses access ({error})",
            remedy="check the access key, its secret, and what it may read",
        ) from error
    except (BotoCoreError, OSError, TimeoutError) as error:
        raise StorageError(
            f"{uri} cannot be read from {where}: {error}",
            remedy="check s3.endpoint_url and the network, then try again",
        ) from error
