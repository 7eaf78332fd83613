"""Blocks of a stream: examples read one by one and tokenised chunk by chunk, by workers where there are any.

One process reads the rows; workers only tokenise, and their results are taken in order. So no file or
connection is shared with a worker, and the number of workers changes nothing but the time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Generator
from torch.utils.data import DataLoader, Dataset, Sampler

from wmtp.components.data.examples import Example, Feature, TokenizedCount
from wmtp.components.data.streaming_sources import ExampleSource, StreamPosition, read_epoch
from wmtp.components.data.workers import outlive_sigterm
from wmtp.exceptions import DataError, UserInputError, WmtpError

# Examples tokenised in one call.
_CHUNK = 256
_PARALLELISM = "TOKENIZERS_PARALLELISM"


class ChunkTokenizer(Protocol):
    """What a stream needs of a tokenizer; `HfTokenizer` is one."""

    def tokenize_chunk(self, examples: Sequence[Example]) -> tuple[list[Feature], TokenizedCount]:
        """Features of some examples, each tokenised by itself, and what was cut and dropped."""
        ...

    def report(self, count: TokenizedCount) -> None:
        """Warn of what was cut and dropped; an error where nothing is left."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    """How a stream becomes micro-batches; for the sizes see `BatchPlan`.

    Attributes:
        shuffle_buffer: examples of a block.
        num_workers: processes that tokenise ahead, up to one block; 0 tokenises when a block begins.
    """

    batch_size: int
    max_length: int
    shuffle_buffer: int
    seed: int = 0
    shuffle: bool = True
    pack: bool = True
    max_tokens_per_batch: int | None = None
    pad_to_multiple_of: int | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.shuffle_buffer < 1:
            raise UserInputError(f"shuffle_buffer is {self.shuffle_buffer}", remedy="use a positive number")


@dataclass(frozen=True, slots=True)
class Block:
    """Features that are shuffled and packed among themselves, and where the next block begins."""

    features: list[Feature]
    count: TokenizedCount
    after: StreamPosition


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some examples of a block; after its last ones, where the next block begins."""

    examples: list[Example]
    after: StreamPosition | None = None
    error: WmtpError | None = None


@dataclass(frozen=True, slots=True)
class _Tokenized:
    """A chunk's features; `error` is what kept it from being read or tokenised."""

    features: list[Feature]
    count: TokenizedCount
    after: StreamPosition | None
    error: WmtpError | None


class _ChunkReader(Sampler[_Chunk]):
    """Chunks of all blocks from a position on, epoch after epoch; runs where the data loader is iterated."""

    def __init__(
        self,
        sources: Sequence[ExampleSource],
        settings: StreamSettings,
        excluded: frozenset[str],
        start: StreamPosition,
    ) -> None:
        self._sources = sources
        self._settings = settings
        self._excluded = excluded
        self._start = start

    def __iter__(self) -> Iterator[_Chunk]:
        start = self._start
        try:
            while True:
                yield from self._epoch(start)
                start = StreamPosition.start(len(self._sources), start.epoch + 1)
        except WmtpError as error:
            # Raised when its turn comes, so that workers which read ahead do not end a run earlier.
            yield _Chunk([], error=error)

    def _epoch(self, start: StreamPosition) -> Iterator[_Chunk]:
        settings = self._settings
        rows = read_epoch(
            self._sources, start, seed=settings.seed, shuffle=settings.shuffle, excluded=self._excluded
        )
        block, size = start.block, 0
        examples: list[Example] = []
        is_last = False
        for row, sources, is_last in rows:
            examples += row
            size += len(row)
            if is_last:
                yield _Chunk(examples, after=StreamPosition.start(len(sources), start.epoch + 1))
            elif size >= self._block_size(start.epoch, block):
                block, size = block + 1, 0
                yield _Chunk(examples, after=StreamPosition(start.epoch, block, sources))
                examples = []
            elif len(examples) >= _CHUNK:
                yield _Chunk(examples)
                examples = []
        if not is_last:
            names = ", ".join(source.name for source in self._sources)
            raise DataError(f"there are no usable rows in {names}", remedy="check the files")

    def _block_size(self, epoch: int, block: int) -> int:
        """The first block of an epoch is cut short, so that rows do not meet the same rows in every epoch."""
        size = self._settings.shuffle_buffer
        if block or not self._settings.shuffle:
            return size
        generator = np.random.Generator(np.random.PCG64([self._settings.seed, epoch, 0, 2]))
        return size - int(generator.integers(size // 2 + 1))


class _Tokenizing(Dataset[_Tokenized]):
    """Tokenises the chunk it is asked for; runs in the workers."""

    def __init__(self, tokenizer: ChunkTokenizer) -> None:
        self._tokenizer = tokenizer

    def __getitem__(self, chunk: _Chunk) -> _Tokenized:
        if chunk.error is not None:
            return _Tokenized([], TokenizedCount(), None, chunk.error)
        try:
            features, count = self._tokenizer.tokenize_chunk(chunk.examples)
        except WmtpError as error:
            # As a value, because an error raised in a worker comes back as a traceback.
            return _Tokenized([], TokenizedCount(), None, error)
        return _Tokenized(features, count, chunk.after, None)


def read_blocks(
    sources: Sequence[ExampleSource],
    tokenizer: ChunkTokenizer,
    settings: StreamSettings,
    *,
    start: StreamPosition,
    excluded: frozenset[str],
) -> Iterator[Block]:
    """All blocks from the one that begins at `start`, epoch after epoch.

    With workers the next block is read and tokenised while one is in use; the blocks are the same.

    Raises:
        DataError: a row or a file that cannot be used, when its block's turn has come.
    """
    num_workers = settings.num_workers
    chunks_of_a_block = -(-settings.shuffle_buffer // _CHUNK)
    loader = DataLoader(
        _Tokenizing(tokenizer),
        sampler=_ChunkReader(sources, settings, excluded, start),
        batch_size=None,
        collate_fn=_unchanged,  # type: ignore[arg-type]  # without batches it gets one item, not a list
        num_workers=num_workers,
        worker_init_fn=outlive_sigterm,
        prefetch_factor=-(-chunks_of_a_block // num_workers) if num_workers else None,
        # Else the loader draws from the global generator, and a resumed run would differ.
        generator=Generator().manual_seed(0),
    )
    with _single_threaded_tokenizers(num_workers):
        chunks: Iterator[_Tokenized] = iter(loader)
    features: list[Feature] = []
    count = TokenizedCount()
    for chunk in chunks:
        if chunk.error is not None:
            break
        features += chunk.features
        count += chunk.count
        if chunk.after is not None:
            block = Block(features, count, chunk.after)
            del features, chunk
            yield block
            del block
            features, count = [], TokenizedCount()
    error = chunk.error
    # The traceback would keep the workers; their end would then be left to the garbage collector, which takes
    # their queues away first and waits ten seconds for each.
    del chunks, chunk
    assert error is not None, "chunks end with an error"
    raise error


def _unchanged(tokenized: _Tokenized) -> _Tokenized:
    return tokenized


@contextlib.contextmanager
def _single_threaded_tokenizers(num_workers: int) -> Iterator[None]:
    """Worker processes that start inside use one thread each.

    Tokenizers that have used threads turn them off in a forked process anyway, and each then prints a page of
    advice; it reads this variable at the fork.
    """
    before = os.environ.get(_PARALLELISM)
    if num_workers:
        os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if num_workers and before is None:
            del os.environ[_PARALLELISM]
        elif before is not None:
            os.environ[_PARALLELISM] = before
