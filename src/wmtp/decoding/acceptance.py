"""Which drafts stand: by comparison with what the model itself says, and by rejection sampling.

The model has looked at a block: node 0 is a token that is known, the others are drafts. What is accepted is a
path down from node 0, and one token more is always gained, the model's own after the last accepted draft.

Shapes: B rows, T nodes of a block, N = T - 1 drafts of a chain, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.decoding.sampling import draw_from_weights
from wmtp.decoding.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a block adds to a row. On the host: a block is a few tokens, and the host must know.

    Attributes:
        path: the nodes that stand, node 0 first.
        token_ids: the new tokens: the accepted drafts, and the model's own after them. As many as nodes.
    """

    path: list[int]
    token_ids: list[int]


def accept_path(tree: DraftTree, block: Sequence[int], chosen: Sequence[int]) -> Verdict:
    """Follow the drafts that are what the model itself says, greedy or by a draw.

    A draft that is a fixed token, alone or one of several alternatives, stands with the probability that the
    model gives it, and where all fall the draw follows the model's distribution without them: rejection
    sampling from point masses.

    Args:
        tree: of the block.
        block: tokens of the nodes; children of a node are distinct.
        chosen: the model's token after each node.
    """
    path, token_ids = [0], [chosen[0]]
    while True:
        child = next((node for node in tree.children[path[-1]] if block[node] == token_ids[-1]), None)
        if child is None:
            return Verdict(path, token_ids)
        path.append(child)
        token_ids.append(chosen[child])


def accept_sampled(
    block_BT: Tensor,
    model_BTV: Tensor,
    draft_BNV: Tensor,
    accept_uniforms_BN: Tensor,
    token_uniforms_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accept the drafts of a chain so that all tokens follow the model's distribution exactly.

    Draft x stands with probability min(1, p(x) / q(x)); where it falls, the token is drawn from the residual,
    max(p - q, 0) rescaled. Source: Leviathan et al., 2023 (arXiv:2211.17192, section 2.3).

    Args:
        block_BT: the known token and the drafts.
        model_BTV: p, the model's probabilities after each node, float64.
        draft_BNV: q, from which each draft was drawn, float64.
        accept_uniforms_BN: decide over the drafts.
        token_uniforms_BT: draw the token after each node.

    Returns:
        [B] drafts that stand, and [B] the token after them.
    """
    drafts_BN1 = block_BT[:, 1:, None]
    model_BN = model_BTV[:, :-1].gather(2, drafts_BN1)[..., 0]
    draft_BN = draft_BNV.gather(2, drafts_BN1)[..., 0]
    is_accepted_BN = accept_uniforms_BN * draft_BN < model_BN
    num_accepted_B = is_accepted_BN.long().cumprod(dim=1).sum(dim=1)
    rows_B = torch.arange(block_BT.shape[0], device=block_BT.device)
    own_BV = model_BTV[rows_B, num_accepted_B]
    # Where all drafts stand, nothing was refused and the residual is p itself.
    refused_BTV = torch.cat([draft_BNV, torch.zeros_like(model_BTV[:, :1])], dim=1)
    residual_BV = (own_BV - refused_BTV[rows_B, num_accepted_B]).clamp(min=0)
    # p = q leaves nothing, and rejects only by rounding.
    weights_BV = torch.where(residual_BV.sum(dim=1, keepdim=True) > 0, residual_BV, own_BV)
    next_B = draw_from_weights(weights_BV, token_uniforms_BT[rows_B, num_accepted_B])
    return num_accepted_B, next_B
