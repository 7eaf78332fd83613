"""Best-fit-decreasing packing of examples into rows of a fixed number of tokens.

Examples are never split. Best-fit decreasing needs at most 11/9 of the best possible number of bins, plus one
(Johnson 1973); on text, where lengths vary, it typically fills more than 99% of the tokens. Lengths are small
integers, so bins are kept by their free space and a fit is found by bisection: 10^6 examples take seconds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from wmtp.exceptions import DataError


@dataclass(frozen=True, slots=True)
class PackingSummary:
    """How well a packing filled its rows.

    Attributes:
        num_examples: examples packed.
        num_bins: rows they take.
        minimum_bins: rows no packing can do without, ceil(tokens / capacity).
        fill_ratio: tokens / (rows * capacity); the rest is padding.
    """

    num_examples: int
    num_bins: int
    minimum_bins: int
    fill_ratio: float


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack examples into bins of at most `capacity` tokens.

    Longest first, each into the fullest bin that still has room, a new one where none has. Ties are settled
    (the earlier example first, the latest touched bin first), so the result is a function of the arguments.

    Args:
        lengths: tokens of each example, at least 1.
        capacity: tokens a bin holds.

    Returns:
        Bins of indices into `lengths`, each index once; ascending within a bin; bins in order of opening.

    Raises:
        DataError: an example is empty or longer than `capacity`.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise DataError(
                f"example {index} has {length} tokens and cannot go into a row of {capacity}",
                remedy="truncate examples to the row length (data.train.max_length) and drop empty ones",
            )
    bins: list[list[int]] = []
    bins_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of bins_by_space, ascending

    def set_space(bin_index: int, space: int) -> None:
        if space not in bins_by_space:
            bins_by_space[space] = []
            insort(spaces, space)
        bins_by_space[space].append(bin_index)

    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(spaces, length)
        if at == len(spaces):
            bins.append([index])
            set_space(len(bins) - 1, capacity - length)
            continue
        space = spaces[at]
        bin_index = bins_by_space[space].pop()
        if not bins_by_space[space]:
            del bins_by_space[space], spaces[at]
        bins[bin_index].append(index)
        set_space(bin_index, space - length)
    return [sorted(indices) for indices in bins]


def summarise_packing(bins: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> PackingSummary:
    """Count what a packing of `lengths` into rows of `capacity` tokens wasted."""
    num_tokens = sum(lengths[index] for indices in bins for index in indices)
    return PackingSummary(
        num_examples=sum(len(indices) for indices in bins),
        num_bins=len(bins),
        minimum_bins=-(-num_tokens // capacity),
        fill_ratio=num_tokens / (len(bins) * capacity) if bins else 1.0,
    )
