"""Packing: every example once, no bin over size, little waste, always the same."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp.components.data import pack_lengths, summarise_packing
from wmtp.exceptions import DataError


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of bins, by trying every bin for every example."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda index: spaces[index])] -= length
        else:
            spaces.append(capacity - length)
    return len(spaces)


packings = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


@given(packings)
def test_every_example_is_packed_once_and_no_bin_overflows(packing: tuple[list[int], int]) -> None:
    lengths, capacity = packing
    bins = pack_lengths(lengths, capacity)
    assert sorted(index for indices in bins for index in indices) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in indices) <= capacity for indices in bins)


@given(packings)
def test_the_number_of_bins_is_that_of_best_fit_decreasing(packing: tuple[list[int], int]) -> None:
    lengths, capacity = packing
    bins = pack_lengths(lengths, capacity)
    assert len(bins) == naive_best_fit_decreasing(lengths, capacity)
    # No two bins fit into one, so at most one is half empty.
    assert len(bins) <= 2 * summarise_packing(bins, lengths, capacity).minimum_bins


@given(packings, st.randoms(use_true_random=False))
def test_the_number_of_bins_does_not_depend_on_the_order(
    packing: tuple[list[int], int], rng: random.Random
) -> None:
    lengths, capacity = packing
    shuffled = list(lengths)
    rng.shuffle(shuffled)
    assert len(pack_lengths(lengths, capacity)) == len(pack_lengths(shuffled, capacity))
    assert pack_lengths(lengths, capacity) == pack_lengths(list(lengths), capacity)


def test_an_example_goes_where_it_leaves_least_space() -> None:
    # Into the emptiest bin instead, the 3 would go beside the 6, and the last 2 would need a third bin.
    assert pack_lengths([7, 6, 3, 2, 2], 10) == [[0, 2], [1, 3, 4]]


def test_lengths_as_of_text_fill_more_than_99_percent() -> None:
    rng = random.Random(0)
    lengths = [min(int(rng.lognormvariate(5, 0.8)) + 1, 2048) for _ in range(20_000)]
    summary = summarise_packing(pack_lengths(lengths, 2048), lengths, 2048)
    assert summary.num_examples == 20_000
    assert summary.fill_ratio > 0.99
    assert summary.num_bins <= summary.minimum_bins + 5


@pytest.mark.parametrize("lengths", [[3, 9, 2], [3, 0]])
def test_an_example_that_fits_no_bin_is_named(lengths: list[int]) -> None:
    with pytest.raises(DataError, match=f"example 1 has {lengths[1]} tokens and cannot go into a row of 8"):
        pack_lengths(lengths, 8)
