"""The sequence of training batches: a function of (seed, epoch, position) alone.

Shuffle, then pack, then cut into micro-batches; all of it is planned on indices before any work is split, so
workers and ranks take slices of one global sequence and a resumed run goes on with exactly the next batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from wmtp.components.data.examples import Batch, Bin, Feature
from wmtp.components.data.packing import PackingSummary, pack_lengths, summarise_packing
from wmtp.components.data.workers import outlive_sigterm
from wmtp.exceptions import CheckpointError, DataError, UserInputError

Collator = Callable[[Sequence[Feature | Bin]], Batch]

# A micro-batch as indices of features: rows, each the features that share it.
PlannedBatch = list[list[int]]


class MicroBatches(Protocol):
    """An endless sequence of micro-batches that a run can leave and take up again anywhere.

    The sequence is a function of the seed and the data alone; its members are counted from 0 over all epochs.
    """

    def batches(self, start_index: int = 0, state: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Micro-batches `start_index`, `start_index + 1`, ... for ever.

        Args:
            start_index: how many micro-batches have been consumed.
            state: what `state_at(start_index)` gave when the run was saved; None in a fresh run.

        Raises:
            CheckpointError: the state does not fit the data, or was not saved at `start_index`.
        """
        ...

    def state_at(self, index: int) -> dict[str, Any]:
        """The position after `index` consumed micro-batches as JSON, whatever has been prepared ahead."""
        ...

    def epoch_at(self, index: int) -> int:
        """Epoch of micro-batch `index`, the next one after `index` consumed micro-batches."""
        ...

    def longest_batch(self) -> Batch:
        """A micro-batch with as many padded tokens as can be foreseen: what memory is measured on."""
        ...

    def batches_per_epoch(self) -> int | None:
        """Micro-batches in the first epoch; None where that is not known before it has been read."""
        ...


