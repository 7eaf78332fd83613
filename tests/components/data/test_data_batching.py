"""The sequence of batches: every feature once an epoch, a function of seed, epoch and position alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from wmtp.components.data import (
    Batch,
    BatchPlan,
    Feature,
    MTPDataCollator,
    TrainingData,
    evaluation_batches,
)

MAX_LENGTH = 16

plan_arguments = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=40),
        "batch_size": st.integers(1, 5),
        "seed": st.integers(0, 3),
        "shuffle": st.booleans(),
        "pack": st.booleans(),
        "max_tokens_per_batch": st.sampled_from([None, 16, 24, 64]),
        "pad_to_multiple_of": st.sampled_from([None, 8]),
    }
)


def make_plan(lengths: list[int], **arguments: Any) -> BatchPlan:
    return BatchPlan(lengths, **{"batch_size": 4, "max_length": MAX_LENGTH, **arguments})


@settings(max_examples=100, deadline=None)
@given(plan_arguments)
def test_an_epoch_visits_every_feature_once(arguments: dict[str, Any]) -> None:
    plan = make_plan(**arguments)
    for epoch in range(3):
        batches = plan.plan_epoch(epoch)
        visited = [index for batch in batches for row in batch for index in row]
        assert sorted(visited) == list(range(len(arguments["lengths"])))
        assert len(batches) == plan.num_batches(epoch)


@settings(max_examples=100, deadline=None)
@given(plan_arguments)
def test_batches_keep_within_rows_and_tokens(arguments: dict[str, Any]) -> None:
    plan = make_plan(**arguments)
    lengths, multiple = arguments["lengths"], arguments["pad_to_multiple_of"] or 1
    for batch in plan.plan_epoch(1):
        row_lengths = [sum(lengths[index] for index in row) for row in batch]
        assert max(row_lengths) <= MAX_LENGTH
        assert arguments["pack"] or all(len(row) == 1 for row in batch)
        if arguments["max_tokens_per_batch"] is None:
            assert len(batch) <= arguments["batch_size"]
        else:
            padded = -(-max(row_lengths) // multiple) * multiple
            assert padded * len(batch) <= arguments["max_tokens_per_batch"]


@settings(max_examples=100, deadline=None)
@given(plan_arguments, st.permutations(list(range(12))))
def test_a_batch_depends_on_its_index_and_not_on_what_was_asked_before(
    arguments: dict[str, Any], order: list[int]
) -> None:
    in_order = make_plan(**arguments)
    expected = [in_order.batch(index) for index in range(12)]
    plan = make_plan(**arguments)
    assert {index: plan.batch(index) for index in order} == dict(enumerate(expected))
    # The global sequence is the epochs' plans one after another.
    epochs: list[Any] = []
    while len(epochs) < 12:
        epochs += in_order.plan_epoch(in_order.locate(len(epochs))[0])
    assert epochs[:12] == expected


def test_seed_and_epoch_change_the_order() -> None:
    lengths = [4] * 64
    plans = [
        make_plan(lengths, seed=seed, pack=False).plan_epoch(epoch) for seed in (0, 1) for epoch in (0, 1)
    ]
    flat = [tuple(index for batch in plan for row in batch for index in row) for plan in plans]
    assert len(set(flat)) == 4


def test_long_rows_do_not_come_first_after_packing() -> None:
    # Best-fit decreasing opens bins for the longest examples first; training must not see them in that order.
    lengths = [16] * 50 + [4] * 200
    rows = [row for batch in make_plan(lengths, batch_size=1).plan_epoch(0) for row in batch]
    is_long = [len(row) == 1 for row in rows]
    assert sum(is_long) == 50
    assert 15 <= sum(is_long[:50]) <= 35


def test_without_shuffling_and_packing_the_order_is_that_of_the_features() -> None:
    plan = make_plan([3, 9, 2, 5, 7], batch_size=2, shuffle=False, pack=False)
    assert plan.plan_epoch(0) == plan.plan_epoch(1) == [[[0], [1]], [[2], [3]], [[4]]]


def test_the_last_batch_of_an_epoch_is_kept_though_smaller() -> None:
    plan = make_plan([4] * 10, batch_size=4, pack=False)
    assert [len(plan.batch(index)) for index in range(6)] == [4, 4, 2, 4, 4, 2]
    assert plan.locate(4) == (1, 1)


def test_a_token_limit_counts_every_row_at_the_length_of_the_longest() -> None:
    plan = make_plan([8, 2, 2], max_tokens_per_batch=16, shuffle=False, pack=False)
    assert plan.plan_epoch(0) == [[[0], [1]], [[2]]]


def test_the_longest_batch_is_the_one_with_most_padded_tokens() -> None:
    plan = make_plan([2, 2, 2, 9, 2, 2, 3], batch_size=3, shuffle=False, pack=False)
    assert plan.longest_batch() == [[3], [4], [5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": []}, "no examples"),
        ({"lengths": [3], "batch_size": 0}, "batch_size is 0"),
        ({"lengths": [3], "max_tokens_per_batch": 0}, "max_tokens_per_batch is 0"),
        ({"lengths": [3, 12], "max_tokens_per_batch": 10, "pack": False}, "row of 12 tokens exceeds"),
        ({"lengths": [3, 17]}, "17 tokens and cannot go into a row of 16"),
    ],
)
def test_plans_that_cannot_be_made_say_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(**arguments)


@pytest.fixture
def features() -> list[Feature]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, MAX_LENGTH + 1, (23,), generator=generator).tolist()
    return [
        {"input_ids": [20 + number] * length, "row_id": f"row:{number}"}
        for number, length in enumerate(lengths)
    ]


@pytest.fixture
def collator(tokenizer: PreTrainedTokenizerFast) -> MTPDataCollator:
    return MTPDataCollator({"tokenizer": tokenizer, "horizon": 3, "pad_to_multiple_of": 8})


def training_data(features: list[Feature], collator: MTPDataCollator, num_workers: int = 0) -> TrainingData:
    plan = make_plan([len(feature["input_ids"]) for feature in features], batch_size=2, pad_to_multiple_of=8)
    return TrainingData(features, plan, collator, num_workers=num_workers)


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(islice(batches, count))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert (
                torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
            ), key


def test_worker_processes_change_nothing(features: list[Feature], collator: MTPDataCollator) -> None:
    count = 3 * training_data(features, collator).plan.num_batches()
    in_process = take(training_data(features, collator).batches(), count)
    with_workers = take(training_data(features, collator, num_workers=2).batches(), count)
    assert_same(in_process, with_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iteration_from_an_index_gives_exactly_the_following_batches(
    features: list[Feature], collator: MTPDataCollator, num_workers: int
) -> None:
    data = training_data(features, collator, num_workers)
    num_batches = data.plan.num_batches()
    whole = take(data.batches(), 2 * num_batches + 3)
    for start in (1, num_batches - 1, num_batches, num_batches + 2):
        resumed = training_data(features, collator, num_workers)
        assert_same(take(resumed.batches(start), 3), whole[start : start + 3])
        assert_same([resumed.batch(start)], [whole[start]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating_leaves_the_global_random_state_alone(
    features: list[Feature], collator: MTPDataCollator, num_workers: int
) -> None:
    before = torch.get_rng_state()
    take(training_data(features, collator, num_workers).batches(), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_batches_hold_every_feature_once_in_order(
    features: list[Feature], collator: MTPDataCollator
) -> None:
    batches = list(evaluation_batches(features, collator, 4))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 4, 4, 3]
    row_ids = [name for batch in batches for row in batch["row_ids"] for name in row]
    assert row_ids == [feature["row_id"] for feature in features]
    assert all((batch["document_ids"] <= 0).all() for batch in batches)
