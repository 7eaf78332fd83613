"""Collators against a naive double loop, and what real features bring along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from wmtp.components.data import LMDataCollator, MTPDataCollator
from wmtp.components.registry import collator_registry
from wmtp.exceptions import DataError

EOS = 0  # the tokenizer's padding id too


class PaddingOnly:
    """What collators need of a tokenizer, for property tests (hypothesis does not take pytest fixtures)."""

    pad_token_id = EOS
    eos_token_id = EOS


def naive_labels(rows: list[list[dict[str, Any]]], width: int, horizon: int) -> list[list[list[int]]]:
    """labels[b][t][h]: token t+h+1 of the same document where it is a target, else -100."""
    result = []
    for row in rows:
        documents = [(n, label) for n, feature in enumerate(row) for label in feature["labels"]]
        grid = [[-100] * horizon for _ in range(width)]
        for t in range(len(documents)):
            for h in range(horizon):
                if t + h + 1 < len(documents) and documents[t + h + 1][0] == documents[t][0]:
                    grid[t][h] = documents[t + h + 1][1]
        result.append(grid)
    return result


@st.composite
def features(draw: st.DrawFn) -> dict[str, Any]:
    input_ids = draw(st.lists(st.integers(0, 5), min_size=1, max_size=7))
    masked = draw(st.lists(st.booleans(), min_size=len(input_ids), max_size=len(input_ids)))
    return {
        "input_ids": input_ids,
        "labels": [-100 if is_masked else i for i, is_masked in zip(input_ids, masked, strict=True)],
    }


rows_of_bins = st.lists(st.lists(features(), min_size=1, max_size=3), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(rows=rows_of_bins, horizon=st.integers(1, 6), multiple=st.sampled_from([None, 1, 4, 8]))
def test_mtp_labels_equal_a_naive_double_loop(
    rows: list[list[dict[str, Any]]], horizon: int, multiple: int | None
) -> None:
    collator = MTPDataCollator(
        {"tokenizer": PaddingOnly(), "horizon": horizon, "pad_to_multiple_of": multiple}
    )
    batch = collator(rows)
    width = batch["input_ids"].shape[1]
    assert batch["labels"].tolist() == naive_labels(rows, width, horizon)
    longest = max(sum(len(feature["input_ids"]) for feature in row) for row in rows)
    assert longest <= width < longest + (multiple or 1)
    assert width % (multiple or 1) == 0


@settings(max_examples=100, deadline=None)
@given(rows=rows_of_bins)
def test_rows_hold_their_documents_side_by_side_and_nothing_else(rows: list[list[dict[str, Any]]]) -> None:
    batch = MTPDataCollator({"tokenizer": PaddingOnly(), "horizon": 2})(rows)
    for b, row in enumerate(rows):
        ids = [i for feature in row for i in feature["input_ids"]]
        labels = [i for feature in row for i in feature["labels"]]
        documents = [n for n, feature in enumerate(row) for _ in feature["input_ids"]]
        positions = [p for feature in row for p in range(len(feature["input_ids"]))]
        padding = batch["input_ids"].shape[1] - len(ids)
        assert batch["input_ids"][b, : len(ids)].tolist() == ids
        assert batch["attention_mask"][b].tolist() == [1] * len(ids) + [0] * padding
        assert batch["token_labels"][b].tolist() == labels + [-100] * padding
        assert batch["document_ids"][b].tolist() == documents + [-1] * padding
        assert batch["position_ids"][b].tolist() == positions + [0] * padding


def test_lengths_5_and_3_with_horizon_4_give_labels_2_5_4(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = MTPDataCollator({"tokenizer": tokenizer, "horizon": 4})(
        [{"input_ids": [11, 12, 13, 14, 15]}, {"input_ids": [21, 22, 23]}]
    )
    assert batch["labels"].shape == (2, 5, 4)
    assert batch["labels"].dtype == torch.long
    assert batch["labels"][0, 0].tolist() == [12, 13, 14, 15]
    assert batch["labels"][1, 0].tolist() == [22, 23, -100, -100]
    assert (batch["labels"][1, 2:] == -100).all()
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "labels",
        "token_labels",
        "document_ids",
        "position_ids",
    }


def test_a_horizon_beyond_the_sequence_leaves_far_heads_without_targets(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    batch = MTPDataCollator({"tokenizer": tokenizer, "horizon": 8})([{"input_ids": [11, 12, 13]}])
    assert batch["labels"].shape == (1, 3, 8)
    assert batch["labels"][0, 0].tolist() == [12, 13] + [-100] * 6


def test_an_end_token_keeps_its_label_where_padding_has_the_same_id(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    batch = MTPDataCollator({"tokenizer": tokenizer, "horizon": 1})(
        [{"input_ids": [11, 12, 13, 14, EOS]}, {"input_ids": [21, 22, EOS]}]
    )
    assert batch["labels"][:, :, 0].tolist() == [
        [12, 13, 14, EOS, -100],
        [22, EOS, -100, -100, -100],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_padding_is_written_with_the_padding_id_where_there_is_one() -> None:
    class Tokenizer:
        def __init__(self, pad_token_id: int | None, eos_token_id: int | None) -> None:
            self.pad_token_id = pad_token_id
            self.eos_token_id = eos_token_id

    for pad, eos, expected in ((3, 2, 3), (None, 2, 2), (None, None, 0)):
        collator = MTPDataCollator({"tokenizer": Tokenizer(pad, eos), "horizon": 1})
        batch = collator([{"input_ids": [5, 5]}, {"input_ids": [5]}])
        assert batch["input_ids"].tolist() == [[5, 5], [5, expected]]


def test_lm_labels_are_unshifted_and_never_cross_into_the_next_document(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    batch = LMDataCollator({"tokenizer": tokenizer})(
        [[{"input_ids": [11, 12]}, {"input_ids": [21, 22, EOS]}], {"input_ids": [31, 32, 33]}]
    )
    assert batch["labels"].tolist() == [[11, 12, -100, 22, EOS], [31, 32, 33, -100, -100]]
    assert batch["token_labels"].tolist() == [[11, 12, 21, 22, EOS], [31, 32, 33, -100, -100]]


def test_both_collators_agree_on_what_head_0_learns(tokenizer: PreTrainedTokenizerFast) -> None:
    bins = [
        [{"input_ids": [11, 12, 13]}, {"input_ids": [21, 22], "labels": [-100, 22]}],
        [{"input_ids": [31]}],
    ]
    mtp = MTPDataCollator({"tokenizer": tokenizer, "horizon": 1})(bins)
    lm = LMDataCollator({"tokenizer": tokenizer})(bins)
    assert torch.equal(mtp["labels"][:, :-1, 0], lm["labels"][:, 1:])


def test_rewards_stand_on_the_last_token_of_their_document(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = MTPDataCollator({"tokenizer": tokenizer, "horizon": 2})(
        [
            [{"input_ids": [1, 2, 3], "reward": 1.0}, {"input_ids": [4, 5]}],
            [{"input_ids": [6, 7], "reward": 0.0}],
        ]
    )
    assert batch["token_rewards"].tolist() == [[0, 0, 1.0, 0, 0], [0.0] * 5]
    # A reward of 0 is known; no reward is not.
    assert batch["reward_mask"].tolist() == [
        [True, True, True, False, False],
        [True, True, False, False, False],
    ]
    assert batch["token_rewards"].dtype == torch.float32


def test_weights_default_to_one_beside_features_that_have_them(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = MTPDataCollator({"tokenizer": tokenizer, "horizon": 2})(
        [[{"input_ids": [1, 2], "weights": [0.5, 2.0]}, {"input_ids": [3]}], [{"input_ids": [4]}]]
    )
    assert batch["token_weights"].tolist() == [[0.5, 2.0, 1.0], [1.0, 0.0, 0.0]]


def test_row_ids_name_every_document_of_every_row(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = MTPDataCollator({"tokenizer": tokenizer, "horizon": 2})(
        [
            [{"input_ids": [1], "row_id": "a:1"}, {"input_ids": [2], "row_id": "a:7"}],
            {"input_ids": [3], "row_id": "a:2"},
        ]
    )
    assert batch["row_ids"] == [["a:1", "a:7"], ["a:2"]]


def test_features_of_a_tokenizer_call_may_be_padded_and_hold_arrays(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoded = tokenizer(["return a", "return"], padding=True, return_tensors="pt")
    features = [{key: value[row] for key, value in encoded.items()} for row in range(2)]
    assert (features[1]["attention_mask"] == 0).any()
    batch = MTPDataCollator({"tokenizer": tokenizer, "horizon": 1})(features)
    num_tokens = int(features[1]["attention_mask"].sum())
    assert batch["attention_mask"][1].sum() == num_tokens
    assert (batch["labels"][1] != -100).sum() == num_tokens - 1


@pytest.mark.parametrize("key", ["lm-data-collator", "mtp-data-collator"])
@pytest.mark.parametrize("collator_settings", [{}, {"tokenizer": None}, {"horizon": 4}])
def test_a_missing_tokenizer_is_a_value_error(key: str, collator_settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        collator_registry.create(key, collator_settings)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"horizon": 0}, "horizon is 0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ({"horizn": 4}, "CollatorSettings has no field horizn"),
    ],
)
def test_settings_that_make_no_sense_are_value_errors(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MTPDataCollator({"tokenizer": PaddingOnly(), **extra})


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "at least one feature"),
        ([[]], "bin without features"),
        ([{"input_ids": []}], "no tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "no tokens"),
        ([{"input_ids": [1, 2], "labels": [1], "row_id": "a:3"}], "a:3 has 2 input_ids but 1 labels"),
        ([{"input_ids": [1, 2], "weights": [1.0] * 3}], "2 input_ids but 3 weights"),
    ],
)
def test_features_that_cannot_be_collated_are_named(features: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MTPDataCollator({"tokenizer": PaddingOnly()})(features)
