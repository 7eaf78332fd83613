"""Scores and advantages against float64 loops over one document at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from wmtp.objectives import (
    excess_loss,
    explained_variance,
    generalized_advantages,
    index_by_token,
    roc_auc,
    shift_labels,
    spread_weights,
    token_cross_entropy,
    value_deltas,
)


def naive_document(rewards, values, gamma, lam):
    """One document without holes: advantages from the far end, then the targets of V_t."""
    num_tokens = len(values)
    received = [sum(rewards[: t + 1]) for t in range(num_tokens)]
    to_come = [values[t] - received[t] for t in range(num_tokens)]
    advantages = [0.0] * num_tokens
    following = 0.0
    for t in reversed(range(num_tokens)):
        is_last = t == num_tokens - 1
        reward = 0.0 if is_last else rewards[t + 1]
        bootstrap = 0.0 if is_last else to_come[t + 1]
        following = reward + gamma * bootstrap - to_come[t] + gamma * lam * following
        advantages[t] = following
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def naive_batch(rewards, values, valid, documents, gamma, lam):
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(values.shape[0]):
        for document in documents[b].unique().tolist():
            index = [t for t in range(values.shape[1]) if documents[b, t] == document and valid[b, t]]
            result = naive_document(rewards[b, index].tolist(), values[b, index].tolist(), gamma, lam)
            advantages[b, index] = torch.tensor(result[0], dtype=torch.float64)
            returns[b, index] = torch.tensor(result[1], dtype=torch.float64)
    return advantages, returns


def random_documents(generator, num_rows, seq_len):
    starts = torch.rand(num_rows, seq_len, generator=generator) < 0.25
    return starts.long().cumsum(dim=1)


@given(
    seed=st.integers(0, 10_000),
    seq_len=st.integers(1, 20),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_advantages_equal_the_recursion_in_packed_rows_with_holes(seed, seq_len, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, seq_len, generator=generator, dtype=torch.float64)
    valid = torch.rand(3, seq_len, generator=generator) < 0.8
    documents = random_documents(generator, 3, seq_len)
    result = generalized_advantages(rewards, values, valid, gamma=gamma, lam=lam, document_ids_BS=documents)
    expected = naive_batch(rewards, values, valid, documents, gamma, lam)
    assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_without_document_ids_a_row_is_one_document():
    rewards, values = torch.randn(2, 2, 8, dtype=torch.float64)
    valid = torch.ones(2, 8, dtype=torch.bool)
    expected = naive_batch(rewards, values, valid, torch.zeros(2, 8, dtype=torch.long), 1.0, 0.95)
    assert_close(generalized_advantages(rewards, values, valid), expected, rtol=1e-9, atol=1e-9)


def test_with_gamma_one_the_td_error_is_the_change_of_value_wherever_rewards_fall():
    # lam = 0 leaves the advantage at the one-step TD error
    values = torch.tensor([[0.1, 0.4, 0.2, 0.9]], dtype=torch.float64)
    valid = torch.ones(1, 4, dtype=torch.bool)
    for rewards in ([[0.0, 0.0, 0.0, 1.0]], [[0.5, 0.0, 0.25, 0.25]]):
        advantages, _ = generalized_advantages(torch.tensor(rewards), values, valid, lam=0.0)
        assert_close(advantages[:, :-1], value_deltas(values)[:, 1:])
        # the last token's error is what the total reward turned out to be
        assert_close(advantages[0, -1], torch.tensor(0.1, dtype=torch.float64))


def test_the_last_tokens_target_is_the_total_reward_exactly():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0, -1.0, 9.0]])
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    _, returns = generalized_advantages(rewards, torch.randn(1, 6), documents >= 0, document_ids_BS=documents)
    assert returns[0, 2].item() == 1.0
    assert returns[0, 4].item() == -1.0
    assert returns[0, 5].item() == 0.0


def test_lambda_one_trains_every_token_towards_the_total_reward():
    rewards = torch.tensor([[0.0, 0.5, 0.0, 0.25]])
    _, returns = generalized_advantages(
        rewards, torch.randn(1, 4), torch.ones(1, 4, dtype=torch.bool), lam=1.0
    )
    assert_close(returns, torch.full((1, 4), 0.75))


def test_true_values_are_a_fixed_point():
    rewards = torch.zeros(1, 6)
    rewards[0, -1] = 1.0
    advantages, returns = generalized_advantages(
        rewards, torch.ones(1, 6), torch.ones(1, 6, dtype=torch.bool)
    )
    assert torch.equal(advantages, torch.zeros(1, 6))
    assert torch.equal(returns, torch.ones(1, 6))


def test_advantages_ignore_what_stands_on_invalid_tokens_and_carry_no_gradient():
    rewards, values = torch.zeros(1, 5), torch.randn(1, 5)
    rewards[0, 3] = 1.0
    valid = torch.tensor([[True, True, True, True, False]])
    clean = generalized_advantages(rewards, values, valid)
    rewards[0, 4], values[0, 4] = 7.0, float("nan")
    spoiled = generalized_advantages(rewards, values.requires_grad_(), valid)
    assert_close(spoiled, clean)
    assert not spoiled[0].requires_grad
    assert not spoiled[1].requires_grad
    assert spoiled[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gamma": 1.1}, "gamma is 1.1"),
        ({"lam": -0.1}, "lam is -0.1"),
        ({"rewards_BS": torch.zeros(1, 5)}, r"\[B, S\]"),
        ({"document_ids_BS": torch.zeros(2, 4, dtype=torch.long)}, r"\[B, S\]"),
    ],
)
def test_advantages_refuse_what_does_not_fit(change, match):
    arguments = {
        "rewards_BS": torch.zeros(1, 4),
        "values_BS": torch.zeros(1, 4),
        "valid_BS": torch.ones(1, 4, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=match):
        generalized_advantages(**(arguments | change))


def test_value_deltas_restart_at_every_document():
    values = torch.tensor([[0.5, 0.7, 0.2, 0.9, 9.0], [1.0, 0.0, 0.5, 0.5, 0.5]], requires_grad=True)
    documents = torch.tensor([[0, 0, 1, 1, -1], [0, 0, 0, 0, 0]])
    deltas = value_deltas(values, document_ids_BS=documents)
    assert_close(deltas, torch.tensor([[0.5, 0.2, 0.2, 0.7, 0.0], [1.0, -1.0, 0.5, 0.0, 0.0]]))
    assert not deltas.requires_grad
    assert_close(value_deltas(values)[0], torch.tensor([0.5, 0.2, -0.5, 0.7, 8.1]))


def test_deltas_of_a_document_add_up_to_its_last_value():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 12, generator=generator)
    documents = random_documents(generator, 1, 12)
    deltas = value_deltas(values, document_ids_BS=documents)
    for document in documents.unique():
        member = documents[0] == document
        assert_close(deltas[0, member].sum(), values[0, member][-1])


def test_excess_is_signed_by_default_and_absolute_on_demand():
    current, reference = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[3.0, 0.5]])
    assert excess_loss(current, reference).tolist() == [[-2.0, 1.5]]
    assert excess_loss(current, reference, score="absolute").tolist() == [[2.0, 1.5]]
    assert not excess_loss(current, reference).requires_grad
    with pytest.raises(ValueError, match="ratio"):
        excess_loss(current, reference, score="ratio")
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 1\)"):
        excess_loss(current, reference[:, :1])


def test_head_h_at_t_is_weighted_by_the_excess_at_position_t_plus_h():
    # both models judge token t+h+1 from position t+h; a pair must meet exactly that score
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 9, (2, 8), generator=generator)
    hidden = torch.randn(2, 2, 8, 4, generator=generator)
    unembedding = torch.randn(9, 4, generator=generator)
    labels_BSH = shift_labels(tokens, 3)
    current, reference = (token_cross_entropy(h, unembedding, labels_BSH[:, :, 0]) for h in hidden)
    spread = spread_weights(excess_loss(index_by_token(current), index_by_token(reference)), 3)
    for b, t, h in (labels_BSH != -100).nonzero().tolist():
        assert_close(spread[b, t, h], current[b, t + h] - reference[b, t + h])


def test_explained_variance_is_one_for_truth_and_zero_for_a_constant():
    returns, valid = torch.randn(3, 20), torch.rand(3, 20) < 0.7
    values = returns.clone()
    values[~valid] = 50.0
    assert explained_variance(values, returns, valid).item() == pytest.approx(1)
    assert explained_variance(torch.zeros(3, 20), returns, valid).item() == pytest.approx(0, abs=1e-12)
    assert explained_variance(-returns, returns, valid).item() == pytest.approx(-3, rel=1e-6)


def test_explained_variance_of_constant_or_missing_returns_is_nan():
    nothing = torch.zeros(4, dtype=torch.bool)
    assert explained_variance(torch.randn(4), torch.ones(4), ~nothing).isnan()
    assert explained_variance(torch.randn(4), torch.randn(4), nothing).isnan()


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0, -2.0, 3.5]), st.booleans()), min_size=1, max_size=25
    )
)
@settings(max_examples=60, deadline=None)
def test_auc_counts_pairs_with_ties_as_half(rows):
    scores = torch.tensor([score for score, _ in rows])
    positive = torch.tensor([is_positive for _, is_positive in rows])
    auc = roc_auc(scores, positive).item()
    pairs = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p in scores[positive].tolist()
        for n in scores[~positive].tolist()
    ]
    if pairs:
        assert auc == pytest.approx(sum(pairs) / len(pairs))
    else:
        assert math.isnan(auc)


def test_auc_of_nan_scores_is_nan():
    assert roc_auc(torch.tensor([float("nan"), 1.0]), torch.tensor([True, False])).isnan()
