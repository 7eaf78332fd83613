"""Rows of dataset files, with file and line: JSON lines, JSON lists and Parquet, plain, gzip or zstandard.

Files are opened with fsspec (local, hub, ...), those on S3 as the config says, and read as streams, see
`wmtp.storage.rows`. Names only decide which files of a directory hold data.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec

from wmtp.components.data.s3_files import S3Files
from wmtp.exceptions import DataError, StorageError
from wmtp.settings.config import S3Settings
from wmtp.storage.rows import Row, read_stream_rows
from wmtp.storage.s3 import S3Manager

logger = logging.getLogger(__name__)

OnBadRow = Literal["fail", "skip"]

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSION_SUFFIXES = ("", ".gz", ".zst")
# Descriptions that dataset tools leave beside the data.
_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class BadRows:
    """What to do with rows that cannot be used: stop at the first, or skip them and say so at the end."""

    def __init__(self, on_bad_row: OnBadRow) -> None:
        self._on_bad_row = on_bad_row
        self.num_skipped = 0
        self.first: str | None = None

    def report(self, row_id: str, problem: str, *, remedy: str | None = None) -> None:
        """Raise a DataError naming file and line, or count the row as skipped."""
        message = f"{row_id}: {problem}"
        if self._on_bad_row == "fail":
            hint = "correct the row, or set data.on_bad_row: skip to go on without such rows"
            raise DataError(message, remedy=hint if remedy is None else f"{remedy}; {hint}")
        self.num_skipped += 1
        if self.first is None:
            self.first = message

    def warn(self, source: str) -> None:
        """Log how many rows of `source` were skipped, with the first as an example."""
        if self.num_skipped:
            logger.warning("%s: skipped %d bad row(s); the first: %s", source, self.num_skipped, self.first)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of a source: the filesystem that has it, and what it is called in messages.

    `is_named` tells a file that the user named from one found in a directory.
    """

    filesystem: Any
    path: str
    name: str
    is_named: bool


def list_data_files(source: str, s3: S3Settings | None = None) -> list[DataFile]:
    """The data files of a path or URL: the file itself, or those below a directory, in order of their names.

    Args:
        source: path or URL.
        s3: access to `s3://` sources; None takes what the environment gives.

    Raises:
        DataError: nothing is there, a directory holds no data files, or the place cannot be reached.
        StorageError: S3 does not give it.
    """
    try:
        return _list_data_files(source, s3)
    except (DataError, StorageError):
        raise
    except (ImportError, ValueError) as error:
        raise DataError(
            f"cannot open {source!r}: {error}",
            remedy="use a local path, s3://..., or a URL that fsspec knows (gs:// needs the package gcsfs)",
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot open {source!r}: {type(error).__name__}: {error}",
            remedy="check that the path can be reached and read",
        ) from error


def _list_data_files(source: str, s3: S3Settings | None) -> list[DataFile]:
    filesystem: Any
    if source.startswith("s3://"):
        filesystem, path = S3Files(S3Manager(s3 or S3Settings())), source
    else:
        filesystem, path = fsspec.core.url_to_fs(source)
    if filesystem.isfile(path):
        return [DataFile(filesystem, path, posixpath.basename(path), is_named=True)]
    if not filesystem.isdir(path):
        raise DataError(
            f"dataset {source!r} does not exist",
            remedy="check the path (relative ones start at the working directory); "
            "a Hugging Face dataset is hf://datasets/org/name",
        )
    below = sorted(filesystem.find(path))
    root = path.rstrip("/") + "/"
    files = [DataFile(filesystem, file, file.removeprefix(root), is_named=False) for file in below]
    found = [file for file in files if _is_data_file(file.name)]
    if not found:
        some = ", ".join(file.name for file in files[:5]) or "nothing"
        raise DataError(
            f"directory {source!r} holds no data files; it holds {some}",
            remedy=f"data files end in {', '.join(DATA_SUFFIXES)}, with or without .gz or .zst",
        )
    return found


def read_rows(file: DataFile, *, after: int = 0, end: int | None = None) -> Iterator[Row]:
    """Rows of one file, as `wmtp.storage.rows.read_stream_rows` gives them.

    Raises:
        DataError: the file cannot be opened, ends in the middle, is damaged, or a JSON list breaks off.
    """
    try:
        raw = file.filesystem.open(file.path, "rb")
    except OSError as error:
        raise DataError(
            f"{file.name}: cannot be read after line {after}: {type(error).__name__}: {error}",
            remedy="check that the path can be reached and read",
        ) from error
    with raw:
        yield from read_stream_rows(raw, file.name, after=after, end=end)


def _is_data_file(name: str) -> bool:
    parts = name.split("/")
    if any(part.startswith((".", "_")) for part in parts) or parts[-1] in _METADATA_FILES:
        return False
    return name.lower().endswith(tuple(a + b for a in DATA_SUFFIXES for b in COMPRESSION_SUFFIXES))
