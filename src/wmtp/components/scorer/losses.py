"""Per-token losses and label statistics of a model, indexed by token, for scorers.

Legend: B batch, S sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.components.data.examples import Batch
from wmtp.modeling import MTPModel
from wmtp.objectives import IGNORE_INDEX, index_by_token, shift_labels, token_cross_entropy


def token_losses(model: MTPModel, hidden_BSD: Tensor, batch: Batch, needed_BS: Tensor) -> Tensor:
    """Cross entropy (nats) of head 0 on each token of the text, given the tokens before it.

    Args:
        model: gives the unembedding.
        hidden_BSD: head 0's hidden states after the final norm.
        batch: the micro-batch.
        needed_BS: tokens whose loss is wanted; prompt tokens may be among them.

    Returns:
        fp32 [B,S] indexed by token; 0 for tokens not needed and for a document's first token.
    """
    ce_BS = token_cross_entropy(
        hidden_BSD,
        model.unembedding_VD,
        next_token_labels(batch, needed_BS),
        logit_scale=model.logit_scale,
        logit_softcap=model.logit_softcap,
        bias_V=model.unembedding_bias_V,
    )
    return index_by_token(ce_BS)


def next_token_labels(batch: Batch, needed_BS: Tensor) -> Tensor:
    """[B,S]: the needed token that head 0 predicts at each position, -100 where there is none."""
    labels_BS = torch.where(needed_BS, batch["input_ids"], IGNORE_INDEX)
    return shift_labels(labels_BS, 1, document_ids_BS=batch["document_ids"])[..., 0]
