"""Uncertainty of a mean over problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wmtp.exceptions import UserInputError

# Bounds the memory of one block of resamples to 32 MiB whatever the number of problems.
_MAX_BLOCK_ELEMENTS = 4_194_304


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> MeanInterval:
    """Return the mean of `values` and its percentile bootstrap interval (Efron 1979).

    Problems are resampled with replacement; the interval therefore speaks of the choice of problems, given
    the samples drawn for each. Equal arguments give equal results.

    Raises:
        UserInputError: no values, a value that is not finite, or `confidence` outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise UserInputError(
            f"an interval needs at least one value and only finite ones, got {list(values)[:5]}...",
            remedy="give one finite number per problem",
        )
    if not 0.0 < confidence < 1.0 or num_resamples < 1:
        raise UserInputError(
            f"confidence must be in (0, 1), num_resamples at least 1, got {confidence} and {num_resamples}",
            remedy="use for example 0.95 and 2000",
        )
    generator = np.random.default_rng(seed)
    block = max(1, _MAX_BLOCK_ELEMENTS // array.size)
    means = [
        array[generator.integers(array.size, size=(min(block, num_resamples - start), array.size))].mean(
            axis=1
        )
        for start in range(0, num_resamples, block)
    ]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return MeanInterval(mean=float(array.mean()), low=float(low), high=float(high))
