"""Sources of a stream of examples: their files, whether they are still the same, reading on from a place.

Of several sources rows are taken in turn, each as often as its share of the bytes says, so that all end at
about the same time. Everything here is a function of seed, epoch and files; nothing is drawn while reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import Any, Protocol

import numpy as np

from wmtp.components.data.examples import Example
from wmtp.components.data.formats import Split
from wmtp.components.data.reading import BadRows, DataFile
from wmtp.components.data.unified_loader import (
    MICROCODE_SOURCE,
    FilePosition,
    UnifiedDataLoader,
    read_examples,
)
from wmtp.exceptions import DataError

# What tells two versions of a file apart, where a store has it; the first that is there is taken.
_VERSION_KEYS = ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified")
# Bytes that a generated example is worth against the bytes of files.
_GENERATED_BYTES = 512


class ExampleSource(Protocol):
    """Rows of one source, readable from any position.

    Attributes:
        name: as the recipe names it.
        num_files: how many parts it has, counted in a fixed order.
        num_bytes: their size together, as stored.
        identities: file name -> size and version.
    """

    name: str
    num_files: int
    num_bytes: int
    identities: dict[str, str]

    def read(self, file: int, after: FilePosition) -> Iterator[tuple[FilePosition, list[Example]]]:
        """Rows of part `file` that follow a position: the position behind each, and its examples (some)."""
        ...


class FileSource:
    """The data files of a path or URL.

    Args:
        loader: finds and recognises rows.
        name: as the recipe names it; stands before row ids where `names_rows`.
        path: where it is.
        split: of rows whose split can be told; None takes all.
        names_rows: whether row ids are unique only with the source's name.
    """

    def __init__(
        self, loader: UnifiedDataLoader, name: str, path: str, *, split: Split | None, names_rows: bool
    ) -> None:
        self.name = name
        self._path = path
        self._split = split
        self._prefix = f"{name}:" if names_rows else ""
        self._on_bad_row = loader.settings.on_bad_row
        self._files = loader.files(path, split)
        infos = [file.filesystem.info(file.path) for file in self._files]
        self.num_files = len(self._files)
        self.num_bytes = sum(int(info["size"] or 0) for info in infos)
        self.identities = {file.name: _identity(info) for file, info in zip(self._files, infos, strict=True)}

    def read(self, file: int, after: FilePosition) -> Iterator[tuple[FilePosition, list[Example]]]:
        """Rows of a file that follow a position.

        Raises:
            DataError: a bad row, a damaged file, or one that has changed since the source was opened.
        """
        data_file = self._files[file]
        self._check_unchanged(data_file)
        bad_rows = BadRows(self._on_bad_row)
        for position, examples in read_examples(data_file, self._split, bad_rows, after):
            yield position, [replace(example, row_id=self._prefix + example.row_id) for example in examples]
        bad_rows.warn(self._path)

    def _check_unchanged(self, file: DataFile) -> None:
        file.filesystem.invalidate_cache(file.path)
        found = _identity(file.filesystem.info(file.path))
        if found != self.identities[file.name]:
            raise DataError(
                f"{file.name} of {self._path!r} has changed while the run reads it: it was "
                f"{self.identities[file.name]} and is {found}",
                remedy="keep data as it is during a run; add rows as new files for the next one",
            )


class GeneratedSource:
    """`builtin:microcode`: nothing is stored, so going on means generating again what came before."""

    def __init__(self, loader: UnifiedDataLoader, name: str, *, split: Split, names_rows: bool) -> None:
        self.name = name
        self._loader = loader
        self._split = split
        self._prefix = f"{name}:" if names_rows else ""
        self.num_files = 1
        self.num_bytes = _GENERATED_BYTES * loader.settings.microcode.num_examples
        self.identities = {MICROCODE_SOURCE: repr(loader.settings.microcode)}

    def read(self, file: int, after: FilePosition) -> Iterator[tuple[FilePosition, list[Example]]]:
        """Generated examples from number `after.number` on, one a row."""
        examples = islice(self._loader.stream(MICROCODE_SOURCE, split=self._split), after.number, None)
        for number, example in enumerate(examples, start=after.number + 1):
            yield FilePosition(number), [replace(example, row_id=self._prefix + example.row_id)]


def open_source(
    loader: UnifiedDataLoader, name: str, path: str, *, split: Split, names_rows: bool
) -> ExampleSource:
    """The rows of a source's split, not yet read.

    Raises:
        DataError: nothing is there, or no file of the split.
    """
    if path == MICROCODE_SOURCE:
        return GeneratedSource(loader, name, split=split, names_rows=names_rows)
    return FileSource(loader, name, path, split=split, names_rows=names_rows)


def _identity(info: dict[str, Any]) -> str:
    """Size and version of a file in words, as a user can compare them."""
    size = f"{info['size']} bytes"
    for key in _VERSION_KEYS:
        value = info.get(key)
        if key == "mtime" and value is not None:
            # Microseconds: what `touch -d @SECONDS` can bring back, and a float holds.
            return f"{size}, modified @{float(value):.6f}"
        if value is not None:
            text = value.isoformat() if isinstance(value, datetime) else str(value).strip('"')
            return f"{size}, {key} {text}"
    return size


@dataclass(frozen=True, slots=True)
class SourcePosition:
    """A place in a source, in the order its files have in an epoch.

    Attributes:
        file: files that have been read to their end.
        place: in the file after them.
        num_rows: rows taken from the source in this epoch.
    """

    file: int = 0
    place: FilePosition = field(default_factory=FilePosition)
    num_rows: int = 0


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """A place in the stream of all rows, between two blocks of a shuffle.

    Attributes:
        epoch: passes over all sources that are complete.
        block: blocks of the epoch that are complete.
        sources: a position in each source.
    """

    epoch: int
    block: int
    sources: tuple[SourcePosition, ...]

    @staticmethod
    def start(num_sources: int, epoch: int = 0) -> StreamPosition:
        """The beginning of an epoch."""
        return StreamPosition(epoch, 0, (SourcePosition(),) * num_sources)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts, about 150 bytes a source."""
        sources = [asdict(source) for source in self.sources]
        return {"epoch": self.epoch, "block": self.block, "sources": sources}

    @staticmethod
    def from_json(data: dict[str, Any]) -> StreamPosition:
        """What `to_json` gave."""
        sources = tuple(
            SourcePosition(source["file"], FilePosition(**source["place"]), source["num_rows"])
            for source in data["sources"]
        )
        return StreamPosition(data["epoch"], data["block"], sources)


