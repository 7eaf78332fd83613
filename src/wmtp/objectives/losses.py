"""The weighted multi-token loss: how cross entropies of pairs are summed, and the plain reference.

Shapes: B batch, S sequence, H horizon, V vocabulary. K(t) is the set of heads that have a target at position
t. Every reduction is a weighted sum over pairs, loss = sum_{t,h} coefficient[t, h] * CE[t, h]; this module
owns the coefficients, so that the plain and the fused loss cannot drift apart in them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp.exceptions import UserInputError
from wmtp.objectives.labels import IGNORE_INDEX, Reduction, check_reduction, loss_normalizer, shift_labels


class MtpLoss(NamedTuple):
    """A loss and the cross entropies it was made of.

    Attributes:
        loss: scalar, differentiable; fp32, or fp64 for float64 inputs.
        ce_BSH: [B, S, H], nats, unweighted, detached, 0 where there is no target.
    """

    loss: Tensor
    ce_BSH: Tensor


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype cross entropy is computed in: fp32, but float64 inputs keep theirs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pair_coefficients(
    labels_BSH: Tensor,
    weight_BSH: Tensor | None = None,
    *,
    reduction: Reduction = "position",
    normalizer: Tensor | float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What each pair's cross entropy counts in the loss: loss = sum(coefficient_BSH * ce_BSH).

    - `position`: w / (|K(t)| * number of positions with a target), the mean over positions of the mean over
      heads;
    - `token`: w / number of pairs;
    - `head_sum`: w / number of targets of head h, the sum over heads of each head's mean (Gloeckle et al.
      2024, eq. 2).

    Args:
        labels_BSH: [B, S, H], shifted, -100 where there is no target.
        weight_BSH: [B, S, H], default 1. Not differentiated. Ignored where there is no target.
        reduction: one of the three above.
        normalizer: replaces the count of this batch by the global one: a scalar, or [H] for `head_sum`.
        dtype: of the result.

    Returns:
        [B, S, H], 0 where there is no target. A count of zero gives zeros.

    Raises:
        UserInputError: unknown reduction; weights or normalizer of another shape.
    """
    check_reduction(reduction)
    is_target_BSH = labels_BSH != IGNORE_INDEX
    if weight_BSH is None:
        weights_BSH = is_target_BSH.to(dtype)
    else:
        if weight_BSH.shape != labels_BSH.shape:
            raise UserInputError(
                f"weights {tuple(weight_BSH.shape)} and labels {tuple(labels_BSH.shape)} differ in shape",
                remedy="weights are [B, S, H]; spread_weights makes them from one weight a token",
            )
        # where, not a product: weights of tokens without a target may be anything, also NaN
        weights_BSH = torch.where(is_target_BSH, weight_BSH.detach().to(dtype), 0.0)
    if normalizer is None:
        normalizer = loss_normalizer(labels_BSH, reduction)
    count = torch.as_tensor(normalizer, device=labels_BSH.device).to(dtype)
    expected = labels_BSH.shape[-1] if reduction == "head_sum" else 1
    if count.numel() != expected:
        raise UserInputError(
            f"normalizer has shape {tuple(count.shape)}, but {reduction!r} needs {expected} value(s)",
            remedy="use loss_normalizer of the same reduction",
        )
    if reduction == "position":
        num_heads_BS1 = is_target_BSH.sum(dim=-1, keepdim=True).to(dtype)
        weights_BSH = weights_BSH / num_heads_BS1.clamp(min=1)
    count = count.reshape(-1)
    return weights_BSH / torch.where(count == 0, 1.0, count)


def compute_weighted_mtp_loss(
    logits_BSHV: Tensor,
    labels: Tensor,
    weight_BSH: Tensor | None = None,
    *,
    reduction: Reduction = "position",
    normalizer: Tensor | float | None = None,
) -> MtpLoss:
    """The weighted multi-token loss from whole logits: the plain reference, simple and hungry for memory.

    Args:
        logits_BSHV: [B, S, H, V].
        labels: labels_BSH [B, S, H], already shifted, or labels_BS [B, S], unshifted (one document a row).
        weight_BSH: [B, S, H], default 1; not differentiated.
        reduction: `position`, `token` or `head_sum`, see `pair_coefficients`.
        normalizer: the global count, see `loss_normalizer`; default: that of this batch.

    Returns:
        MtpLoss; gradients flow to the logits.

    Raises:
        UserInputError (a ValueError) naming both shapes: logits that are not [B, S, H, V], or labels that do
        not fit.
    """
    shapes = f"logits {tuple(logits_BSHV.shape)} and labels {tuple(labels.shape)}"
    remedy = "logits are [B, S, H, V]; labels are [B, S, H], or [B, S] when unshifted"
    if logits_BSHV.dim() != 4 or labels.dim() not in (2, 3) or labels.shape[:2] != logits_BSHV.shape[:2]:
        raise UserInputError(f"{shapes} do not fit", remedy=remedy)
    horizon, vocab_size = logits_BSHV.shape[2:]
    labels_BSH = shift_labels(labels, horizon) if labels.dim() == 2 else labels
    if labels_BSH.shape[2] != horizon:
        raise UserInputError(f"{shapes} differ in the horizon", remedy=remedy)
    dtype = loss_dtype(logits_BSHV.dtype)
    coefficient_BSH = pair_coefficients(
        labels_BSH, weight_BSH, reduction=reduction, normalizer=normalizer, dtype=dtype
    )
    ce_BSH = F.cross_entropy(
        logits_BSHV.reshape(-1, vocab_size).to(dtype),
        labels_BSH.reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    ).reshape(labels_BSH.shape)
    return MtpLoss(loss=(coefficient_BSH * ce_BSH).sum(), ce_BSH=ce_BSH.detach())
