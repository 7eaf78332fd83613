"""The bootstrap interval of a mean."""

from __future__ import annotations

import numpy as np
import pytest

from wmtp.evaluation import bootstrap_mean_interval


def test_interval_is_a_function_of_its_arguments() -> None:
    values = np.random.default_rng(1).random(30).tolist()
    first = bootstrap_mean_interval(values, seed=3)
    assert first == bootstrap_mean_interval(values, seed=3)
    assert first != bootstrap_mean_interval(values, seed=4)
    assert first.mean == pytest.approx(np.mean(values))


def test_interval_has_the_width_of_the_normal_approximation() -> None:
    values = np.random.default_rng(2).normal(size=400)
    interval = bootstrap_mean_interval(values.tolist(), num_resamples=20_000)
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.high - interval.mean == pytest.approx(half_width, rel=0.05)
    assert interval.mean - interval.low == pytest.approx(half_width, rel=0.05)


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    source = np.random.default_rng(3)
    num_trials, num_covered = 300, 0
    for trial in range(num_trials):
        values = source.binomial(1, 0.4, size=100).astype(float).tolist()
        interval = bootstrap_mean_interval(values, num_resamples=500, seed=trial)
        num_covered += interval.low <= 0.4 <= interval.high
    assert 0.90 <= num_covered / num_trials <= 0.98


def test_interval_of_equal_values_is_a_point() -> None:
    interval = bootstrap_mean_interval([0.25] * 7)
    assert (interval.low, interval.mean, interval.high) == (0.25, 0.25, 0.25)


def test_interval_does_not_depend_on_how_resamples_are_split_into_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(4).random(50).tolist()
    whole = bootstrap_mean_interval(values, num_resamples=300)
    monkeypatch.setattr("wmtp.evaluation.statistics._MAX_BLOCK_ELEMENTS", 700)
    assert bootstrap_mean_interval(values, num_resamples=300) == whole


@pytest.mark.parametrize("values", [[], [float("nan")], [float("inf"), 1.0]])
def test_interval_refuses_values_without_a_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean_interval(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_interval_refuses_a_confidence_outside_zero_and_one(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_mean_interval([1.0], confidence=confidence)
