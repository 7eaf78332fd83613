"""Reading an object front to back at the speed of parallel reads, with its digest taken on the way."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from wmtp.exceptions import StorageDamagedError
from wmtp.storage.s3_client import S3Client
from wmtp.storage.s3_streams import S3Object, read_range


@dataclass(slots=True)
class _Part:
    """A part of the object, on its way or in memory.

    Attributes:
        content: where it arrives; the slice of `buffer` that it needs.
        buffer: the memory, which later parts use again.
        arrived: when it has.
        hashed: when its bytes are in the digest; None where none is taken, or not begun.
    """

    content: memoryview
    buffer: bytearray
    arrived: Future[None]
    hashed: Future[None] | None = None


class SequentialStream(io.RawIOBase):
    """A read-only view of an object from its start to its end, fetched ahead of what is read.

    `s3.max_concurrency` parts of `s3.part_size_mib` are on their way or in memory, and no more is held: each
    is copied once, to where it is read into. With a digest, a thread hashes the parts in order while others
    arrive, and the read that reaches the end raises where it differs, before it gives the last bytes out.
    """

    def __init__(self, client: S3Client, target: S3Object, sha256: str | None = None) -> None:
        self._client = client
        self._target = target
        self._expected = sha256
        self._digest = hashlib.sha256()
        self._position = 0
        self._part_bytes = client.settings.part_size_mib * 2**20
        num_parts = -(-target.size // self._part_bytes)
        num_ahead = min(num_parts, client.settings.max_concurrency)
        self._readers = ThreadPoolExecutor(max(1, num_ahead), thread_name_prefix="s3-read")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="s3-hash")
        self._next_start = 0
        self._ahead: deque[_Part] = deque()  # in order; the first is being read
        self._done: deque[_Part] = deque()  # read, and perhaps not hashed yet
        for _ in range(num_ahead):
            self._fetch_next(bytearray(min(self._part_bytes, target.size)))

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._position

    def readall(self) -> bytes:
        """See `io.RawIOBase`."""
        content = bytearray(self._target.size - self._position)
        at = 0
        while at < len(content):
            at += self.readinto(memoryview(content)[at:])
        return bytes(content)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, across parts; fewer bytes come at the end of the object alone.

        Raises:
            StorageError: the object cannot be had, or was replaced.
            StorageDamagedError: the end is reached and the digest is another.
        """
        view = memoryview(buffer).cast("B")
        count = 0
        while count < len(view) and self._position < self._target.size:
            count += self._copy(view[count:])
        return count

    def close(self) -> None:
        """See `io.RawIOBase`."""
        if not self.closed:
            self._readers.shutdown(wait=False, cancel_futures=True)
            self._hasher.shutdown(wait=False, cancel_futures=True)
            self._ahead.clear()
            self._done.clear()
        super().close()

    def _copy(self, view: memoryview) -> int:
        """Copy what is there of the part at the position, at most as much as fits."""
        part = self._ahead[0]
        part.arrived.result()
        if self._expected is not None and part.hashed is None:
            part.hashed = self._hasher.submit(self._digest.update, part.content)
        offset = self._position % self._part_bytes
        count = min(len(view), len(part.content) - offset)
        if self._position + count == self._target.size:
            self._verify()
        # numpy lets other threads run meanwhile, an assignment of memory views does not.
        source = np.frombuffer(part.content, np.uint8, count, offset)
        np.copyto(np.frombuffer(view, np.uint8, count), source)
        self._position += count
        if offset + count == len(part.content):
            self._done.append(self._ahead.popleft())
            self._reuse_buffers()
        return count

    def _reuse_buffers(self) -> None:
        """Fetch on into the buffers that are read and hashed; wait for one where none is on its way."""
        while self._done and self._next_start < self._target.size:
            part = self._done[0]
            if part.hashed is not None:
                if self._ahead and not part.hashed.done():
                    return
                part.hashed.result()
            self._done.popleft()
            self._fetch_next(part.buffer)

    def _fetch_next(self, buffer: bytearray) -> None:
        start = self._next_start
        self._next_start = min(start + self._part_bytes, self._target.size)
        content = memoryview(buffer)[: self._next_start - start]
        arrived = self._readers.submit(read_range, self._client, self._target, start, content)
        self._ahead.append(_Part(content, buffer, arrived))

    def _verify(self) -> None:
        if self._expected is None:
            return
        for part in (*self._done, *self._ahead):
            if part.hashed is not None:
                part.hashed.result()
        found = self._digest.hexdigest()
        if found != self._expected:
            raise StorageDamagedError(
                f"{self._target.key} has the SHA-256 {found}, not {self._expected}",
                remedy="the object is damaged or another one; write or fetch it again",
            )
