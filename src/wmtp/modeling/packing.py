"""Which attention mask and positions the wrapped model is given.

The wrapped model builds its own masks, because only it knows them: full or sliding window by layer, boolean
for SDPA, additive for eager attention, a block mask for FlexAttention. It builds an explicit block-causal
mask (same document, causal, window counted inside the document) when it gets no 2-D mask and positions that
restart. So documents are isolated by handing it exactly that; a 2-D mask beside restarted positions would
switch the isolation off. `MTPModel` verifies the isolation on the model at hand before it is relied on.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.exceptions import UserInputError


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Arguments for the wrapped model, and whether they rely on the isolation of documents."""

    attention_mask_BS: Tensor | None
    position_ids_BS: Tensor | None
    isolates_documents: bool = False


def plan_attention(
    attention_mask_BS: Tensor | None, position_ids_BS: Tensor | None, document_ids_BS: Tensor | None
) -> AttentionPlan:
    """Choose mask and positions.

    Without `document_ids_BS` the arguments pass through; positions are added where a row starts with padding,
    because models with learned positions would otherwise count the padding. With `document_ids_BS` (-1 on
    padding) and one document a row in front of the padding, nothing is passed: causal attention never reaches
    padding that comes later, and the fast causal kernels stay usable. Otherwise every document is isolated.

    Reads flags from the device once a call (a synchronisation on GPU).

    Raises:
        UserInputError: positions that do not rise by one inside a document and break at its first token.
    """
    if document_ids_BS is None:
        if attention_mask_BS is None or position_ids_BS is not None:
            return AttentionPlan(attention_mask_BS, position_ids_BS)
        starts_with_padding = bool((attention_mask_BS[:, 0] == 0).any())
        if not starts_with_padding:
            return AttentionPlan(attention_mask_BS, None)
        return AttentionPlan(attention_mask_BS, (attention_mask_BS.long().cumsum(dim=1) - 1).clamp(min=0))

    is_real_BS = document_ids_BS >= 0
    if attention_mask_BS is not None:
        is_real_BS = is_real_BS & (attention_mask_BS != 0)
    is_start_BS = _document_starts(document_ids_BS, is_real_BS)
    default_BS = _positions_from_starts(is_start_BS).where(is_real_BS, 0)
    wanted_BS = default_BS if position_ids_BS is None else position_ids_BS.where(is_real_BS, 0)
    jumps_BS = torch.diff(wanted_BS, dim=1) != 1
    has_several, has_other_positions, breaks_elsewhere = torch.stack(
        [
            is_start_BS[:, 1:].any(),
            (wanted_BS != default_BS).any(),
            ((jumps_BS != is_start_BS[:, 1:]) & is_real_BS[:, 1:]).any(),
        ]
    ).tolist()
    if has_several:
        if breaks_elsewhere:
            raise UserInputError(
                "position_ids do not follow document_ids: inside a document each position must be one more "
                "than the last, and the first of a document must not continue the document before it",
                remedy="leave position_ids out (they default to 0, 1, 2, ... in each document)",
            )
        return AttentionPlan(None, wanted_BS, isolates_documents=True)
    if has_other_positions:
        return AttentionPlan(is_real_BS.long(), wanted_BS)
    return AttentionPlan(None, None)


def _document_starts(document_ids_BS: Tensor, is_real_BS: Tensor) -> Tensor:
    is_start_BS = is_real_BS.clone()
    is_start_BS[:, 1:] &= (document_ids_BS[:, 1:] != document_ids_BS[:, :-1]) | ~is_real_BS[:, :-1]
    return is_start_BS


def _positions_from_starts(is_start_BS: Tensor) -> Tensor:
    index_S = torch.arange(is_start_BS.shape[1], device=is_start_BS.device)
    return index_S - (index_S * is_start_BS).cummax(dim=1).values
