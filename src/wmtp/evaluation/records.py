"""Records that survive a killed process: JSON lines, appended and handed to the disk, found again by key."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from wmtp.storage.atomic import write_bytes_atomic

Record = dict[str, Any]

# How long records may wait for the disk. A killed process loses nothing, a machine that stops this much.
_SYNC_INTERVAL_S: Final = 1.0


def key_of(*parts: Any) -> str:
    """Return a key that is equal for equal parts and for nothing else; parts are JSON values."""
    text = json.dumps(parts, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def encode_record(record: Mapping[str, Any]) -> bytes:
    """One line, its end included. Texts may hold lone surrogates (bytes that are no character)."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    return line.encode(errors="backslashreplace")


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file in order; none where it is absent.

    Lines that are no record are left out: a killed process leaves its last line torn.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a whole file at once: it holds all records, or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, b"".join(map(encode_record, records)))


class RecordFile:
    """A file of records that grows; what `append` was given is there after a kill at any moment.

    A line that an earlier process left torn is cut off first, so that the next one stands by itself.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
        _cut_torn_line(path)
        self._last_sync = time.monotonic()

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records in one call to the operating system; now and then wait for the disk."""
        self._file.write(b"".join(map(encode_record, records)))
        self._file.flush()
        if time.monotonic() - self._last_sync >= _SYNC_INTERVAL_S:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk has everything."""
        os.fsync(self._file.fileno())
        self._last_sync = time.monotonic()

    def close(self) -> None:
        """Sync and close; a second call changes nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def _parse(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
