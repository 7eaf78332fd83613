"""From token scores to token weights: z-score, softmax, rescale to mean 1, clip with the mean kept.

Weights are solved for in log space and float64, so that extreme scores neither underflow nor overflow.
Nothing here waits for the device and nothing has a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wmtp.exceptions import UserInputError
from wmtp.objectives.groups import (
    DocumentGroups,
    Groups,
    LastDimGroups,
    as_one_group,
    count_over,
    masked_scores,
    max_over,
    min_over,
)

# The bracket of the scale is as wide as the log weights are spread. 60 halvings leave 1e-15 of a spread of
# 1000; what an absurd temperature leaves over is taken out in closed form.
_BISECTION_STEPS = 60
# stands for minus infinity in log space, where -inf itself would turn differences into NaN
_LOWEST_LOG = -1e300


def normalize_weights(
    scores: Tensor, valid: Tensor, *, temperature: float = 0.7, epsilon: float = 0.05, w_max: float = 3.0
) -> Tensor:
    """Turn scores into weights over all valid entries: z-score, softmax(z / temperature), mean 1, clip.

    The clip solves for c with mean(clip(c * w, epsilon, w_max)) = 1, so that neither the mean nor the bounds
    give way.

    Args:
        scores: any shape, finite where valid; indexed as `valid`.
        valid: same shape, bool.
        temperature: of the softmax, above 0; smaller is sharper.
        epsilon, w_max: bounds of the weights, 0 <= epsilon <= 1 <= w_max.

    Returns:
        Weights in the shape and on the device of `scores`, fp32 (fp64 for float64 scores): mean 1 over valid
        entries, inside [epsilon, w_max], weakly ordered as the scores, 0 on invalid entries, without
        gradient. Constant scores give exactly ones.

    Raises:
        UserInputError: shapes that differ, settings outside their bounds.
    """
    check_temperature(temperature)
    weights = _weights_from_scores(
        *as_one_group(scores, valid),
        LastDimGroups(),
        temperature,
        epsilon,
        w_max,
    )
    return finish_weights(weights.reshape(scores.shape), scores, valid, epsilon, w_max)


def normalize_document_weights(
    scores_BS: Tensor,
    valid_BS: Tensor,
    document_ids_BS: Tensor,
    *,
    temperature: float = 0.7,
    epsilon: float = 0.05,
    w_max: float = 3.0,
) -> Tensor:
    """`normalize_weights` over each document by itself (`loss.normalize_over: sequence`).

    Args:
        scores_BS, valid_BS: [B, S].
        document_ids_BS: [B, S], one id for each packed document of a row.
        temperature, epsilon, w_max: as in `normalize_weights`.

    Returns:
        [B, S]; the mean over the valid tokens of every document is 1.

    Raises:
        UserInputError: shapes that differ, settings outside their bounds.
    """
    check_temperature(temperature)
    if document_ids_BS.shape != scores_BS.shape:
        raise UserInputError(
            f"scores {tuple(scores_BS.shape)} and document ids {tuple(document_ids_BS.shape)} differ in shape"
        )
    masked, mask = masked_scores(scores_BS, valid_BS)
    groups = DocumentGroups(document_ids_BS.to(masked.device))
    weights = _weights_from_scores(masked, mask, groups, temperature, epsilon, w_max)
    return finish_weights(weights, scores_BS, valid_BS, epsilon, w_max)


def normalize_head_weights(
    scores_BSH: Tensor,
    valid_BSH: Tensor,
    *,
    temperature: float = 0.7,
    epsilon: float = 0.05,
    w_max: float = 3.0,
) -> Tensor:
    """Weights of the heads of each position (`loss.weight_scope: head`).

    w[t, h] = |K(t)| * softmax(s / temperature), then the clip of `normalize_weights` for each position.

    The softmax runs over K(t), the heads that have a target. Scores are not z-scored: a handful of heads has
    no statistics.

    Args:
        scores_BSH, valid_BSH: [B, S, H]; valid is the target mask.
        temperature, epsilon, w_max: as in `normalize_weights`.

    Returns:
        [B, S, H]; the mean over the heads of every position that has any is 1.

    Raises:
        UserInputError: shapes that differ, settings outside their bounds.
    """
    check_temperature(temperature)
    masked, mask = masked_scores(scores_BSH, valid_BSH)
    groups = LastDimGroups()
    log_weights = scaled_logits(masked, mask, groups, temperature)
    weights = clip_to_mean_one(log_weights, mask, groups, epsilon=epsilon, w_max=w_max)
    return finish_weights(weights, scores_BSH, valid_BSH, epsilon, w_max)


def rescale_to_mean_one(weights: Tensor, valid: Tensor) -> Tensor:
    """Given weights with their mean over valid entries brought to 1: no softmax, no clip.

    Args:
        weights: any shape, finite and not negative where valid.
        valid: same shape, bool.

    Returns:
        Same shape, fp32 (fp64 for float64 weights), 0 on invalid entries. All weights zero: zeros.

    Raises:
        UserInputError: shapes that differ.
    """
    masked, mask = masked_scores(weights, valid)
    largest = masked.abs().amax()
    scaled = masked / torch.where(largest == 0, 1.0, largest)
    total = scaled.sum()
    mean_one = scaled * (mask.sum() / torch.where(total == 0, 1.0, total))
    return mean_one.to(device=weights.device, dtype=weight_dtype(weights))


def blend_strength(weights: Tensor, strength: float | Tensor) -> Tensor:
    """Blend weights with uniform ones: 1 + strength * (w - 1). Exact at strength 0 and 1.

    Entries that are not valid become 1 - strength; the loss leaves them out.

    Args:
        weights: any shape.
        strength: `loss.lambda`, in [0, 1]; a 0-d tensor where it is measured (calibrated critic).
    """
    return torch.lerp(torch.ones_like(weights), weights, torch.as_tensor(strength).to(weights))


def weight_statistics(weights: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Mean, std (population), min, max and effective sample size of the valid weights: 0-d float64.

    `ess` is (sum w)^2 / sum w^2: of how many equally weighted tokens the batch is worth. Without valid
    entries all are 0.

    Args:
        weights, valid: any shape, the same.
    """
    masked, mask = as_one_group(weights, valid)
    groups = LastDimGroups()
    num_valid = count_over(groups, mask)
    mean = groups.sum(masked) / num_valid
    variance = groups.sum(torch.where(mask, masked - mean, 0.0).square()) / num_valid
    squares = groups.sum(masked.square())
    statistics = {
        "mean": mean,
        "std": variance.sqrt(),
        "min": min_over(groups, masked, mask),
        "max": max_over(groups, masked, mask),
        "ess": groups.sum(masked).square() / torch.where(squares == 0, 1.0, squares),
    }
    return {name: value.reshape(()) for name, value in statistics.items()}


