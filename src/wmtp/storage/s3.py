"""S3, and servers that speak its protocol: objects as streams, folders as model sources, conditional writes.

Nothing is copied to this machine's disk: a stream fetches the byte ranges that are read from it, long ones
in parts that are requested side by side, and what is written goes out in parts as they fill up. Every request
is tried as `wmtp.storage.s3_client` says. Built on botocore (`pip install "wmtp[s3]"`), imported on use.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from wmtp.exceptions import DataError, StorageDeniedError, StorageError, StorageMissingError
from wmtp.settings.config import Config, S3Settings
from wmtp.storage.s3_client import S3Client
from wmtp.storage.s3_sequential import SequentialStream
from wmtp.storage.s3_streams import RangedStream, S3Object, split_uri
from wmtp.storage.s3_upload import UploadStream, etag_of, put_object

# What small reads (headers, JSON) are rounded up to.
_BUFFER_BYTES = 1024 * 1024
_MAX_DELETED_AT_ONCE = 1000
_PAGE_SIZE = 1000


def create_s3_manager(config: Config) -> S3Manager:
    """The access to S3 that `config.s3` describes."""
    return S3Manager(config.s3)


class S3Manager:
    """Access to S3 with the settings of a config. Keys without `s3://` are keys of `s3.bucket`.

    Every method raises a `StorageError` of the kind that fits: `StorageMissingError`,
    `StorageCredentialsError`, `StorageDeniedError`, `StorageUnavailableError`, `StorageDamagedError`,
    `StorageFullError`, `StorageConflictError`. It can be shared by threads, pickled, and used in forked
    processes.
    """

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self._client = S3Client(settings)

    # ------------------------------------------------------------------------------------------- reading

    def stream_model(self, key: str) -> BinaryIO:
        """Open an object as a seekable stream; only the ranges that are read are fetched.

        Args:
            key: a key of `s3.bucket`, or `s3://bucket/key`.

        Raises:
            StorageMissingError: there is no such object.
        """
        return cast(
            BinaryIO, io.BufferedReader(RangedStream(self._client, self._require(key)), _BUFFER_BYTES)
        )

    def stream_dataset(self, key: str) -> Iterator[dict[str, Any]]:
        """Rows of a JSONL, JSON or Parquet object, plain, gzip or zstandard, as they arrive.

        Parquet is read by ranges, all else front to back with parts fetched ahead; null fields are left out.

        Raises:
            DataError: a row cannot be read; the message names address and line.
            StorageMissingError: there is no such object.
        """
        from wmtp.storage.rows import PARQUET_MAGIC, read_stream_rows  # pyarrow takes a while to import

        with self.stream_model(key) as ranged:
            is_parquet = ranged.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
            ranged.seek(0)
            with ranged if is_parquet else self.open_sequential(key) as stream:
                for row in read_stream_rows(stream, self.uri(key)):
                    if row.problem is not None:
                        raise DataError(f"{row.row_id}: {row.problem}", remedy="correct the row")
                    yield row.fields

    def open_sequential(self, key: str, *, sha256: str | None = None) -> BinaryIO:
        """Open an object as a stream that is read front to back, with parts fetched ahead.

        Beside what the caller reads into, `s3.max_concurrency` parts of `s3.part_size_mib` are held.
        `readinto` fills its buffer wherever the object is long enough.

        Args:
            key: a key of `s3.bucket`, or `s3://bucket/key`.
            sha256: of the object, in hex; the read that reaches its end raises where it differs.

        Raises:
            StorageMissingError: there is no such object.
        """
        return cast(BinaryIO, SequentialStream(self._client, self._require(key), sha256))

    def read_bytes(self, key: str) -> tuple[bytes, str]:
        """Read an object whole; returns its content and its ETag. A digest that the server keeps is compared.

        Raises:
            StorageMissingError: there is no such object.
        """
        uri = self.uri(key)

        def get() -> tuple[bytes, str]:
            answer = self._client.request_once("get_object", **split_uri(uri), ChecksumMode="ENABLED")
            with closing(answer["Body"]) as body:
                return body.read(), etag_of(answer)

        return self._client.retry(uri, get)

    def stat(self, key: str) -> S3Object | None:
        """Size, ETag and time of an object; None if there is none.

        Raises:
            StorageMissingError: there is no such bucket.
        """
        uri = self.uri(key)
        try:
            found = self._client.request("head_object", uri, **split_uri(uri))
        except StorageMissingError:
            self._ask_for_reason(uri)
            return None
        except StorageDeniedError:
            self._ask_for_reason(uri)
            raise
        return S3Object(uri, int(found["ContentLength"]), etag_of(found), found["LastModified"])

    def list_objects(self, prefix: str) -> list[S3Object]:
        """All objects whose key begins with `prefix`, at any depth, in order of their keys.

        The prefix is text: end it with `/` where a folder is meant.
        """
        uri = self.uri(prefix)
        bucket = split_uri(uri)["Bucket"]
        return [
            S3Object(
                f"s3://{bucket}/{entry['Key']}", int(entry["Size"]), etag_of(entry), entry["LastModified"]
            )
            for page in self._pages(uri)
            for entry in page.get("Contents", ())
            if not entry["Key"].endswith("/")  # what some tools leave in place of a folder
        ]

    def list_folders(self, prefix: str) -> list[str]:
        """Names of the folders directly under a prefix, sorted."""
        return self._list_level(self.uri(prefix))[1]

    def folder(self, key: str) -> S3Folder:
        """The files under a prefix, as the model loaders read them.

        Raises:
            StorageMissingError: nothing is there.
        """
        uri = self.uri(key).rstrip("/")
        files, folders = self._list_level(uri)
        if not files and not folders:
            raise StorageMissingError(f"{uri} does not exist", remedy="check bucket and key")
        return S3Folder(self, uri.removeprefix("s3://"), frozenset(files), tuple(folders))

    # ------------------------------------------------------------------------------------------- writing

    def write_bytes(
        self, key: str, content: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        """Write an object in one request, with a SHA-256 that the server checks; returns its ETag.

        Args:
            key: a key of `s3.bucket`, or `s3://bucket/key`.
            content: all of it.
            if_absent: write only where no such object is.
            if_match: write only over the object with this ETag.

        Raises:
            StorageConflictError: the condition did not hold, and it was not this call itself that broke it in
                a try whose answer was lost.
        """
        return put_object(self._client, self.uri(key), content, if_absent=if_absent, if_match=if_match)

    @contextmanager
    def upload(self, key: str) -> Iterator[BinaryIO]:
        """A stream that writes an object: it appears, whole, at the end of the block, and not if that raises.

        Holds at most `s3.max_concurrency` + 1 parts of `s3.part_size_mib`; the server checks a SHA-256 of
        each. A failure to send is raised by a later `write`, or at the end of the block.
        """
        stream = UploadStream(self._client, self.uri(key))
        try:
            yield cast(BinaryIO, stream)
        except BaseException:
            stream.abort()
            raise
        stream.commit()

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there are fine."""
        by_bucket: dict[str, list[str]] = {}
        for key in keys:
            target = split_uri(self.uri(key))
            by_bucket.setdefault(target["Bucket"], []).append(target["Key"])
        for bucket, names in by_bucket.items():
            for at in range(0, len(names), _MAX_DELETED_AT_ONCE):
                self._delete_some(bucket, names[at : at + _MAX_DELETED_AT_ONCE])

    # ------------------------------------------------------------------------------------------- addresses

    def uri(self, key: str) -> str:
        """The whole address of a key.

        Raises:
            StorageError: the key has no bucket, and `s3.bucket` is not set.
        """
        if key.startswith("s3://"):
            return key
        if self.settings.bucket is None:
            raise StorageError(
                f"{key!r} names no bucket", remedy="give s3://bucket/key, or set s3.bucket in the config"
            )
        return f"s3://{self.settings.bucket}/{key.lstrip('/')}"

    def _require(self, key: str) -> S3Object:
        found = self.stat(key)
        if found is None:
            raise StorageMissingError(f"{self.uri(key)} does not exist", remedy="check bucket and key")
        return found

    def _ask_for_reason(self, uri: str) -> None:
        """Raise why a HEAD request was refused, whose answer has no body to say it in, if a listing tells."""
        target = split_uri(uri)
        self._client.request("list_objects_v2", uri, Bucket=target["Bucket"], Prefix=target["Key"], MaxKeys=1)

    def _pages(self, uri: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        target = split_uri(uri)
        arguments |= {"Bucket": target["Bucket"], "Prefix": target["Key"], "MaxKeys": _PAGE_SIZE}
        while True:
            page = self._client.request("list_objects_v2", uri, **arguments)
            yield page
            if not page["IsTruncated"]:
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _list_level(self, uri: str) -> tuple[list[str], list[str]]:
        """Names of the files and of the folders directly under a prefix, each sorted."""
        folder = uri.rstrip("/") + "/"
        if not split_uri(folder)["Key"].strip("/"):
            folder = f"s3://{split_uri(folder)['Bucket']}/"
        length = len(split_uri(folder)["Key"])
        files: set[str] = set()
        folders: set[str] = set()
        for page in self._pages(folder, Delimiter="/"):
            files.update(entry["Key"][length:] for entry in page.get("Contents", ()))
            folders.update(entry["Prefix"][length:].rstrip("/") for entry in page.get("CommonPrefixes", ()))
        return sorted(files - {""}), sorted(folders - {""})

    def _delete_some(self, bucket: str, names: list[str]) -> None:
        answer = self._client.request(
            "delete_objects",
            f"s3://{bucket}/{names[0]}",
            Bucket=bucket,
            Delete={"Objects": [{"Key": name} for name in names], "Quiet": True},
        )
        refused = [entry for entry in answer.get("Errors", ()) if entry.get("Code") != "NoSuchKey"]
        if refused:
            raise StorageDeniedError(
                f"s3://{bucket}/{refused[0]['Key']} and {len(refused) - 1} more cannot be deleted: "
                f"{refused[0].get('Code')} {refused[0].get('Message', '')}",
                remedy="check what the access key may do",
            )


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
