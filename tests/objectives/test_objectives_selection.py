"""Rho-1 selection: soft, hard, and the controls, against sorted Python lists."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from wmtp.objectives import (
    normalize_weights,
    num_selected,
    random_skip_weights,
    select_top,
    shift_labels,
    shuffle_weights,
    spread_weights,
    tokenskip_weights,
    weighted_excess_weights,
    weighted_mtp_cross_entropy,
)

scores_and_masks = st.lists(
    st.tuples(
        st.one_of(st.floats(allow_nan=False, allow_infinity=False, width=32), st.sampled_from([0.0, 1.0])),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


def as_tensors(rows):
    return torch.tensor([score for score, _ in rows]), torch.tensor([is_valid for _, is_valid in rows])


def naive_top(scores, valid, k):
    ranked = sorted((index for index in range(len(scores)) if valid[index]), key=lambda i: (-scores[i], i))
    return set(ranked[:k])


def all_valid(count):
    return torch.ones(count, dtype=torch.bool)


@given(rows=scores_and_masks, share=st.floats(0.01, 1))
@settings(max_examples=80, deadline=None)
def test_exactly_the_highest_are_selected_with_ties_by_index(rows, share):
    scores, valid = as_tensors(rows)
    count = num_selected(valid, share)
    assert count.item() == math.ceil(share * int(valid.sum()))
    selected = select_top(scores, valid, count)
    assert set(selected.nonzero().flatten().tolist()) == naive_top(
        scores.tolist(), valid.tolist(), int(count)
    )


@given(rows=scores_and_masks, ratio=st.floats(0.01, 1))
@settings(max_examples=80, deadline=None)
def test_tokenskip_keeps_round_ratio_n_tokens_at_n_over_k(rows, ratio):
    scores, valid = as_tensors(rows)
    num_valid = int(valid.sum())
    k = max(1, round(ratio * num_valid))
    weights = tokenskip_weights(scores, valid, ratio=ratio)
    top = naive_top(scores.tolist(), valid.tolist(), k)
    expected = [num_valid / k if index in top else 0.0 for index in range(len(rows))]
    assert_close(weights, torch.tensor(expected))


def test_tokenskip_at_horizon_one_is_the_mean_over_the_selected():
    tokens = torch.randint(0, 11, (2, 9))
    hidden, unembedding = (
        torch.randn(2, 9, 1, 4, dtype=torch.float64),
        torch.randn(11, 4, dtype=torch.float64),
    )
    labels = shift_labels(tokens, 1)
    scores = torch.randn(2, 9)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, 0] = False
    weights = tokenskip_weights(scores, valid, ratio=0.5)
    loss = weighted_mtp_cross_entropy(hidden, unembedding, labels, spread_weights(weights, 1).double()).loss
    ce = F.cross_entropy((hidden[:, :-1, 0] @ unembedding.T).transpose(1, 2), tokens[:, 1:], reduction="none")
    assert_close(loss, ce[weights[:, 1:] > 0].mean(), rtol=1e-6, atol=0)


def test_soft_selection_equals_the_written_formula():
    scores = torch.randn(40, dtype=torch.float64).exp()
    valid = torch.rand(40) < 0.8
    used = scores[valid]
    z = (used - used.mean()) / used.std(correction=0)
    threshold = z.sort(descending=True).values[math.ceil(0.3 * len(used)) - 1]
    softmax = torch.softmax((z - threshold).clamp(min=0) / 0.7, 0) * len(used)
    mixed = 0.8 * softmax + 0.2
    # bounds wide enough that the clip changes nothing: mean 1 already
    weights = weighted_excess_weights(scores, valid, percentile_top_p=0.3, alpha=0.2, epsilon=0.0, w_max=1e3)
    assert_close(weights[valid], mixed, rtol=1e-9, atol=1e-9)
    assert torch.all(weights[~valid] == 0)


def test_tokens_below_the_threshold_share_one_weight():
    scores = torch.randn(200)
    weights = weighted_excess_weights(scores, all_valid(200), percentile_top_p=0.25)
    order = scores.argsort(descending=True)
    assert weights[order[49:]].unique().numel() == 1
    assert (weights[order[:49]] > weights[order[49]]).all()


def test_selecting_everything_takes_the_plain_z_score():
    scores, valid = torch.randn(100, dtype=torch.float64), torch.rand(100) < 0.9
    assert_close(
        weighted_excess_weights(scores, valid, percentile_top_p=1.0, temperature=0.5),
        normalize_weights(scores, valid, temperature=0.5),
    )


def test_alpha_one_is_uniform_and_alpha_narrows_the_weights():
    scores = torch.randn(500)
    spread = [weighted_excess_weights(scores, all_valid(500), alpha=alpha).std() for alpha in (0.0, 0.5, 1.0)]
    assert spread[0] > spread[1] > spread[2]
    assert torch.equal(weighted_excess_weights(scores, all_valid(500), alpha=1.0), torch.ones(500))


@given(rows=scores_and_masks, top_p=st.floats(0.01, 1), alpha=st.floats(0, 1), temperature=st.floats(0.01, 5))
@settings(max_examples=100, deadline=None)
def test_soft_weights_of_any_finite_scores_are_sound(rows, top_p, alpha, temperature):
    scores, valid = as_tensors(rows)
    weights = weighted_excess_weights(
        scores, valid, percentile_top_p=top_p, alpha=alpha, temperature=temperature
    )
    assert weights.isfinite().all()
    assert (weights[~valid] == 0).all()
    if valid.any():
        used = weights[valid]
        assert abs(used.double().mean().item() - 1) < 1e-5
        assert ((used >= 0.05) & (used <= 3.0)).all()
        assert (used[scores[valid].argsort()].diff() >= 0).all()


def test_constant_scores_are_not_selected_among():
    assert torch.equal(weighted_excess_weights(torch.full((9,), 2.5), all_valid(9)), torch.ones(9))


def test_random_selection_is_seeded_and_as_large_as_the_real_one():
    valid = torch.rand(4, 50) < 0.7
    draws = [random_skip_weights(valid, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    real = tokenskip_weights(torch.randn(4, 50), valid)
    assert_close(draws[0].flatten().sort().values, real.flatten().sort().values)
    assert (draws[0][~valid] == 0).all()


def test_random_selection_reaches_every_valid_token():
    valid = torch.tensor([True, False, True, True])
    generator = torch.Generator().manual_seed(0)
    total = sum(random_skip_weights(valid, ratio=0.34, generator=generator) for _ in range(300)) / 300
    assert_close(total, torch.tensor([1.0, 0.0, 1.0, 1.0]), rtol=0, atol=0.3)


def test_shuffled_weights_are_the_same_weights_on_other_valid_tokens():
    weights, valid = torch.rand(3, 40), torch.rand(3, 40) < 0.7
    shuffled = shuffle_weights(weights, valid, generator=torch.Generator().manual_seed(5))
    assert torch.equal(shuffled[valid].sort().values, weights[valid].sort().values)
    assert not torch.equal(shuffled[valid], weights[valid])
    assert (shuffled[~valid] == 0).all()
    again = shuffle_weights(weights, valid, generator=torch.Generator().manual_seed(5))
    assert torch.equal(shuffled, again)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s, v: weighted_excess_weights(s, v, percentile_top_p=0.0), "percentile_top_p is 0.0"),
        (lambda s, v: weighted_excess_weights(s, v, alpha=1.5), "alpha is 1.5"),
        (lambda s, v: weighted_excess_weights(s, v, temperature=-1.0), "temperature is -1.0"),
        (lambda s, v: tokenskip_weights(s, v, ratio=1.2), "ratio is 1.2"),
        (lambda s, v: tokenskip_weights(s, v[:2]), r"\(3,\).*\(2,\)"),
        (lambda s, v: shuffle_weights(s, v[:2], generator=torch.Generator()), r"\(3,\).*\(2,\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.randn(3), all_valid(3))
