"""Label shift for multi-token prediction: the one place that decides which head predicts which token.

Shapes: B batch, S sequence, H horizon (number of heads). Head h (0-based) at position t predicts token t +
offsets[h], by default token t + h + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from wmtp.exceptions import UserInputError

IGNORE_INDEX = -100

Reduction = Literal["position", "token", "head_sum"]
REDUCTIONS: tuple[str, ...] = ("position", "token", "head_sum")


def head_offsets(horizon: int, offsets: Sequence[int] | None = None) -> tuple[int, ...]:
    """How far ahead each head looks, in tokens: `offsets`, or 1..horizon.

    Raises:
        UserInputError: horizon below 1, an offset below 1, or not one offset a head.
    """
    if horizon < 1:
        raise UserInputError(f"horizon is {horizon}, but must be at least 1", remedy="use 1 for plain SFT")
    if offsets is None:
        return tuple(range(1, horizon + 1))
    if len(offsets) != horizon or min(offsets) < 1:
        raise UserInputError(
            f"offsets {list(offsets)} do not fit horizon {horizon}",
            remedy="give one offset of at least 1 for each head",
        )
    return tuple(offsets)


def look_ahead(values_BS: Tensor, offsets: Sequence[int], fill: float) -> Tensor:
    """Token values as each head sees them: result[b, t, h] = values[b, t + offsets[h]], `fill` past the end.

    Args:
        values_BS: [B, S], indexed by token.
        offsets: H distances in tokens.
        fill: what stands where t + offset is outside the sequence.

    Returns:
        [B, S, H] in the dtype of `values_BS`.
    """
    seq_len = values_BS.shape[1]
    ahead_BSH = values_BS.new_full((*values_BS.shape, len(offsets)), fill)
    for head, offset in enumerate(offsets):
        if offset < seq_len:
            ahead_BSH[:, : seq_len - offset, head] = values_BS[:, offset:]
    return ahead_BSH


def shift_labels(
    labels_BS: Tensor,
    horizon: int,
    *,
    document_ids_BS: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Shift unshifted labels so that entry [b, t, h] is what head h has to predict at position t.

    A target exists where token t + offset lies inside the sequence, in the same document as t, and is not
    `ignore_index` itself (prompt, padding). The position t may itself be masked: the last token of a prompt
    does predict the first token of its completion.

    Example: `horizon=3`, two packed documents (a b c) and (d e), one token of padding:

        labels_BS        a  b  c  d  e  -100
        document_ids_BS  0  0  0  1  1  -1

        head 0 (t+1)     b  c  .  e  .  .
        head 1 (t+2)     c  .  .  .  .  .
        head 2 (t+3)     .  .  .  .  .  .       (. is -100)

    Args:
        labels_BS: [B, S] integers, unshifted: the token's id where it counts as a target, else
            `ignore_index`.
        horizon: number of heads H.
        document_ids_BS: [B, S] integers, one id for each packed document of a row, -1 on padding. Without it,
            a row is one document.
        offsets: H distances in tokens, default 1..H.
        ignore_index: marks "no target", in the input and in the result.

    Returns:
        labels_BSH, [B, S, H], same dtype. A horizon beyond the sequence leaves the far heads without targets.

    Raises:
        UserInputError: labels or document ids that are not [B, S], a horizon below 1, offsets that do not
            fit.
    """
    distances = head_offsets(horizon, offsets)
    if labels_BS.dim() != 2:
        raise UserInputError(f"labels must be [B, S], got {tuple(labels_BS.shape)}")
    labels_BSH = look_ahead(labels_BS, distances, ignore_index)
    if document_ids_BS is None:
        return labels_BSH
    if document_ids_BS.shape != labels_BS.shape:
        raise UserInputError(
            f"document ids {tuple(document_ids_BS.shape)} and labels {tuple(labels_BS.shape)} differ in shape"
        )
    target_document_BSH = look_ahead(document_ids_BS, distances, -1)
    is_same_BSH = (target_document_BSH == document_ids_BS.unsqueeze(-1)) & (target_document_BSH >= 0)
    return labels_BSH.masked_fill(~is_same_BSH, ignore_index)


def count_positions(labels_BSH: Tensor) -> Tensor:
    """Number of positions with at least one target, |{t : K(t) not empty}|: an int64 scalar."""
    return (labels_BSH != IGNORE_INDEX).any(dim=-1).sum()


def count_targets(labels_BSH: Tensor) -> Tensor:
    """Number of targets of each head: int64, [H]."""
    return (labels_BSH != IGNORE_INDEX).flatten(end_dim=-2).sum(dim=0)


def loss_normalizer(labels_BSH: Tensor, reduction: Reduction = "position") -> Tensor:
    """What a loss of this reduction is divided by; int64, so that sums over batches and ranks are exact.

    The normalizer of a whole step is the sum of its parts' normalizers. Given that to each part's loss, the
    parts' losses and gradients add up to those of the whole.

    Args:
        labels_BSH: [B, S, H], shifted.
        reduction: `position` counts positions with a target, `token` counts (t, h) pairs, `head_sum` counts
            per head.

    Returns:
        A scalar, or [H] for `head_sum`.

    Raises:
        UserInputError: an unknown reduction.
    """
    check_reduction(reduction)
    if reduction == "position":
        return count_positions(labels_BSH)
    targets_H = count_targets(labels_BSH)
    return targets_H if reduction == "head_sum" else targets_H.sum()


def check_reduction(reduction: str) -> None:
    """Raise UserInputError unless `reduction` is one of `REDUCTIONS`."""
    if reduction not in REDUCTIONS:
        raise UserInputError(f"unknown reduction {reduction!r}", remedy=f"use one of {', '.join(REDUCTIONS)}")