class _SourceReader:
    """One source in one epoch, a row at a time, with one row looked at ahead."""

    def __init__(
        self, source: ExampleSource, files: Sequence[int], start: SourcePosition, excluded: Collection[str]
    ) -> None:
        self.position = start
        self._share = max(1, source.num_bytes)
        self._rows = _rows(source, files, start, excluded)
        self._next = next(self._rows, None)

    @property
    def has_rows(self) -> bool:
        return self._next is not None

    @property
    def turn(self) -> float:
        """Share of the source that the next row completes; the source that is furthest behind comes first."""
        return (self.position.num_rows + 1) / self._share

    def take(self) -> list[Example]:
        assert self._next is not None
        self.position, examples = self._next
        self._next = next(self._rows, None)
        return examples


def _rows(
    source: ExampleSource, files: Sequence[int], start: SourcePosition, excluded: Collection[str]
) -> Iterator[tuple[SourcePosition, list[Example]]]:
    """Rows of a source with the position behind each; examples whose text is excluded are left out."""
    begin, num_rows = start.place, start.num_rows
    for number in range(start.file, len(files)):
        for place, examples in source.read(files[number], begin):
            kept = [example for example in examples if not excluded or text_hash(example) not in excluded]
            if kept:
                num_rows += 1
                yield SourcePosition(number, place, num_rows), kept
        begin = FilePosition()


def read_epoch(
    sources: Sequence[ExampleSource],
    position: StreamPosition,
    *,
    seed: int,
    shuffle: bool,
    excluded: Collection[str] = frozenset(),
) -> Iterator[tuple[list[Example], tuple[SourcePosition, ...], bool]]:
    """Rows of all sources from a position to the end of its epoch.

    Args:
        sources: what is read.
        position: where to begin.
        seed: with the epoch, of the order of each source's files.
        shuffle: False keeps the files in the order of their names.
        excluded: `text_hash` of examples to leave out.

    Yields:
        A row's examples, the position behind it, and whether it is the epoch's last.

    Raises:
        DataError: a row or file that cannot be used, named with its line.
    """
    readers = []
    for number, (source, start) in enumerate(zip(sources, position.sources, strict=True)):
        files = np.arange(source.num_files)
        if shuffle:
            np.random.Generator(np.random.PCG64([seed, position.epoch, number, 1])).shuffle(files)
        readers.append(_SourceReader(source, files.tolist(), start, excluded))
    while active := [reader for reader in readers if reader.has_rows]:
        reader = min(active, key=lambda reader: reader.turn)
        examples = reader.take()
        is_last = not any(reader.has_rows for reader in readers)
        yield examples, tuple(reader.position for reader in readers), is_last


def text_hash(example: Example) -> str:
    """A name for what the model reads: the same text has the same name wherever it stands."""
    turns = [part for message in example.messages or () for part in (message["role"], message["content"])]
    parts = [part.encode("utf-8", "surrogatepass") for part in (example.prompt, example.completion, *turns)]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def hold_out(
    sources: Sequence[ExampleSource], *, share: float, limit: int, seed: int
) -> tuple[list[Example], frozenset[str]]:
    """Examples for validation, chosen by the hash of their text, and the hashes that training leaves out.

    Of each source the first rows are read until it has given its part of `limit` (by bytes): about
    `limit / share` rows in all, or the whole source where it is smaller. A copy of a held-out text elsewhere
    has the same hash, so it is not trained on either.
    """
    total = sum(source.num_bytes for source in sources) or 1
    held_out: dict[str, Example] = {}
    for source in sources:
        quota = len(held_out) + max(1, round(limit * source.num_bytes / total))
        for example in _first_examples(source):
            if len(held_out) >= min(quota, limit):
                break
            name = text_hash(example)
            draw = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            if int.from_bytes(draw, "little") < share * 2**64:
                held_out[name] = example
    return list(held_out.values()), frozenset(held_out)


def _first_examples(source: ExampleSource) -> Iterator[Example]:
    for file in range(source.num_files):
        for _, examples in source.read(file, FilePosition()):
            yield from examples
