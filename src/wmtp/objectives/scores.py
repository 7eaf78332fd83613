"""Token scores: what a scorer computes before the scores are turned into weights.

Shapes: B batch, S sequence. [B, S] tensors are indexed by token: entry t is about token t of the text.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wmtp.exceptions import UserInputError
from wmtp.objectives.labels import IGNORE_INDEX, look_ahead

ExcessScore = Literal["excess", "absolute"]


def index_by_token(ce_BS: Tensor) -> Tensor:
    """Move values of positions to the token they predict: result[:, t + 1] = ce[:, t], result[:, 0] = 0.

    Args:
        ce_BS: [B, S], entry t is head 0's value at position t, about token t + 1 (see `token_cross_entropy`).

    Returns:
        [B, S], indexed by token. A document's first token gets 0, since no position predicts it.
    """
    moved_BS = torch.zeros_like(ce_BS)
    moved_BS[:, 1:] = ce_BS[:, :-1]
    return moved_BS


def valid_tokens(labels_BSH: Tensor) -> Tensor:
    """Tokens that are a target of head 0: bool [B, S], indexed by token. A document's first token never is.

    Args:
        labels_BSH: [B, S, H], shifted (`shift_labels`).
    """
    is_target_BS = labels_BSH[:, :, 0] != IGNORE_INDEX
    return torch.cat([torch.zeros_like(is_target_BS[:, :1]), is_target_BS[:, :-1]], dim=1)


def position_scores(score_BS: Tensor) -> Tensor:
    """Position scores from token scores, for weight scope `position`: position t is scored by token t + 1.

    Args:
        score_BS: [B, S], indexed by token.

    Returns:
        [B, S], indexed by position; the last position, which has no next token, gets 0.
    """
    return look_ahead(score_BS, (1,), 0).squeeze(-1)


def excess_loss(ce_current_BS: Tensor, ce_reference_BS: Tensor, *, score: ExcessScore = "excess") -> Tensor:
    """How much worse the model is than the reference on each token (Rho-1, Lin et al. 2024, eq. 3).

    Both losses must be of the same target token: head h at position t is compared with the reference at t +
        h.

    Args:
        ce_current_BS: [B, S], loss of the model in training, nats.
        ce_reference_BS: [B, S], loss of the frozen reference on the same tokens, nats.
        score: `excess` is current - reference; `absolute` its absolute value, which also raises the weight of
            tokens that the reference finds unlikely, wrong labels among them.

    Returns:
        score_BS, [B, S], detached.

    Raises:
        UserInputError: shapes that differ, an unknown score.
    """
    if ce_current_BS.shape != ce_reference_BS.shape:
        raise UserInputError(
            f"model losses {tuple(ce_current_BS.shape)} and reference losses {tuple(ce_reference_BS.shape)} "
            "differ in shape"
        )
    if score not in ("excess", "absolute"):
        raise UserInputError(f"unknown score {score!r}", remedy="use 'excess' or 'absolute'")
    excess_BS = ce_current_BS.detach() - ce_reference_BS.detach()
    return excess_BS.abs() if score == "absolute" else excess_BS


def value_deltas(values_BS: Tensor, *, document_ids_BS: Tensor | None = None) -> Tensor:
    """What each token changed in the expected reward: delta_t = V_t - V_{t-1}, V_{-1} = 0, per document.

    V_t estimates the total reward of the document given its tokens up to and including t, so the delta is the
    TD error.

    Args:
        values_BS: [B, S], indexed by token.
        document_ids_BS: [B, S], one id for each packed document of a row, -1 on padding. Without it, a row is
            one document.

    Returns:
        delta_BS, [B, S], detached, 0 on padding.

    Raises:
        UserInputError: shapes that differ.
    """
    values_BS = values_BS.detach()
    previous_BS = index_by_token(values_BS)
    if document_ids_BS is None:
        return values_BS - previous_BS
    if document_ids_BS.shape != values_BS.shape:
        raise UserInputError(
            f"values {tuple(values_BS.shape)} and document ids {tuple(document_ids_BS.shape)} differ in shape"
        )
    is_first_BS = torch.ones_like(document_ids_BS, dtype=torch.bool)
    is_first_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
    deltas_BS = values_BS - previous_BS.masked_fill(is_first_BS, 0)
    return deltas_BS.masked_fill(document_ids_BS < 0, 0)
