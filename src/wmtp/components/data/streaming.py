"""Training data that does not fit into memory: read, tokenised, shuffled, packed and batched as it is needed.

The rows of an epoch come in blocks of `shuffle_buffer` examples. A block is planned like a small data set of
its own (`BatchPlan`): shuffled, packed best fit, cut into micro-batches. So a place inside a block, with its
order and its half-filled bins, is the block's start and the number of micro-batches consumed since: a few
numbers. A resumed run reads and tokenises one block again and has exactly the same micro-batches.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wmtp.components.data.batching import BatchPlan, Collator, PlannedBatch
from wmtp.components.data.examples import Batch, Feature, TokenizedCount
from wmtp.components.data.streaming_blocks import Block, ChunkTokenizer, StreamSettings, read_blocks
from wmtp.components.data.streaming_sources import ExampleSource, StreamPosition
from wmtp.exceptions import CheckpointError, UserInputError

# Changed files that a message names.
_NUM_LISTED = 5


@dataclass(frozen=True, slots=True)
class _Mark:
    """Micro-batch `index` is the first of the block at `position`."""

    index: int
    position: StreamPosition


class StreamingData:
    """The endless sequence of micro-batches of data that is read as it is needed.

    At most two blocks are in memory: the one that is trained on and, with workers, the one they prepare. For
    every block begun its position stays, some hundred bytes.

    Args:
        sources: what is read.
        tokenizer: makes features of examples; with workers a copy of it goes to each.
        collator: makes a batch of bins of features.
        settings: sizes, seed, workers.
        excluded: `text_hash` of examples held out for validation.
    """

    def __init__(
        self,
        sources: Sequence[ExampleSource],
        tokenizer: ChunkTokenizer,
        collator: Collator,
        settings: StreamSettings,
        *,
        excluded: frozenset[str] = frozenset(),
    ) -> None:
        self._sources = list(sources)
        self._tokenizer = tokenizer
        self._collator = collator
        self._settings = settings
        self._excluded = excluded
        self._start = StreamPosition.start(len(self._sources))
        self._marks = [_Mark(0, self._start)]
        self._is_reported = False

    def batches(self, start_index: int = 0, state: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Micro-batches `start_index`, `start_index + 1`, ... for ever, epoch after epoch.

        With the state of that index at most one block is read again; without one, all that comes before it.

        Raises:
            CheckpointError: the state is of another index, of data that has changed, or of a run that held
                its data in memory.
            DataError: while iterating, a row or a file that cannot be used.
        """
        if state is None:
            first = _Mark(0, self._start)
        else:
            check_stream_state(state, start_index, self._identities(), self._held_out())
            first = _Mark(state["block_index"], StreamPosition.from_json(state["position"]))
        self._marks = [first]
        return self._iterate(start_index, first)

    def state_at(self, index: int) -> dict[str, Any]:
        """The position after `index` consumed micro-batches, which must have been handed out.

        Returns:
            JSON: where the block of micro-batch `index` begins, and size and version of every file; about 150
            bytes a source and 100 bytes a file.
        """
        mark = self._mark(index)
        return {
            "index": index,
            "block_index": mark.index,
            "position": mark.position.to_json(),
            "files": self._identities(),
            "held_out": self._held_out(),
        }

    def epoch_at(self, index: int) -> int:
        """Epoch of micro-batch `index`, the next one at most of those handed out."""
        return self._mark(index).position.epoch

    def longest_batch(self) -> Batch:
        """The micro-batch of the first block that has any with the most padded tokens.

        Raises:
            DataError: none has.
        """
        count, position = TokenizedCount(), self._start
        for block in self._blocks(self._start, replace(self._settings, num_workers=0)):
            if block.features:
                return self._collate(block.features, self._plan(block.features, position).longest_batch())
            count, position = count + block.count, block.after
            if position.epoch > 0:
                self._tokenizer.report(count)
        raise AssertionError("blocks never end")

    def batches_per_epoch(self) -> None:
        """Not known before an epoch has been read."""

    def _mark(self, index: int) -> _Mark:
        at = bisect_right(self._marks, index, key=lambda mark: mark.index)
        if at == 0:
            raise UserInputError(f"micro-batch {index} comes before those this iteration began with")
        return self._marks[at - 1]

    def _iterate(self, start_index: int, first: _Mark) -> Iterator[Batch]:
        index, position = first.index, first.position
        count, is_whole_epoch = TokenizedCount(), position.block == 0
        for block in self._blocks(position, self._settings):
            plan = self._plan(block.features, position).plan_epoch(0) if block.features else []
            after, count = block.after, count + block.count
            self._marks.append(_Mark(index + len(plan), after))
            yield from self._serve(block.features, plan[max(0, start_index - index) :])
            del block  # its features go before the next block's come
            if after.epoch > position.epoch:
                # What is dropped shows only now; where that is everything, this ends an endless search.
                if is_whole_epoch and not self._is_reported:
                    self._tokenizer.report(count)
                    self._is_reported = True
                count, is_whole_epoch = TokenizedCount(), True
            index, position = index + len(plan), after

    def _serve(self, features: list[Feature], plan: list[PlannedBatch]) -> Iterator[Batch]:
        for planned in plan:
            yield self._collate(features, planned)

    def _collate(self, features: list[Feature], planned: PlannedBatch) -> Batch:
        return self._collator([[features[index] for index in row] for row in planned])

    def _plan(self, features: list[Feature], position: StreamPosition) -> BatchPlan:
        settings = self._settings
        return BatchPlan(
            [len(feature["input_ids"]) for feature in features],
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            seed=(settings.seed, position.epoch, position.block),
            shuffle=settings.shuffle,
            pack=settings.pack,
            max_tokens_per_batch=settings.max_tokens_per_batch,
            pad_to_multiple_of=settings.pad_to_multiple_of,
        )

    def _blocks(self, start: StreamPosition, settings: StreamSettings) -> Iterator[Block]:
        return read_blocks(self._sources, self._tokenizer, settings, start=start, excluded=self._excluded)

    def _identities(self) -> list[dict[str, str]]:
        return [source.identities for source in self._sources]

    def _held_out(self) -> str:
        return hashlib.blake2b(" ".join(sorted(self._excluded)).encode(), digest_size=16).hexdigest()