def clip_to_mean_one(
    log_weights: Tensor, valid: Tensor, groups: Groups, *, epsilon: float, w_max: float
) -> Tensor:
    """clip(c * w, epsilon, w_max) with c chosen for each group so that the mean over its valid members is 1.

    The mean grows with c, so c is found by bisection, on log c because log weights may span thousands. The
    upper end of the bracket is kept, whose mean is at least 1; what it is above 1 is taken out by shrinking
    towards epsilon, which keeps order and bounds.

    Args:
        log_weights: float64, finite where valid; only differences within a group matter.
        valid: same shape, bool.
        groups: what the mean runs over.
        epsilon, w_max: bounds, 0 <= epsilon <= 1 <= w_max.

    Returns:
        float64 weights, the same shape; entries that are not valid hold no meaning.
    """
    check_bounds(epsilon, w_max)
    num_valid = count_over(groups, valid)
    log_scale = solve_log_scale(log_weights, valid, groups, epsilon=epsilon, w_max=w_max)
    weights = clipped_exp(log_weights + groups.expand(log_scale), epsilon, w_max)
    mean = groups.sum(torch.where(valid, weights, 0.0)) / num_valid
    # written so that weights of mean 1, equal ones above all, stay as they are to the last bit
    surplus = torch.where(mean > 1, (mean - 1) / (mean - epsilon), 0.0)
    return weights - (weights - epsilon) * groups.expand(surplus)


