"""The weight pipeline: an independent float64 reference, and what must hold for any finite scores."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from wmtp.objectives import (
    blend_strength,
    normalize_document_weights,
    normalize_head_weights,
    normalize_weights,
    normalize_with_statistics,
    rescale_to_mean_one,
    score_statistics,
    weight_statistics,
)

FP32_MAX = 3.4028234663852886e38
DENORMAL = 1.401298464324817e-45

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
# values close together, repeated, extreme and mixed: what breaks a naive pipeline
score_lists = st.one_of(
    st.lists(finite, min_size=1, max_size=40),
    st.lists(
        st.sampled_from([0.0, 1.0, -1.0, 1e38, -1e38, FP32_MAX, DENORMAL, -DENORMAL]), min_size=1, max_size=40
    ),
    st.lists(st.floats(0, 20, width=32), min_size=1, max_size=200),
)
bounds = st.tuples(st.floats(0, 1), st.floats(1, 50))


@st.composite
def scored_tokens(draw):
    scores = draw(score_lists)
    valid = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    return torch.tensor(scores), torch.tensor(valid)


def naive_clip(weights, epsilon, w_max):
    """clip(c * w) with mean 1, by walking over the points where a token meets a bound: no bisection."""
    count = len(weights)
    knots = sorted({bound / w for w in weights if w > 0 for bound in (epsilon, w_max)} | {0.0})
    mean = [sum(min(max(c * w, epsilon), w_max) for w in weights) / count for c in knots]
    for left, right, low, high in zip(knots, knots[1:], mean, mean[1:], strict=False):
        if low <= 1 <= high:
            # linear between knots
            c = right if high == low else left + (right - left) * (1 - low) / (high - low)
            return [min(max(c * w, epsilon), w_max) for w in weights]
    raise AssertionError("no scale found")


def naive_weights(scores, temperature, epsilon, w_max):
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
    exponentials = [math.exp((s - mean) / deviation / temperature) for s in scores]
    softmax = [e / sum(exponentials) for e in exponentials]
    return naive_clip([len(scores) * p for p in softmax], epsilon, w_max)


def assert_weights_are_sound(weights, scores, valid, epsilon, w_max):
    assert weights.shape == scores.shape
    assert not weights.requires_grad
    assert weights.isfinite().all()
    assert (weights[~valid] == 0).all()
    used, raw = weights[valid].double(), scores[valid].double()
    if used.numel() == 0:
        return
    assert abs(used.mean().item() - 1) < 1e-5
    assert used.min().item() >= epsilon
    assert used.max().item() <= w_max
    order = raw.argsort()
    assert (used[order].diff() >= 0).all()
    ties = raw[order].diff() == 0
    assert (used[order].diff()[ties] == 0).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("temperature", "epsilon", "w_max"), [(0.7, 0.05, 3.0), (0.2, 0.3, 1.5), (2.0, 0.0, 9.0)]
)
def test_weights_equal_the_written_pipeline(seed, temperature, epsilon, w_max):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 17, generator=generator, dtype=torch.float64).exp()
    valid = torch.rand(3, 17, generator=generator) < 0.8
    weights = normalize_weights(scores, valid, temperature=temperature, epsilon=epsilon, w_max=w_max)
    expected = naive_weights(scores[valid].tolist(), temperature, epsilon, w_max)
    assert_close(weights[valid], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@given(case=scored_tokens(), temperature=st.floats(0.01, 10), limits=bounds)
@example(
    case=(torch.tensor([FP32_MAX, -FP32_MAX, 0.0]), torch.ones(3, dtype=torch.bool)),
    temperature=0.7,
    limits=(0.05, 3.0),
)
@example(
    case=(torch.tensor([DENORMAL, 0.0]), torch.ones(2, dtype=torch.bool)), temperature=0.7, limits=(0.05, 3.0)
)
@example(
    case=(torch.tensor([0.0] * 999 + [1.0]), torch.ones(1000, dtype=torch.bool)),
    temperature=0.01,
    limits=(0.0, 3.0),
)
@settings(max_examples=150, deadline=None)
def test_weights_of_any_finite_scores_are_sound(case, temperature, limits):
    scores, valid = case
    epsilon, w_max = limits
    weights = normalize_weights(scores, valid, temperature=temperature, epsilon=epsilon, w_max=w_max)
    assert weights.dtype == torch.float32
    assert_weights_are_sound(weights, scores, valid, epsilon, w_max)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-12, 1e-3, 1e300])
@pytest.mark.parametrize("epsilon", [0.0, 0.05])
def test_absurd_temperatures_keep_every_promise(temperature, epsilon):
    scores = torch.randn(500)
    valid = torch.ones(500, dtype=torch.bool)
    weights = normalize_weights(scores, valid, temperature=temperature, epsilon=epsilon)
    assert_weights_are_sound(weights, scores, valid, epsilon, 3.0)


def test_scores_are_sharpened_up_to_the_bounds():
    scores = torch.randn(1000)
    weights = normalize_weights(scores, torch.ones(1000, dtype=torch.bool), temperature=0.1)
    assert weights.max() == 3.0
    assert weights.min() == 0.05


@given(value=st.floats(allow_nan=False, allow_infinity=False), count=st.integers(1, 20), limits=bounds)
@settings(max_examples=60, deadline=None)
def test_constant_scores_give_exactly_uniform_weights(value, count, limits):
    epsilon, w_max = limits
    scores, valid = torch.full((count,), value, dtype=torch.float64), torch.ones(count, dtype=torch.bool)
    weights = normalize_weights(scores, valid, epsilon=epsilon, w_max=w_max)
    assert weights.tolist() == [1.0] * count


@pytest.mark.parametrize("size", [1e300, 1e-300])
def test_float64_scores_may_be_as_extreme_as_float64(size):
    scores, valid = torch.randn(50, dtype=torch.float64), torch.ones(50, dtype=torch.bool)
    weights = normalize_weights(scores * size, valid)
    assert_close(weights, normalize_weights(scores, valid))
    statistics = score_statistics(scores * size, valid)
    assert_close(normalize_with_statistics(scores * size, valid, statistics), weights)


def test_what_stands_on_invalid_tokens_does_not_matter():
    scores, valid = torch.randn(2, 30), torch.rand(2, 30) < 0.6
    spoiled = scores.clone()
    spoiled[~valid] = torch.tensor([float("nan"), float("inf"), -1e38])[torch.arange((~valid).sum()) % 3]
    assert torch.equal(normalize_weights(spoiled, valid), normalize_weights(scores, valid))


def test_no_valid_token_gives_zeros():
    scores = torch.randn(4, 5)
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    assert torch.equal(normalize_weights(scores, nothing), torch.zeros(4, 5))


def test_affine_changes_of_the_scores_do_not_change_the_weights():
    scores, valid = torch.randn(200, dtype=torch.float64), torch.rand(200) < 0.7
    assert_close(normalize_weights(5e7 * scores - 3e7, valid), normalize_weights(scores, valid))


def test_weights_carry_no_gradient():
    scores = torch.randn(10, requires_grad=True)
    assert not normalize_weights(scores, torch.ones(10, dtype=torch.bool)).requires_grad


@pytest.mark.parametrize("epsilon", [0.7, 0.1, 1.0, 0.99999999])
@pytest.mark.parametrize("w_max", [1.1, 1.3, 3.3, 1.0, 1.00000001])
def test_bounds_hold_exactly_where_fp32_cannot_represent_them(epsilon, w_max):
    scores, valid = torch.randn(100), torch.ones(100, dtype=torch.bool)
    weights = normalize_weights(scores, valid, temperature=0.1, epsilon=epsilon, w_max=w_max)
    assert weights.min().item() >= epsilon
    assert weights.max().item() <= w_max


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"epsilon": 1.1}, "mean 1"),
        ({"epsilon": -0.1}, "mean 1"),
        ({"w_max": 0.9}, "mean 1"),
        ({"valid": torch.ones(4, dtype=torch.bool)}, r"\(3,\).*\(4,\)"),
        ({"scores": torch.ones(2, 3), "valid": torch.ones(3, 2, dtype=torch.bool)}, r"\(2, 3\).*\(3, 2\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, match):
    call = {"scores": torch.zeros(3), "valid": torch.ones(3, dtype=torch.bool)} | arguments
    with pytest.raises(ValueError, match=match):
        normalize_weights(**call)


@st.composite
def scored_documents(draw):
    lengths = draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3))
    seq_len = max(sum(row) for row in lengths) + draw(st.integers(0, 2))
    documents = torch.full((len(lengths), seq_len), -1)
    for b, row in enumerate(lengths):
        ids = [index for index, length in enumerate(row) for _ in range(length)]
        documents[b, : len(ids)] = torch.tensor(ids)
    count = documents.numel()
    scores = torch.tensor(draw(st.lists(finite, min_size=count, max_size=count))).reshape(documents.shape)
    valid = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))).reshape(
        documents.shape
    )
    return scores, valid & (documents >= 0), documents


@given(case=scored_documents(), limits=bounds)
@settings(max_examples=60, deadline=None)
def test_each_document_is_normalised_as_if_it_were_alone(case, limits):
    scores, valid, documents = case
    epsilon, w_max = limits
    weights = normalize_document_weights(scores, valid, documents, epsilon=epsilon, w_max=w_max)
    for b in range(scores.shape[0]):
        for document in range(-1, int(documents[b].max()) + 1):
            member = documents[b] == document
            alone = (
                normalize_weights(scores[b][member], valid[b][member], epsilon=epsilon, w_max=w_max)
                if member.any()
                else None
            )
            if alone is not None:
                assert_close(weights[b][member], alone, rtol=1e-6, atol=1e-6)
                assert_weights_are_sound(
                    weights[b][member], scores[b][member], valid[b][member], epsilon, w_max
                )


@given(data=st.data(), num_positions=st.integers(1, 5), horizon=st.integers(1, 5), limits=bounds)
@settings(max_examples=60, deadline=None)
def test_head_weights_are_sound_at_every_position(data, num_positions, horizon, limits):
    epsilon, w_max = limits
    count = num_positions * horizon
    scores = torch.tensor(data.draw(st.lists(finite, min_size=count, max_size=count))).reshape(1, -1, horizon)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))).reshape(
        1, -1, horizon
    )
    weights = normalize_head_weights(scores, valid, epsilon=epsilon, w_max=w_max)
    for t in range(num_positions):
        assert_weights_are_sound(weights[0, t], scores[0, t], valid[0, t], epsilon, w_max)


def test_head_weights_equal_the_written_formula():
    scores = torch.randn(2, 4, 3, dtype=torch.float64)
    valid = torch.ones(2, 4, 3, dtype=torch.bool)
    valid[0, 0, 1] = valid[1, 2, 0] = False
    weights = normalize_head_weights(scores, valid, temperature=0.5, epsilon=0.4, w_max=1.6)
    for b in range(2):
        for t in range(4):
            kept = scores[b, t][valid[b, t]]
            softmax = torch.softmax(kept / 0.5, 0) * len(kept)
            expected = naive_clip(softmax.tolist(), 0.4, 1.6)
            assert_close(weights[b, t][valid[b, t]], torch.tensor(expected, dtype=torch.float64))


def test_head_weights_are_uniform_for_equal_scores():
    weights = normalize_head_weights(torch.full((1, 2, 3), 7.3), torch.ones(1, 2, 3, dtype=torch.bool))
    assert torch.equal(weights, torch.ones(1, 2, 3))


def test_given_weights_are_rescaled_and_not_clipped():
    weights = torch.tensor([0.0, 1.0, 99.0, 5.0])
    valid = torch.tensor([True, True, True, False])
    assert_close(rescale_to_mean_one(weights, valid), torch.tensor([0.0, 0.03, 2.97, 0.0]))
    assert torch.equal(rescale_to_mean_one(torch.zeros(3), torch.ones(3, dtype=torch.bool)), torch.zeros(3))


@pytest.mark.parametrize("value", [FP32_MAX, DENORMAL])
def test_given_weights_may_be_extreme(value):
    weights = rescale_to_mean_one(torch.tensor([value, value, 0.0]), torch.ones(3, dtype=torch.bool))
    assert_close(weights, torch.tensor([1.5, 1.5, 0.0]))


def test_strength_blends_and_is_exact_at_both_ends():
    weights = torch.tensor([0.05, 0.3, 2.9])
    assert torch.equal(blend_strength(weights, 0.0), torch.ones(3))
    assert torch.equal(blend_strength(weights, 1.0), weights)
    assert_close(blend_strength(weights, torch.tensor(0.5)), 1 + 0.5 * (weights - 1))


def test_statistics_of_weights_leave_out_invalid_tokens():
    weights = torch.tensor([[1.0, 3.0, 0.0], [7.0, 0.0, 2.0]])
    valid = torch.tensor([[True, True, True], [False, False, True]])
    statistics = {name: value.item() for name, value in weight_statistics(weights, valid).items()}
    used = torch.tensor([1.0, 3.0, 0.0, 2.0], dtype=torch.float64)
    assert statistics == pytest.approx(
        {"mean": 1.5, "std": used.std(correction=0).item(), "min": 0.0, "max": 3.0, "ess": 36 / 14}
    )


def test_statistics_without_valid_tokens_are_zero():
    statistics = weight_statistics(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))
    assert all(value.item() == 0 for value in statistics.values())


def test_running_statistics_of_the_same_scores_give_the_same_weights():
    scores, valid = torch.randn(300, dtype=torch.float64), torch.rand(300) < 0.8
    weights = normalize_with_statistics(scores, valid, score_statistics(scores, valid))
    assert_close(weights, normalize_weights(scores, valid), rtol=1e-7, atol=1e-7)


def test_running_weights_have_mean_one_in_expectation_and_ignore_the_split():
    generator = torch.Generator().manual_seed(0)
    valid = torch.ones(400, dtype=torch.bool)
    statistics, means = None, []
    for _ in range(60):
        scores = torch.randn(400, generator=generator) * 2 + 5
        if statistics is not None:
            weights = normalize_with_statistics(scores, valid, statistics)
            halves = [normalize_with_statistics(part, valid[:200], statistics) for part in scores.split(200)]
            assert torch.equal(weights, torch.cat(halves))
            assert weights.min() >= 0.05
            assert weights.max() <= 3.0
            means.append(weights.mean())
        statistics = score_statistics(scores, valid, previous=statistics)
    assert torch.stack(means).mean().item() == pytest.approx(1, abs=0.02)


@given(scores=score_lists, later=score_lists, temperature=st.sampled_from([0.7, 5e-324]))
@settings(max_examples=60, deadline=None)
def test_running_weights_of_any_finite_scores_are_inside_the_bounds(scores, later, temperature):
    old, new = torch.tensor(scores), torch.tensor(later)
    old_valid, new_valid = torch.ones_like(old, dtype=torch.bool), torch.ones_like(new, dtype=torch.bool)
    statistics = score_statistics(old, old_valid, temperature=temperature)
    statistics = score_statistics(old.flip(0) / 2, old_valid, temperature=temperature, previous=statistics)
    assert all(value.isfinite() for value in statistics)
    weights = normalize_with_statistics(new, new_valid, statistics, temperature=temperature)
    assert ((weights >= 0.05) & (weights <= 3.0)).all()
    assert (weights[new.argsort()].diff() >= 0).all()


def test_running_statistics_average_mean_and_variance():
    valid = torch.ones(2, dtype=torch.bool)
    first = score_statistics(torch.tensor([0.0, 2.0]), valid)
    assert (first.mean.item(), first.std.item()) == (1.0, 1.0)
    second = score_statistics(torch.tensor([10.0, 20.0]), valid, previous=first, decay=0.8)
    assert second.mean.item() == pytest.approx(0.8 * 1 + 0.2 * 15)
    assert second.std.item() ** 2 == pytest.approx(0.8 * 1 + 0.2 * 25)


def test_a_step_without_valid_tokens_leaves_the_statistics_as_they_were():
    scores = torch.randn(50)
    statistics = score_statistics(scores, torch.ones(50, dtype=torch.bool))
    after = score_statistics(scores, torch.zeros(50, dtype=torch.bool), previous=statistics)
    assert_close(tuple(after), tuple(statistics))


def test_statistics_of_constant_scores_give_uniform_weights():
    statistics = score_statistics(torch.full((5,), 3.0), torch.ones(5, dtype=torch.bool))
    weights = normalize_with_statistics(torch.randn(4), torch.ones(4, dtype=torch.bool), statistics)
    assert torch.equal(weights, torch.ones(4))