class BatchPlan:
    """Which features go into which micro-batch, for every micro-batch of every epoch.

    An epoch visits every feature once. Its order comes from PCG64 seeded with (seed, epoch); features are
    packed (best fit) into rows of `max_length` tokens, or take a row each; rows are shuffled again, because
    packing puts the longest first; then rows are cut into micro-batches. The last micro-batch of an epoch
    holds what is left and may be smaller; no feature is dropped or carried into the next epoch.

    Args:
        lengths: tokens of each feature.
        batch_size: rows of a micro-batch; not used where `max_tokens_per_batch` is set.
        max_length: tokens a packed row holds.
        seed: of the order of features; several numbers where the seed alone does not tell the plans apart.
        shuffle: False keeps the order of the features (packing still groups them).
        pack: several features share a row.
        max_tokens_per_batch: rows are added while rows x padded length stays within this many tokens.
        pad_to_multiple_of: what the collator rounds row lengths up to; counts towards the limit above.

    Raises:
        DataError: no features, or a row that alone exceeds `max_tokens_per_batch`.
        UserInputError: a size below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        max_length: int,
        seed: int | Sequence[int] = 0,
        shuffle: bool = True,
        pack: bool = True,
        max_tokens_per_batch: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if not lengths:
            raise DataError("there is nothing to train on: the dataset has no examples")
        for name, size in (
            ("batch_size", batch_size),
            ("max_length", max_length),
            ("max_tokens_per_batch", max_tokens_per_batch),
            ("pad_to_multiple_of", pad_to_multiple_of),
        ):
            if size is not None and size < 1:
                raise UserInputError(f"{name} is {size}", remedy="use a positive number")
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._max_length = max_length
        self._seed = [seed] if isinstance(seed, int) else list(seed)
        self._shuffle = shuffle
        self._pack = pack
        self._max_tokens = max_tokens_per_batch
        self._pad_to_multiple_of = pad_to_multiple_of or 1
        self._planned_epoch = 0
        self._planned = self._cut(self._rows(0))
        self._num_batches = [len(self._planned)]  # by epoch, as far as known

    def plan_epoch(self, epoch: int) -> list[PlannedBatch]:
        """All micro-batches of an epoch, in order; the epoch planned last is kept."""
        if self._planned_epoch != epoch:
            self._planned_epoch, self._planned = epoch, self._cut(self._rows(epoch))
        return self._planned

    def num_batches(self, epoch: int = 0) -> int:
        """Micro-batches in an epoch."""
        if self._max_tokens is None:
            # How many bins best fit needs depends on the lengths alone, so all epochs are equally long.
            return self._num_batches[0]
        while len(self._num_batches) <= epoch:
            self._num_batches.append(len(self.plan_epoch(len(self._num_batches))))
        return self._num_batches[epoch]

    def locate(self, index: int) -> tuple[int, int]:
        """Epoch of the global micro-batch `index`, and its position in that epoch.

        With a token limit an epoch's length depends on its order, so earlier epochs are planned once each.
        """
        if index < 0:
            raise UserInputError(f"batch index is {index}", remedy="batches are counted from 0")
        if self._max_tokens is None:
            return divmod(index, self._num_batches[0])
        epoch = 0
        while index >= self.num_batches(epoch):
            index -= self.num_batches(epoch)
            epoch += 1
        return epoch, index

    def batch(self, index: int) -> PlannedBatch:
        """The global micro-batch `index`: rows of feature indices."""
        epoch, position = self.locate(index)
        return self.plan_epoch(epoch)[position]

    def longest_batch(self) -> PlannedBatch:
        """The micro-batch of epoch 0 with the most tokens after padding: what memory is measured on."""
        return max(self.plan_epoch(0), key=lambda rows: len(rows) * max(map(self._padded_length, rows)))

    def summary(self) -> PackingSummary:
        """How full the rows of epoch 0 are, relative to `max_length`."""
        rows = [row for batch in self.plan_epoch(0) for row in batch]
        return summarise_packing(rows, self._lengths, self._max_length)

    def _rows(self, epoch: int) -> list[list[int]]:
        indices = np.arange(len(self._lengths))
        generator = np.random.Generator(np.random.PCG64([*self._seed, epoch]))
        if self._shuffle:
            generator.shuffle(indices)
        order: list[int] = indices.tolist()
        if not self._pack:
            return [[index] for index in order]
        packed = pack_lengths([self._lengths[index] for index in order], self._max_length)
        rows = [[order[position] for position in row] for row in packed]
        if self._shuffle:
            return [rows[at] for at in generator.permutation(len(rows))]
        # Rows keep the order of their first features, so that an unshuffled epoch starts with the first rows.
        return sorted(rows, key=lambda row: row[0])

    def _cut(self, rows: list[list[int]]) -> list[PlannedBatch]:
        if self._max_tokens is None:
            return [rows[at : at + self._batch_size] for at in range(0, len(rows), self._batch_size)]
        batches: list[PlannedBatch] = []
        widest = 0
        for row in rows:
            length = self._padded_length(row)
            if length > self._max_tokens:
                raise DataError(
                    f"a row of {length} tokens exceeds max_tokens_per_batch {self._max_tokens}",
                    remedy="raise data.train.max_tokens_per_batch or lower data.train.max_length",
                )
            if batches and (len(batches[-1]) + 1) * max(widest, length) <= self._max_tokens:
                batches[-1].append(row)
                widest = max(widest, length)
            else:
                batches.append([row])
                widest = length
        return batches

    def _padded_length(self, row: Sequence[int]) -> int:
        multiple = self._pad_to_multiple_of
        return -(-sum(self._lengths[index] for index in row) // multiple) * multiple


class _BinDataset(Dataset[Bin]):
    """Features addressed by the indices that share a row."""

    def __init__(self, features: Sequence[Feature]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, indices: Sequence[int]) -> Bin:
        return [self.features[index] for index in indices]


class _PlanSampler(Sampler[PlannedBatch]):
    """The plan's micro-batches from `start_index` on, without end."""

    def __init__(self, plan: BatchPlan, start_index: int) -> None:
        self._plan = plan
        self._start_index = start_index

    def __iter__(self) -> Iterator[PlannedBatch]:
        index = self._start_index
        while True:
            yield self._plan.batch(index)
            index += 1


