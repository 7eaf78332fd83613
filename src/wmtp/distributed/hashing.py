"""SHA-256 of what is read and written, taken by a second thread meanwhile."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

from wmtp.distributed.checkpoint_store import StepDraft
from wmtp.distributed.safetensors_stream import ByteSink

# Pieces that are read and not yet hashed.
_MAX_PENDING = 4


class HashingWriter:
    """Passes bytes on to a file and hashes them; a second thread hashes while the file takes them."""

    def __init__(self, file: ByteSink, hasher: ThreadPoolExecutor) -> None:
        self._file = file
        self._hasher = hasher
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes | memoryview) -> int:
        """Write everything and return how much that was."""
        hashed = self._hasher.submit(self._digest.update, content)
        self._file.write(content)
        self.size += len(content)
        # The content may be the memory of a temporary tensor.
        hashed.result()
        return len(content)

    def entry(self) -> dict[str, Any]:
        """Size and SHA-256, as a manifest holds them."""
        return {"size": self.size, "sha256": self._digest.hexdigest()}


@contextmanager
def create_hashed(draft: StepDraft, name: str) -> Iterator[HashingWriter]:
    """A new file of a draft that is hashed while it is written."""
    with draft.create(name) as file, ThreadPoolExecutor(1) as hasher:
        yield HashingWriter(file, hasher)


class StreamDigest:
    """SHA-256 of pieces in order, taken by a thread while the next ones are read."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def update(self, piece: memoryview) -> None:
        """Add a piece, whose bytes must stay as they are; waits where too many are still to be hashed."""
        self._pending.append(self._thread.submit(self._digest.update, piece))
        while len(self._pending) > _MAX_PENDING:
            self._pending.popleft().result()

    def finish(self) -> str:
        """The digest of all pieces, in hex."""
        while self._pending:
            self._pending.popleft().result()
        return self._digest.hexdigest()
