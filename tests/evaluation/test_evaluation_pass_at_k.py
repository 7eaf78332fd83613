"""pass@k against its definition."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp.evaluation import mean_pass_at_k, pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        is_right = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            subsets = list(combinations(is_right, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-14)


def test_pass_at_k_is_unbiased_for_the_chance_that_one_of_k_tries_is_right() -> None:
    num_samples, k, rate = 12, 4, 0.2
    counts = np.random.default_rng(0).binomial(num_samples, rate, size=40_000)
    estimates = [pass_at_k(num_samples, int(count), k) for count in counts]
    standard_error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - (1 - (1 - rate) ** k)) < 4 * standard_error


@given(st.integers(1, 100_000), st.data())
def test_pass_at_k_stays_a_probability_and_grows_with_correct_samples_and_k(
    num_samples: int, data: st.DataObject
) -> None:
    num_correct = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    value = pass_at_k(num_samples, num_correct, k)
    assert 0.0 <= value <= 1.0
    assert (value == 0.0) == (num_correct == 0)
    if k == 1:
        assert value == pytest.approx(num_correct / num_samples, rel=1e-9)
    if k < num_samples:
        assert pass_at_k(num_samples, num_correct, k + 1) >= value - 1e-12
    if num_correct < num_samples:
        assert pass_at_k(num_samples, num_correct + 1, k) >= value - 1e-12


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k"), [(0, 0, 1), (5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)]
)
def test_pass_at_k_refuses_counts_that_cannot_be(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        pass_at_k(num_samples, num_correct, k)


def test_mean_pass_at_k_averages_over_problems() -> None:
    assert mean_pass_at_k([2, 4], [1, 0], 2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="equally long"):
        mean_pass_at_k([2], [1, 1], 1)
    with pytest.raises(ValueError, match="equally long"):
        mean_pass_at_k([], [], 1)