def solve_log_scale(
    log_weights: Tensor, valid: Tensor, groups: Groups, *, epsilon: float, w_max: float
) -> Tensor:
    """log c of each group with mean(clip(c * w, epsilon, w_max)) = 1, approached from above."""
    num_valid = count_over(groups, valid)
    # c = 1 / max(w) leaves nothing above 1, c = 1 / min(w) nothing below it
    low = -max_over(groups, log_weights, valid)
    high = -min_over(groups, log_weights, valid)
    for _ in range(_BISECTION_STEPS):
        middle = 0.5 * (low + high)
        weights = clipped_exp(log_weights + groups.expand(middle), epsilon, w_max)
        is_below = groups.sum(torch.where(valid, weights, 0.0)) < num_valid
        low = torch.where(is_below, middle, low)
        high = torch.where(is_below, high, middle)
    return high


def clipped_exp(log_weights: Tensor, epsilon: float, w_max: float) -> Tensor:
    """exp of the log weights, held inside [epsilon, w_max]."""
    log_epsilon = math.log(epsilon) if epsilon > 0 else -math.inf
    return log_weights.clamp(log_epsilon, math.log(w_max)).exp()


def standardize(scores: Tensor, valid: Tensor, groups: Groups) -> Tensor:
    """Z-scores, with the population standard deviation; all equal where all scores of a group are.

    Divided by max|s| first: the square of 1e300 overflows even float64.

    Args:
        scores: float64, 0 where not valid.
        valid: same shape, bool.
        groups: over what mean and deviation are taken.

    Returns:
        z, the same shape, 0 where not valid.
    """
    largest = max_over(groups, scores.abs(), valid)
    scaled = scores / groups.expand(torch.where(largest == 0, 1.0, largest))
    is_constant = max_over(groups, scaled, valid) == min_over(groups, scaled, valid)
    num_valid = count_over(groups, valid)
    centered = torch.where(valid, scaled - groups.expand(groups.sum(scaled) / num_valid), 0.0)
    deviation = (groups.sum(centered.square()) / num_valid).sqrt()
    return centered / groups.expand(torch.where(is_constant, 1.0, deviation))


def scaled_logits(scores: Tensor, valid: Tensor, groups: Groups, temperature: float) -> Tensor:
    """(s - max s) / temperature: softmax logits, at most 0, finite at any temperature; 0 where not valid."""
    below = scores - groups.expand(max_over(groups, scores, valid))
    return torch.where(valid, (below / temperature).clamp(min=_LOWEST_LOG), 0.0)


def finish_weights(
    weights: Tensor, like: Tensor, valid: Tensor, epsilon: float = 0.0, w_max: float = math.inf
) -> Tensor:
    """Float64 weights in the scores' dtype and on their device, still inside the bounds, 0 where not valid.

    Rounding a bound to fp32 may step over it (0.7 becomes 0.69999999), so the bounds are rounded inwards.
    """
    dtype = weight_dtype(like)
    lower, upper = (torch.tensor(bound, dtype=dtype, device="cpu") for bound in (epsilon, w_max))
    if lower.item() < epsilon:
        lower = lower.nextafter(torch.full_like(lower, math.inf))
    if upper.item() > w_max:
        upper = upper.nextafter(torch.full_like(upper, -math.inf))
    rounded = weights.to(device=like.device, dtype=dtype).clamp(lower.item(), upper.item())
    return torch.where(valid.to(torch.bool), rounded, 0.0)


def weight_dtype(like: Tensor) -> torch.dtype:
    """fp32, but float64 scores keep theirs."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def check_temperature(temperature: float) -> None:
    """Raise UserInputError unless the temperature is finite and above 0."""
    if not 0 < temperature < math.inf:
        raise UserInputError(
            f"temperature is {temperature}, but must be finite and above 0", remedy="default: 0.7"
        )


def check_bounds(epsilon: float, w_max: float) -> None:
    """Raise UserInputError unless 0 <= epsilon <= 1 <= w_max < infinity: else no weights have mean 1."""
    if not 0 <= epsilon <= 1 <= w_max < math.inf:
        raise UserInputError(
            f"weights in [{epsilon}, {w_max}] cannot have mean 1", remedy="choose 0 <= epsilon <= 1 <= w_max"
        )


def _weights_from_scores(
    scores: Tensor, valid: Tensor, groups: Groups, temperature: float, epsilon: float, w_max: float
) -> Tensor:
    """The pipeline over groups. Rescaling to mean 1 needs no step: the clip's scale absorbs any factor."""
    z = standardize(scores, valid, groups)
    log_weights = scaled_logits(z, valid, groups, temperature)
    return clip_to_mean_one(log_weights, valid, groups, epsilon=epsilon, w_max=w_max)
