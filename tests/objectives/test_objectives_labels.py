"""Label shift, normalizers and the spreading of token weights over (position, head) pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.objectives import (
    IGNORE_INDEX,
    count_positions,
    count_targets,
    index_by_token,
    loss_normalizer,
    position_scores,
    shift_labels,
    spread_weights,
    valid_tokens,
)


@st.composite
def packed_batches(draw):
    """Rows of packed documents with right padding and masked tokens: (labels_BS, document_ids_BS)."""
    num_rows, seq_len = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    labels, documents = [], []
    for _ in range(num_rows):
        row = []
        for index, length in enumerate(draw(st.lists(st.integers(1, 5), max_size=4))):
            row += [index] * length
        row = (row + [-1] * seq_len)[:seq_len]
        tokens = [draw(st.integers(0, 50)) if document >= 0 else IGNORE_INDEX for document in row]
        masked = [IGNORE_INDEX if draw(st.integers(0, 4)) == 0 else token for token in tokens]
        labels.append(masked)
        documents.append(row)
    return torch.tensor(labels), torch.tensor(documents)


def naive_shift(labels, documents, offsets):
    num_rows, seq_len = len(labels), len(labels[0])
    result = [[[IGNORE_INDEX] * len(offsets) for _ in range(seq_len)] for _ in range(num_rows)]
    for b in range(num_rows):
        for t in range(seq_len):
            for h, offset in enumerate(offsets):
                if t + offset >= seq_len:
                    continue
                if documents is not None and (
                    documents[b][t] < 0 or documents[b][t] != documents[b][t + offset]
                ):
                    continue
                result[b][t][h] = labels[b][t + offset]
    return torch.tensor(result)


def test_worked_example_of_the_docstring():
    labels = torch.tensor([[10, 11, 12, 20, 21, -100]])
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    shifted = shift_labels(labels, 3, document_ids_BS=documents)
    assert shifted[0, :, 0].tolist() == [11, 12, -100, 21, -100, -100]
    assert shifted[0, :, 1].tolist() == [12, -100, -100, -100, -100, -100]
    assert shifted[0, :, 2].tolist() == [-100] * 6


def test_a_masked_position_still_predicts_a_target():
    # prompt of two tokens: its last position predicts the first token of the completion
    shifted = shift_labels(torch.tensor([[-100, -100, 7, 8]]), 2)
    assert shifted[0].tolist() == [[-100, 7], [7, 8], [8, -100], [-100, -100]]


@given(batch=packed_batches(), horizon=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_labels_never_cross_a_document_boundary(batch, horizon):
    labels, documents = batch
    shifted = shift_labels(labels, horizon, document_ids_BS=documents)
    expected = naive_shift(labels.tolist(), documents.tolist(), range(1, horizon + 1))
    assert torch.equal(shifted, expected)


def test_without_document_ids_a_row_is_one_document():
    labels = torch.arange(12).reshape(2, 6)
    assert torch.equal(shift_labels(labels, 4), naive_shift(labels.tolist(), None, range(1, 5)))


def test_offsets_replace_the_contiguous_default():
    labels = torch.arange(8).reshape(1, 8)
    shifted = shift_labels(labels, 3, offsets=[1, 4, 9])
    assert torch.equal(shifted, naive_shift(labels.tolist(), None, [1, 4, 9]))


def test_a_horizon_beyond_the_sequence_leaves_far_heads_without_targets():
    shifted = shift_labels(torch.tensor([[3, 4]]), 5)
    assert shifted.tolist() == [[[4, -100, -100, -100, -100], [-100] * 5]]


def test_padding_has_no_targets_even_when_its_labels_were_not_masked():
    labels, documents = torch.tensor([[1, 2, 9, 9]]), torch.tensor([[0, 0, -1, -1]])
    assert shift_labels(labels, 1, document_ids_BS=documents)[0, :, 0].tolist() == [2, -100, -100, -100]


def test_ignore_index_marks_what_has_no_target():
    shifted = shift_labels(torch.tensor([[1, -1, 3]]), 1, ignore_index=-1)
    assert shifted[0, :, 0].tolist() == [-1, 3, -1]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"horizon": 0}, "horizon is 0"),
        ({"horizon": 2, "offsets": [1]}, r"offsets \[1\]"),
        ({"horizon": 2, "offsets": [0, 1]}, r"offsets \[0, 1\]"),
        ({"horizon": 1, "document_ids_BS": torch.zeros(1, 4, dtype=torch.long)}, r"\(1, 4\).*\(1, 3\)"),
    ],
)
def test_shift_refuses_what_does_not_fit(arguments, match):
    with pytest.raises(ValueError, match=match):
        shift_labels(torch.tensor([[1, 2, 3]]), **arguments)


def test_shift_refuses_labels_that_are_not_two_dimensional():
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        shift_labels(torch.zeros(1, 2, 3), 1)


def test_normalizers_count_positions_pairs_and_targets_of_each_head():
    labels = torch.tensor([[[5, 6], [7, -100], [-100, -100]], [[-100, 3], [-100, -100], [1, 1]]])
    assert count_positions(labels).item() == 4
    assert count_targets(labels).tolist() == [3, 3]
    assert loss_normalizer(labels).item() == 4
    assert loss_normalizer(labels, "token").item() == 6
    assert loss_normalizer(labels, "head_sum").tolist() == [3, 3]
    with pytest.raises(ValueError, match="mean"):
        loss_normalizer(labels, "mean")


@given(batch=packed_batches(), horizon=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_normalizers_of_the_parts_add_up_to_the_whole(batch, horizon):
    labels, documents = batch
    shifted = shift_labels(labels, horizon, document_ids_BS=documents)
    for reduction in ("position", "token", "head_sum"):
        parts = sum(loss_normalizer(part, reduction) for part in shifted.split(1))
        assert torch.equal(parts, loss_normalizer(shifted, reduction))


@given(batch=packed_batches(), horizon=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_every_pair_with_a_target_gets_the_weight_of_the_token_it_predicts(batch, horizon):
    labels, documents = batch
    num_rows, seq_len = labels.shape
    # a weight that names its token: row * 100 + index
    weights = (torch.arange(num_rows)[:, None] * 100 + torch.arange(seq_len)).float()
    labels_BSH = shift_labels(labels, horizon, document_ids_BS=documents)
    spread = spread_weights(weights, horizon)
    by_position = spread_weights(weights, horizon, scope="position")
    for b, t, h in (labels_BSH != IGNORE_INDEX).nonzero().tolist():
        assert spread[b, t, h] == b * 100 + t + h + 1
        assert by_position[b, t, h] == b * 100 + t
        # and that token is one that head 0 is trained on: what is valid for scoring covers every target
        assert valid_tokens(labels_BSH)[b, t + h + 1]


def test_spread_follows_the_offsets():
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    spread = spread_weights(weights, 2, offsets=[1, 3])
    assert spread[0].tolist() == [[2.0, 4.0], [3.0, 0.0], [4.0, 0.0], [0.0, 0.0]]


def test_spread_refuses_the_head_scope():
    with pytest.raises(ValueError, match="head"):
        spread_weights(torch.ones(1, 2), 2, scope="head")


def test_token_and_position_indices_are_one_apart():
    by_position = torch.tensor([[1.0, 2.0, 3.0]])
    by_token = index_by_token(by_position)
    assert by_token.tolist() == [[0.0, 1.0, 2.0]]
    assert position_scores(by_token).tolist() == [[1.0, 2.0, 0.0]]


def test_a_documents_first_token_is_never_valid():
    labels = shift_labels(torch.tensor([[4, 5, 6, 7]]), 2, document_ids_BS=torch.tensor([[0, 0, 1, 1]]))
    assert valid_tokens(labels).tolist() == [[False, True, False, True]]
