"""Reading objects: byte ranges straight into memory, and seekable streams made of them."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from wmtp.exceptions import StorageConflictError, StorageDamagedError
from wmtp.storage.s3_client import S3Client

# Read from a connection at a time: between two, the deadline is looked at.
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class S3Object:
    """An object as a listing tells of it.

    Attributes:
        key: its whole address, `s3://bucket/key`.
        size: in bytes.
        etag: what the server calls this content, without quotes.
        modified: when it was written, by the server's clock.
    """

    key: str
    size: int
    etag: str
    modified: datetime


def split_uri(uri: str) -> dict[str, str]:
    """Bucket and key of `s3://bucket/key`, as arguments of a request."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def read_range(client: S3Client, target: S3Object, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes of an object from `start`; what was cut off is taken up where it ended.

    Raises:
        StorageConflictError: the object was replaced since `target` was asked for.
        StorageError: it cannot be had.
    """
    limit = time.monotonic() + client.settings.deadline_s
    num_got = 0

    def fetch() -> None:
        nonlocal num_got
        first, last = start + num_got, start + len(view) - 1
        answer = client.request_once(
            "get_object",
            **split_uri(target.key),
            Range=f"bytes={first}-{last}",
            IfMatch=f'"{target.etag}"',
        )
        with closing(answer["Body"]) as body:
            if answer["ContentLength"] != last - first + 1:
                raise StorageDamagedError(
                    f"{target.key} gave {answer['ContentLength']} bytes, not the {last - first + 1} wanted",
                    remedy="the object or the server is damaged; write the object anew",
                )
            while num_got < len(view):
                count = body.readinto(view[num_got : num_got + _CHUNK_BYTES])
                if count == 0:
                    raise ConnectionResetError(f"the answer ended {len(view) - num_got} bytes early")
                num_got += count
                if time.monotonic() > limit:
                    raise TimeoutError(f"{len(view) - num_got} bytes had not arrived at the deadline")

    try:
        if len(view):
            client.retry(target.key, fetch)
    except StorageConflictError as error:
        raise StorageConflictError(
            f"{target.key} was replaced while it was read", remedy="read it again from its start"
        ) from error


class RangedStream(io.RawIOBase):
    """A seekable, read-only view of an object; each read fetches its range and no more.

    Long reads are made of parts of `s3.part_size_mib`, `s3.max_concurrency` of them at a time, which arrive
    in the memory that was given: nothing is held beside it.
    """

    def __init__(self, client: S3Client, target: S3Object) -> None:
        self._client = client
        self._target = target
        self._position = 0

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._target.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readall(self) -> bytes:
        """See `io.RawIOBase`."""
        # Python's own asks for 8 KiB at a time.
        return self.read(self._target.size - self._position) or b""

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        view = memoryview(buffer).cast("B")
        begin = self._position
        count = max(0, min(len(view), self._target.size - begin))
        size = self._client.settings.part_size_mib * 2**20
        parts = [(begin + at, view[at : min(at + size, count)]) for at in range(0, count, size)]
        if len(parts) == 1:
            read_range(self._client, self._target, *parts[0])
        elif parts:
            self._read_side_by_side(parts)
        self._position = begin + count
        return count

    def _read_side_by_side(self, parts: list[tuple[int, memoryview]]) -> None:
        num_threads = min(len(parts), self._client.settings.max_concurrency)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="s3-read") as threads:
            reads = [threads.submit(read_range, self._client, self._target, *part) for part in parts]
            try:
                for read in reads:
                    read.result()
            finally:
                threads.shutdown(cancel_futures=True)
