"""Shaping and drawing from next-token distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from wmtp.decoding.sampling import (
    SamplingSettings,
    choose_tokens,
    draw_tokens,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    position_uniforms,
    shape_logits,
)

BELOW_ONE = 1 - 2.0**-53


def random_logits(rows: int = 16, vocabulary: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def many_uniforms(num_samples: int, position: int = 0) -> Tensor:
    rows = [position_uniforms(0, 0, sample, position + 1)[position] for sample in range(num_samples)]
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------- uniform numbers


def test_uniforms_are_fixed_numbers_for_ever() -> None:
    expected = [0.7189388877276962, 0.41126597421331446, 0.04623857368614115]
    assert position_uniforms(1, 2, 3, 3).tolist() == expected


def test_a_longer_request_begins_with_the_shorter_one() -> None:
    longer = position_uniforms(5, 6, 7, 300)
    for length in (1, 2, 3, 4, 5, 299):
        assert np.array_equal(position_uniforms(5, 6, 7, length), longer[:length])


def test_every_part_of_the_key_changes_the_uniforms() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 0, 0), (0, 2**64 - 1, 0)]
    rows = np.stack([position_uniforms(*key, 8) for key in keys])
    assert len(np.unique(rows)) == rows.size


def test_uniforms_are_uniform_and_uncorrelated_over_samples_and_positions() -> None:
    table = np.stack([position_uniforms(9, 4, sample, 20) for sample in range(500)])
    assert table.min() >= 0
    assert table.max() < 1
    assert stats.kstest(table.ravel(), "uniform").pvalue > 0.01
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("key", [(-1, 0, 0), (0, 2**64, 0), (0, 0, -5)])
def test_keys_outside_64_bits_are_refused(key: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be in"):
        position_uniforms(*key, 1)


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize("top_k", [1, 2, 7, 39, 40, 100])
def test_top_k_keeps_what_transformers_keeps(top_k: int) -> None:
    logits = random_logits()
    assert torch.equal(keep_top_k(logits, top_k), TopKLogitsWarper(top_k)(None, logits.clone()))


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p: float) -> None:
    logits = random_logits()
    assert torch.equal(keep_top_p(logits, top_p), TopPLogitsWarper(top_p)(None, logits.clone()))


@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float) -> None:
    logits = random_logits()
    assert torch.equal(keep_min_p(logits, min_p), MinPLogitsWarper(min_p)(None, logits.clone()))


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    kept = {p: int(torch.isfinite(keep_top_p(logits, p)).sum()) for p in (0.4, 0.6, 0.79, 0.9, 0.96)}
    assert kept == {0.4: 1, 0.6: 2, 0.79: 2, 0.9: 3, 0.96: 4}
    even = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert torch.isfinite(keep_top_p(even, 0.5)).tolist() == [[True, False, False]]


@given(st.integers(0, 10**6), st.integers(0, 12), st.floats(0.01, 1), st.floats(0, 1), st.floats(0.01, 5))
def test_filters_together_always_keep_the_most_likely_token(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = random_logits(rows=3, vocabulary=9, seed=seed)
    shaped = shape_logits(logits, SamplingSettings(temperature, top_k, top_p, min_p))
    assert torch.equal(shaped.argmax(-1), logits.argmax(-1))
    assert not shaped.isnan().any()


# ---------------------------------------------------------------- drawing


def test_draws_follow_the_softmax_by_a_chi_square_test() -> None:
    logits = random_logits(rows=1, vocabulary=12)
    num_samples = 20_000
    for settings in (
        SamplingSettings(1.0),
        SamplingSettings(0.6),
        SamplingSettings(1.3, top_k=6, top_p=0.95),
    ):
        probability = shape_logits(logits, settings).softmax(-1)[0]
        tokens = choose_tokens(logits.expand(num_samples, -1), settings, many_uniforms(num_samples))
        counts = torch.bincount(tokens, minlength=12)
        assert counts[probability == 0].sum() == 0
        possible = probability * num_samples > 5
        observed = torch.cat([counts[possible], counts[~possible].sum()[None]]).numpy()
        expected = (
            torch.cat([probability[possible], probability[~possible].sum()[None]]).numpy() * num_samples
        )
        is_possible = expected > 0
        assert stats.chisquare(observed[is_possible], expected[is_possible]).pvalue > 0.01


def test_draws_at_two_positions_are_independent_by_a_chi_square_test() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log().expand(20_000, -1)
    first = draw_tokens(logits, many_uniforms(20_000, position=0))
    second = draw_tokens(logits, many_uniforms(20_000, position=1))
    table = torch.bincount(3 * first + second, minlength=9).reshape(3, 3).numpy()
    assert stats.chi2_contingency(table).pvalue > 0.01


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, BELOW_ONE])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float) -> None:
    inf = torch.inf
    logits = torch.tensor([[-inf, 0.0, -inf, -inf], [-inf, -inf, 0.0, 0.1], [5.0, -inf, -inf, -inf]])
    tokens = draw_tokens(logits, torch.full((3,), uniform, dtype=torch.float64))
    assert torch.isfinite(logits.gather(1, tokens[:, None])).all()


def test_the_largest_uniform_draws_the_last_possible_token_of_any_distribution() -> None:
    for seed in range(200):
        logits = random_logits(rows=8, vocabulary=33, seed=seed)
        logits[:, 30:] = -torch.inf
        tokens = draw_tokens(logits, torch.full((8,), BELOW_ONE, dtype=torch.float64))
        assert (tokens < 30).all()


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).double().log().expand(6, -1)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.99], dtype=torch.float64)
    assert draw_tokens(logits, uniforms).tolist() == [0, 0, 1, 1, 2, 2]


def test_temperature_zero_takes_the_most_likely_token_and_reads_no_uniforms() -> None:
    logits = random_logits()
    nothing = torch.full((16,), torch.nan)
    assert torch.equal(choose_tokens(logits, SamplingSettings(0.0), nothing), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-12, 1e-30, 1e-45, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tiny_temperature_is_the_greedy_limit_and_not_nan(dtype: torch.dtype, temperature: float) -> None:
    logits = random_logits().to(dtype)
    tokens = choose_tokens(
        logits, SamplingSettings(temperature), torch.full((16,), BELOW_ONE, dtype=torch.float64)
    )
    assert torch.equal(logits.gather(1, tokens[:, None])[:, 0], logits.amax(-1))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
    ],
)
def test_settings_out_of_range_are_refused_by_name(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingSettings(**values)
