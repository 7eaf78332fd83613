"""Which drafts stand: greedy, by a draw, and by rejection sampling.

Pure functions. The model has looked at a block: node 0 is a token that is known, the others are drafts. What
is accepted is a path down from node 0, and one token more is always gained, the model's own after the last
accepted draft.

Shapes: B rows, T nodes of a block, N = T - 1 drafts of a chain, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.decoding.sampling import draw_from_weights


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a block adds to its rows.

    Attributes:
        num_accepted_B: drafts that stand.
        tokens_BT: the new tokens in order: the accepted drafts, then the model's own; the first
            num_accepted + 1 count. For trees as many as the tree is deep, and one.
        path_BT: the nodes that stand, node 0 first; the first num_accepted + 1 count. None for chains, where
            it is 0, 1, 2, ...
    """

    num_accepted_B: Tensor
    tokens_BT: Tensor
    path_BT: Tensor | None = None

    @property
    def last_node_B(self) -> Tensor:
        """The last node that stands."""
        if self.path_BT is None:
            return self.num_accepted_B
        return self.path_BT.gather(1, self.num_accepted_B[:, None])[:, 0]

    @property
    def next_token_B(self) -> Tensor:
        """The model's own token after the accepted drafts."""
        return self.tokens_BT.gather(1, self.num_accepted_B[:, None])[:, 0]


def accept_chain(block_BT: Tensor, chosen_BT: Tensor) -> Verdict:
    """Accept the drafts of a chain up to the first that the model itself would not have written.

    Args:
        block_BT: the known token and the drafts.
        chosen_BT: the model's token after each of them, greedy or drawn. A draft that is one fixed token
            stands with the probability that the model gives it, and where it falls the draw follows the
            model's distribution without it: rejection sampling from a point mass.
    """
    is_match_BN = block_BT[:, 1:] == chosen_BT[:, :-1]
    return Verdict(is_match_BN.long().cumprod(dim=1).sum(dim=1), chosen_BT)


def accept_tree(
    block_BT: Tensor, chosen_BT: Tensor, parents_T: Tensor, is_ancestor_TT: Tensor, depth: int
) -> Verdict:
    """Accept the path of a tree along which every draft is what the model itself would have written.

    Args:
        block_BT: tokens of the nodes; children of a node are distinct.
        chosen_BT: the model's token after each node, greedy or drawn. Alternatives are fixed tokens, so a
            draw that is among them accepts it, and one that is not follows the residual distribution.
        parents_T: of each node; the root's is not read.
        is_ancestor_TT: entry [i,j]: whether j is i or one of its ancestors.
        depth: of the tree.
    """
    is_miss_BT = block_BT != chosen_BT[:, parents_T.clamp(min=0)]
    is_miss_BT[:, 0] = False
    stands_BT = ~(is_miss_BT[:, None, :] & is_ancestor_TT).any(dim=2)
    # Nodes are listed by depth and at most one of a depth stands.
    path_BT = stands_BT.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, : depth + 1]
    return Verdict(stands_BT.sum(dim=1) - 1, chosen_BT.gather(1, path_BT), path_BT)


def accept_sampled(
    block_BT: Tensor,
    model_BTV: Tensor,
    draft_BNV: Tensor,
    accept_uniforms_BN: Tensor,
    token_uniforms_BT: Tensor,
) -> Verdict:
    """Accept the drafts of a chain so that all tokens follow the model's distribution exactly.

    Draft x stands with probability min(1, p(x) / q(x)); where it falls, the token is drawn from the residual,
    max(p - q, 0) rescaled. Source: Leviathan et al., 2023 (arXiv:2211.17192, section 2.3).

    Args:
        block_BT: the known token and the drafts.
        model_BTV: p, the model's probabilities after each node, float64.
        draft_BNV: q, from which each draft was drawn, float64.
        accept_uniforms_BN: decide over the drafts.
        token_uniforms_BT: draw the token after each node.
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
    tokens_BT = torch.cat([block_BT[:, 1:], block_BT[:, :1]], dim=1)
    return Verdict(num_accepted_B, tokens_BT.scatter(1, num_accepted_B[:, None], next_B[:, None]))