class TrainingData:
    """Features, their plan and their collator: an endless sequence of micro-batches with random access.

    Args:
        features: tokenised examples; their lengths must be those the plan was made from.
        plan: which features go into which micro-batch.
        collator: makes a batch of bins of features.
        num_workers: processes that collate ahead; the batches do not depend on it.
    """

    def __init__(
        self, features: Sequence[Feature], plan: BatchPlan, collator: Collator, *, num_workers: int = 0
    ) -> None:
        self.plan = plan
        self._dataset = _BinDataset(features)
        self._collator = collator
        self._num_workers = num_workers

    def batches(self, start_index: int = 0, state: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Micro-batches `start_index`, `start_index + 1`, ... for ever, epoch after epoch.

        Raises:
            CheckpointError: `state` is of a run that streamed its data, or whose examples were others.
        """
        if state is not None:
            self._check(state)
        loader = DataLoader(
            self._dataset,
            batch_sampler=_PlanSampler(self.plan, start_index),
            collate_fn=self._collator,
            num_workers=self._num_workers,
            worker_init_fn=outlive_sigterm,
            # A loader draws a seed for its workers when iteration starts. Without a generator of its own it
            # would draw from the global one, and a resumed run would differ from an uninterrupted one.
            generator=Generator().manual_seed(0),
        )
        return iter(loader)

    def state_at(self, index: int) -> dict[str, Any]:
        """Which examples these are: the index alone says where the sequence goes on."""
        return {"num_examples": len(self._dataset), "digest": self._digest}

    def epoch_at(self, index: int) -> int:
        """Epoch of micro-batch `index`."""
        return self.plan.locate(index)[0]

    def batches_per_epoch(self) -> int:
        """Micro-batches in the first epoch."""
        return self.plan.num_batches(0)

    def batch(self, index: int) -> Batch:
        """Micro-batch `index`, made in this process."""
        return self.collate(self.plan.batch(index))

    def longest_batch(self) -> Batch:
        """The micro-batch of the first epoch with the most padded tokens."""
        return self.collate(self.plan.longest_batch())

    @cached_property
    def _digest(self) -> str:
        """Of tokens and labels of all examples in their order; 64 million tokens take some seconds."""
        digest = hashlib.blake2b(digest_size=16)
        for feature in self._dataset.features:
            for name, ids in (("input_ids", feature["input_ids"]), ("labels", feature.get("labels", ()))):
                digest.update(f"{name} {len(ids)} ".encode() + np.asarray(ids, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def _check(self, state: dict[str, Any]) -> None:
        """Refuse the state of a run that would not have had these micro-batches."""
        if "position" in state:
            raise CheckpointError(
                "the checkpoint is of a run that streamed its data, and this run holds it in memory",
                remedy="resume with data.train.streaming: true",
            )
        if state["digest"] != self._digest:
            raise CheckpointError(
                f"the training examples are not those of the run: it had {state['num_examples']}, and the "
                f"{len(self._dataset)} of now differ from them",
                remedy="put the data back as they were (what data.eval holds out counts too), or start a new "
                "run",
            )

    def collate(self, planned: PlannedBatch) -> Batch:
        """Make the batch of a planned micro-batch."""
        return self._collator([self._dataset[row] for row in planned])


def evaluation_batches(features: Sequence[Feature], collator: Collator, batch_size: int) -> Iterator[Batch]:
    """Every feature once, in order, one a row, `batch_size` rows at a time; the last batch may be smaller."""
    for start in range(0, len(features), batch_size):
        yield collator(list(features[start : start + batch_size]))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch; other entries stay."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
