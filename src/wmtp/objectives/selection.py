"""Rho-1's selection of tokens, soft and hard, and its controls (Lin et al. 2024, section 2.2).

All functions take the scores of a whole optimizer step in any shape and rank them together. Ranking is in
float64, with ties going to the token that comes first, because hard selection is discontinuous at the
threshold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wmtp.exceptions import UserInputError
from wmtp.objectives.groups import LastDimGroups, as_one_group, masked_scores
from wmtp.objectives.weights import (
    check_temperature,
    clip_to_mean_one,
    finish_weights,
    scaled_logits,
    standardize,
)


def select_top(scores: Tensor, valid: Tensor, num_selected: Tensor) -> Tensor:
    """The `num_selected` valid entries with the highest scores, ties by index; bool.

    Args:
        scores: any shape, finite where valid.
        valid: same shape, bool.
        num_selected: integer scalar, on any device.
    """
    masked, mask = (tensor.reshape(-1) for tensor in masked_scores(scores, valid))
    # a stable sort keeps equal scores in index order; invalid entries come last
    order = torch.where(mask, masked, -torch.inf).sort(descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    is_selected = (rank < num_selected.to(rank.device)) & mask
    return is_selected.reshape(scores.shape).to(scores.device)


def weighted_excess_weights(
    scores: Tensor,
    valid: Tensor,
    *,
    percentile_top_p: float = 0.15,
    alpha: float = 0.0,
    temperature: float = 0.7,
    epsilon: float = 0.05,
    w_max: float = 3.0,
) -> Tensor:
    """Soft selection: weights rise with the z-score above the threshold, all tokens below it get the same.

    The k = ceil(percentile_top_p * N) highest scores are selected; the lowest of them is the threshold. The
    softmax gets max(z(s) - z(threshold), 0), is rescaled to mean 1, mixed with `alpha`, and clipped as in
    `normalize_weights`.

    Args:
        scores: excess losses, any shape, finite where valid.
        valid: same shape, bool.
        percentile_top_p: share of selected tokens, in (0, 1]; 1.0 gives plain `normalize_weights`.
        alpha: floor, w <- (1 - alpha) * w + alpha, in [0, 1]; before the clip.
        temperature, epsilon, w_max: as in `normalize_weights`.

    Returns:
        Weights with all the properties of `normalize_weights`; constant scores give exactly ones.

    Raises:
        UserInputError: shapes that differ, settings outside their bounds.
    """
    check_temperature(temperature)
    _check_share("percentile_top_p", percentile_top_p)
    if not 0 <= alpha <= 1:
        raise UserInputError(f"alpha is {alpha}, but must be in [0, 1]", remedy="0 means no floor")
    groups = LastDimGroups()
    masked, mask = as_one_group(scores, valid)
    z = standardize(masked, mask, groups)
    is_selected = select_top(masked, mask, num_selected(mask, percentile_top_p))
    threshold = torch.where(is_selected, z, torch.inf).amin()
    logits = scaled_logits((z - threshold).clamp(min=0), mask, groups, temperature)
    if alpha > 0:
        total = torch.where(mask, logits, -torch.inf).logsumexp(dim=-1, keepdim=True)
        log_mean_one = logits - total + mask.sum().to(total.dtype).log()
        floor = torch.full_like(logits, math.log(alpha))
        logits = floor if alpha == 1 else torch.logaddexp(log_mean_one + math.log1p(-alpha), floor)
    weights = clip_to_mean_one(torch.where(mask, logits, 0.0), mask, groups, epsilon=epsilon, w_max=w_max)
    return finish_weights(weights.reshape(scores.shape), scores, valid, epsilon, w_max)


def num_selected(valid: Tensor, percentile_top_p: float) -> Tensor:
    """k = ceil(percentile_top_p * N) as an integer scalar on the device, N the number of valid entries."""
    return (valid.sum().to(torch.float64) * percentile_top_p).ceil().to(torch.int64)


def tokenskip_weights(scores: Tensor, valid: Tensor, *, ratio: float = 0.6) -> Tensor:
    """Hard selection: N / k on the k = round(ratio * N) highest scores (at least one), 0 on the rest.

    No softmax and no clip. At H=1 the loss is the paper's mean over the selected tokens.

    Args:
        scores: any shape, finite where valid.
        valid: same shape, bool.
        ratio: share of selected tokens, in (0, 1].

    Returns:
        Weights in the shape of `scores`, fp32 (fp64 for float64 scores), mean 1 over valid entries.

    Raises:
        UserInputError: shapes that differ, a ratio outside (0, 1].
    """
    _check_share("ratio", ratio)
    num_valid = valid.sum().to(device=scores.device)
    count = _rounded_share(num_valid, ratio)
    is_selected = select_top(scores, valid, count)
    return finish_weights(is_selected * (num_valid / count), scores, valid)


def random_skip_weights(
    valid: Tensor, *, ratio: float = 0.6, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Control: `tokenskip_weights` of tokens drawn at random instead of by score.

    Args:
        valid: any shape, bool.
        ratio: share of selected tokens, in (0, 1].
        generator: source of the draw; the same state gives the same tokens. Its device need not be that of
            `valid`.
        dtype: of the weights.

    Returns:
        Weights in the shape of `valid`.
    """
    return tokenskip_weights(_random_keys(valid, generator), valid, ratio=ratio).to(dtype)


def shuffle_weights(weights: Tensor, valid: Tensor, *, generator: torch.Generator) -> Tensor:
    """Control: the real weights, permuted at random among the valid entries.

    Args:
        weights: any shape.
        valid: same shape, bool.
        generator: source of the permutation.

    Returns:
        Same shape and dtype, 0 on invalid entries.

    Raises:
        UserInputError: shapes that differ.
    """
    if weights.shape != valid.shape:
        raise UserInputError(f"weights {tuple(weights.shape)} and valid {tuple(valid.shape)} differ in shape")
    mask = valid.reshape(-1).to(torch.bool)
    keys = _random_keys(mask, generator)
    # the i-th valid entry goes to the entry with the i-th smallest key; invalid entries fill up the end of
    # both orders
    by_index = (~mask).sort(stable=True).indices
    by_key = torch.where(mask, keys, torch.inf).sort(stable=True).indices
    source = torch.where(mask, weights.detach().reshape(-1), 0)
    return torch.zeros_like(source).scatter_(0, by_key, source[by_index]).reshape(weights.shape)


def _rounded_share(num_valid: Tensor, ratio: float) -> Tensor:
    return (num_valid.to(torch.float64) * ratio).round().clamp(min=1)


def _random_keys(valid: Tensor, generator: torch.Generator) -> Tensor:
    keys = torch.rand(valid.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return keys.to(valid.device)


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise UserInputError(f"{name} is {share}, but must be above 0 and at most 1")
