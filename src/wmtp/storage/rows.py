"""Rows of dataset files as streams: JSON lines, JSON lists and Parquet, plain, gzip or zstandard.

Container and compression are seen from the first bytes, not from names.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as parquet

from wmtp.exceptions import DataError

PARQUET_MAGIC = b"PAR1"
_COMPRESSION_BY_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_PARQUET_BATCH_ROWS = 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: its fields, or the problem that kept them from being read.

    Attributes:
        file: name of the file, relative to the source where that is a directory.
        line: line of a text file, number of the row in a Parquet file; from 1.
        fields: the row's values without those that are null.
        problem: why there are no fields, None when all is well.
        end: bytes of the file up to the end of this row; None where rows cannot be found by bytes (compressed
            files, JSON lists, Parquet).
        element: place of the row in a JSON list, where several rows may share a line; from 1.
    """

    file: str
    line: int
    fields: dict[str, Any]
    problem: str | None = None
    end: int | None = None
    element: int | None = None

    @property
    def number(self) -> int:
        """What tells the row from the others of its file: its element in a JSON list, else its line."""
        return self.line if self.element is None else self.element

    @property
    def row_id(self) -> str:
        """File and line, as in `mbpp.jsonl:12`."""
        return f"{self.file}:{self.line}"


def read_stream_rows(raw: Any, name: str, *, after: int = 0, end: int | None = None) -> Iterator[Row]:
    """Rows of one file in order; blank lines are passed over.

    A row that is not valid JSON, or not an object, comes as a `Row` with a `problem`.

    Args:
        raw: the file, open at its start; seekable where it is plain Parquet, or where `end` is given.
        name: of the file, in messages.
        after: the `number` of the row to go on after; 0 starts with the first. Rows before it are passed over
            unread where the file says where they end, else undecoded where it has lines.
        end: the `end` of that row.

    Raises:
        DataError: the file ends in the middle, is damaged, or a JSON list breaks off; nothing can follow.
    """
    last_line = after
    try:
        rows = _rows_of(raw, name, after) if end is None else _rows_from(raw, name, after, end)
        for row in rows:
            last_line = row.line
            yield row
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{name}: cannot be read after line {last_line}: {type(error).__name__}: {error}",
            remedy="the file is damaged or incomplete; fetch it again",
        ) from error


def _rows_of(raw: Any, name: str, after: int) -> Iterator[Row]:
    """Rows of a file that is read from its start, those after number `after`."""
    stream = _decompressed(raw)
    head = stream.peek(4096)
    if head.startswith(PARQUET_MAGIC):
        # Parquet is read by position, which a compressed stream does not have.
        yield from _parquet_rows(stream if stream.seekable() else io.BytesIO(stream.read()), name, after)
    elif head.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"["):
        yield from islice(_json_list_rows(stream.read(), name), after, None)
    else:
        # Only where bytes of the stream are bytes of the file can a row be found by them again.
        yield from _text_rows(stream, name, after, line=0, at=0 if stream.seekable() else None)


def _rows_from(raw: Any, name: str, after: int, end: int) -> Iterator[Row]:
    """Rows of a plain text file that begin at byte `end`."""
    raw.seek(end)
    yield from _text_rows(io.BufferedReader(raw, buffer_size=_BUFFER_BYTES), name, after, line=after, at=end)


def _text_rows(
    stream: io.BufferedReader, name: str, after: int, *, line: int, at: int | None
) -> Iterator[Row]:
    """Rows of JSON lines; the stream stands after line `line` and, where that is known, at byte `at`."""
    for number, content in enumerate(stream, start=line + 1):
        if at is not None:
            at += len(content)
        if number <= after:
            continue
        stripped = (content.removeprefix(_BYTE_ORDER_MARK) if number == 1 else content).strip()
        if stripped:
            yield replace(_json_row(stripped, name, number), end=at)


def _decompressed(raw: Any) -> io.BufferedReader:
    stream = io.BufferedReader(raw, _BUFFER_BYTES)
    magic = stream.peek(4)[:4]
    for start, compression in _COMPRESSION_BY_MAGIC.items():
        if magic.startswith(start):
            # Arrow's streams read on across zstandard frames and fail on a truncated file; `zstandard`, and
            # fsspec through it, end there without a word.
            content = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), compression)
            return io.BufferedReader(content, _BUFFER_BYTES)
    return stream


def _json_row(content: bytes, name: str, line: int) -> Row:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Row(name, line, {}, problem=f"not valid JSON: {error}")
    return _row(value, name, line)


def _row(value: Any, name: str, line: int) -> Row:
    if not isinstance(value, dict):
        return Row(
            name, line, {}, problem=f"not a JSON object but {type(value).__name__}: {str(value)[:60]!r}"
        )
    return Row(name, line, {key: field for key, field in value.items() if field is not None})


def _json_list_rows(content: bytes, name: str) -> Iterator[Row]:
    """Elements of a JSON list, each with the line it starts on."""
    decoder = json.JSONDecoder()
    at, line, counted, element = 0, 1, 0, 0
    try:
        text = content.decode("utf-8-sig")
        at = _skip_spaces(text, text.index("[") + 1)
        has_more = text[at : at + 1] != "]"
        while has_more:
            line += text.count("\n", counted, at)
            counted = at
            value, at = decoder.raw_decode(text, at)
            element += 1
            yield replace(_row(value, name, line), element=element)
            at = _skip_spaces(text, at)
            has_more = text[at : at + 1] == ","
            if has_more:
                at = _skip_spaces(text, at + 1)
        if text[at:].strip() != "]":
            raise ValueError("expecting ',' or the closing ']'")
    except (ValueError, RecursionError) as error:
        # What follows a break in the list cannot be trusted, so this is never skipped.
        raise DataError(
            f"{name}:{line}: the JSON list is not valid here: {error}",
            remedy="correct the file; JSON lines (one object a line) can be read past a bad row",
        ) from error


def _skip_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _parquet_rows(stream: BinaryIO, name: str, after: int) -> Iterator[Row]:
    number = 0
    with parquet.ParquetFile(pa.PythonFile(stream, mode="r")) as file:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if number + num_rows <= after:
                number += num_rows
                continue
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, row_groups=[group]):
                num_skipped = min(max(0, after - number), batch.num_rows)
                for at, value in enumerate(batch.slice(num_skipped).to_pylist(), number + num_skipped + 1):
                    yield _row(value, name, at)
                number += batch.num_rows
