"""The error a value head is trained on, in stage 1 and beside the model in stage 2."""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.components.data.examples import Batch
from wmtp.objectives import generalized_advantages


def value_errors(batch: Batch, values_BS: Tensor, *, gamma: float, lam: float) -> Tensor:
    """V minus its lambda-return, 0 where the document's reward is not known.

    Args:
        batch: has `token_rewards`, `reward_mask` and `document_ids`.
        values_BS: V_t, the total reward expected after token t.
        gamma: discount a token.
        lam: GAE's lambda.

    Returns:
        fp32 [B,S]; gradient flows to V, not to the return, which is made without gradient.
    """
    known_BS = batch["reward_mask"]
    _, returns_BS = generalized_advantages(
        batch["token_rewards"],
        values_BS,
        known_BS,
        gamma=gamma,
        lam=lam,
        document_ids_BS=batch["document_ids"],
    )
    return torch.where(known_BS, values_BS - returns_BS, 0.0)
