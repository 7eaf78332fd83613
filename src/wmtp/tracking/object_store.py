"""What tracking needs of an object store; `wmtp.storage.S3Manager` is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from wmtp.exceptions import UserInputError

S3_SCHEME = "s3://"


class StoredObject(Protocol):
    """An object in a listing.

    Attributes:
        key: its whole address, `s3://bucket/name`.
        etag: changes with the content.
    """

    @property
    def key(self) -> str: ...  # noqa: D102 - described above

    @property
    def etag(self) -> str: ...  # noqa: D102 - described above


class ObjectStore(Protocol):
    """Objects by key, a key being `s3://bucket/name`."""

    def read_bytes(self, key: str) -> tuple[bytes, str]:
        """Return content and etag.

        Raises:
            StorageMissingError: there is no such object.
        """

    def write_bytes(
        self, key: str, content: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        """Write an object and return its etag.

        Raises:
            StorageConflictError: it exists (`if_absent`), or its etag is another one (`if_match`).
        """

    def list_objects(self, prefix: str) -> Sequence[StoredObject]:
        """All objects whose key starts with `prefix`."""

    def upload(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A stream whose content becomes the object when the block ends without an error."""

    def stream_model(self, key: str) -> BinaryIO:
        """Open an object as a seekable stream."""


# Opened on first need: it costs imports, and most runs are tracked on this machine or on a server.
OpenStore = Callable[[], ObjectStore]


def is_s3(uri: str | None) -> bool:
    """Whether `uri` is an address on S3."""
    return uri is not None and uri.lower().startswith(S3_SCHEME)


def open_object_store(open_store: OpenStore | None, uri: str) -> ObjectStore:
    """The store that `uri` is in.

    Raises:
        UserInputError: the caller gave none.
    """
    if open_store is None:
        raise UserInputError(
            f"{uri} needs access to S3, and none was given",
            remedy="use ComponentFactory.create_mlflow_manager, or pass open_store, e.g. "
            "lambda: create_s3_manager(config)",
        )
    return open_store()