def check_stream_state(
    state: dict[str, Any], index: int, identities: list[dict[str, str]], held_out: str
) -> None:
    """Refuse a saved position that does not lead to the same micro-batches.

    Args:
        state: what `StreamingData.state_at` gave.
        index: where the run goes on.
        identities: of the files as they are now, for each source.
        held_out: of the examples held out now.

    Raises:
        CheckpointError: naming what differs.
    """
    if "position" not in state:
        raise CheckpointError(
            "the checkpoint is of a run that held its data in memory, and this run streams it",
            remedy="resume with data.train.streaming: false",
        )
    if state["index"] != index:
        raise CheckpointError(
            f"the position in the data was saved after {state['index']} micro-batches, but the run goes on "
            f"after {index}",
            remedy="resume with the train.gradient_accumulation_steps of the run",
        )
    before = {
        (number, name): version
        for number, files in enumerate(state["files"])
        for name, version in files.items()
    }
    now = {
        (number, name): version for number, files in enumerate(identities) for name, version in files.items()
    }
    changes = [
        f"  {key[1]}: {before.get(key, 'not there')} -> {now.get(key, 'not there')}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changes:
        listed = "\n".join(changes[:_NUM_LISTED]) + ("\n  ..." if len(changes) > _NUM_LISTED else "")
        raise CheckpointError(
            f"the data has changed since the checkpoint was saved:\n{listed}",
            remedy="put the files back as they were (where only the time differs, `touch -d @SECONDS FILE` "
            "does), or start a new run",
        )
    if state["held_out"] != held_out:
        raise CheckpointError(
            "other examples are held out for validation than when the checkpoint was saved",
            remedy="resume with the data.eval.max_examples of the run",
        )
