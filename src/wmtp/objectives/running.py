"""Weights from statistics of earlier steps (`loss.normalize_over: running`): no scoring pass is needed.

A step's weights need the mean and deviation of its scores and the scale that brings their mean to 1. Where
those come from earlier steps, every token can be weighted by itself, whichever micro-batch or rank holds it;
the mean is then 1 in expectation, as far as scores change slowly, and not exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.exceptions import UserInputError
from wmtp.objectives.groups import LastDimGroups, as_one_group, count_over, masked_scores, max_over, min_over
from wmtp.objectives.weights import (
    check_bounds,
    check_temperature,
    clipped_exp,
    finish_weights,
    solve_log_scale,
)


class ScoreStatistics(NamedTuple):
    """What weighting a token by itself takes: 0-d float64 tensors, fit for a checkpoint.

    Attributes:
        mean: of the scores.
        std: of the scores (population); 0 where they are all equal.
        log_scale: log c with mean(clip(c * exp(z / temperature), epsilon, w_max)) = 1.
    """

    mean: Tensor
    std: Tensor
    log_scale: Tensor


def score_statistics(
    scores: Tensor,
    valid: Tensor,
    *,
    temperature: float = 0.7,
    epsilon: float = 0.05,
    w_max: float = 3.0,
    previous: ScoreStatistics | None = None,
    decay: float = 0.9,
) -> ScoreStatistics:
    """Statistics of a step's scores, averaged into those of earlier steps.

    Mean, variance and log scale are exponential averages; the log scale is solved under the averaged mean and
    deviation, because those are what the next step's scores meet.

    Args:
        scores, valid: any shape, the same; all valid tokens of the step.
        temperature, epsilon, w_max: as in `normalize_weights`; they are part of `log_scale`.
        previous: statistics so far; None at the first step.
        decay: weight of `previous`, in [0, 1).

    Returns:
        ScoreStatistics. Without valid entries: `previous`, or those of constant scores.

    Raises:
        UserInputError: shapes that differ, settings outside their bounds.
    """
    check_temperature(temperature)
    check_bounds(epsilon, w_max)
    if not 0 <= decay < 1:
        raise UserInputError(f"decay is {decay}, but must be at least 0 and below 1")
    groups = LastDimGroups()
    masked, mask = as_one_group(scores, valid)
    keep = torch.where(mask.any(), 0.0 if previous is None else decay, 1.0)
    before = previous or ScoreStatistics(*(masked.new_zeros(()) for _ in range(3)))
    # deviations are squared after division by max|s|, as in the pipeline itself
    largest = max_over(groups, masked.abs(), mask)
    unit = torch.where(largest == 0, 1.0, largest)
    scaled, num_valid = masked / unit, count_over(groups, mask)
    mean = groups.sum(scaled) / num_valid
    deviation = (groups.sum(torch.where(mask, scaled - mean, 0.0).square()) / num_valid).sqrt()
    is_constant = max_over(groups, scaled, mask) == min_over(groups, scaled, mask)
    std = torch.where(is_constant, 0.0, deviation * unit).reshape(())
    new_mean = torch.lerp((mean * unit).reshape(()), before.mean, keep)
    new_std = torch.hypot(std * (1 - keep).sqrt(), before.std * keep.sqrt())
    log_weights = _log_weights(masked, new_mean, new_std, temperature)
    log_scale = solve_log_scale(
        torch.where(mask, log_weights, 0.0), mask, groups, epsilon=epsilon, w_max=w_max
    ).reshape(())
    return ScoreStatistics(new_mean, new_std, torch.lerp(log_scale, before.log_scale, keep))


def normalize_with_statistics(
    scores: Tensor,
    valid: Tensor,
    statistics: ScoreStatistics,
    *,
    temperature: float = 0.7,
    epsilon: float = 0.05,
    w_max: float = 3.0,
) -> Tensor:
    """Weights under given statistics: clip(c * exp(z / temperature), epsilon, w_max), token by token.

    Args:
        scores, valid: any shape, the same.
        statistics: of earlier steps, made with the same settings.
        temperature, epsilon, w_max: as in `normalize_weights`.

    Returns:
        Weights as from `normalize_weights`, but with mean 1 in expectation only. Statistics of constant
        scores (std 0) give ones.

    Raises:
        UserInputError: shapes that differ, settings outside their bounds.
    """
    check_temperature(temperature)
    check_bounds(epsilon, w_max)
    masked, _ = masked_scores(scores, valid)
    log_weights = _log_weights(masked, statistics.mean, statistics.std, temperature)
    weights = clipped_exp(log_weights + statistics.log_scale, epsilon, w_max)
    return finish_weights(weights, scores, valid, epsilon, w_max)


def _log_weights(scores: Tensor, mean: Tensor, std: Tensor, temperature: float) -> Tensor:
    """z / temperature, finite for any finite scores; 0 where the deviation is 0."""
    z = (scores - mean) / torch.where(std == 0, 1.0, std)
    return torch.where(std == 0, 0.0, (z / temperature).clamp(-1e300, 1e300))
