"""Acceptance of drafts, beside loops that follow its definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.decoding.acceptance import accept_chain, accept_sampled, accept_tree
from wmtp.decoding.tree import DraftTree

WIDTHS = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(WIDTHS, st.integers(0, 2**31))
def test_the_accepted_path_is_the_one_a_walk_down_the_tree_finds(widths: list[int], seed: int) -> None:
    tree = DraftTree.of_widths(widths)
    generator = torch.Generator().manual_seed(seed)
    # Few tokens, so that paths are long; siblings differ, as the ranks of a head do.
    candidates = torch.stack([torch.randperm(4, generator=generator) for _ in widths])
    block = torch.tensor(
        [[9, *(int(candidates[d - 1, r]) for d, r in zip(tree.depths[1:], tree.ranks[1:], strict=True))]] * 16
    )
    chosen = torch.randint(0, 4, block.shape, generator=generator)
    verdict = accept_tree(
        block, chosen, torch.tensor(tree.parents), tree.ancestors(torch.device("cpu")), tree.num_drafts
    )
    assert verdict.path_BT is not None
    for row in range(len(block)):
        node, path, tokens = 0, [0], []
        while True:
            tokens.append(int(chosen[row, node]))
            children = [child for child, parent in enumerate(tree.parents) if parent == node]
            matching = [child for child in children if block[row, child] == chosen[row, node]]
            if not matching:
                break
            node = matching[0]
            path.append(node)
        num_accepted = int(verdict.num_accepted_B[row])
        assert verdict.path_BT[row, : num_accepted + 1].tolist() == path
        assert verdict.tokens_BT[row, : num_accepted + 1].tolist() == tokens
        assert int(verdict.last_node_B[row]) == node
        assert int(verdict.next_token_B[row]) == tokens[-1]
    if tree.is_chain:
        chain = accept_chain(block, chosen)
        assert torch.equal(chain.num_accepted_B, verdict.num_accepted_B)
        assert torch.equal(chain.next_token_B, verdict.next_token_B)
        assert torch.equal(chain.last_node_B, verdict.last_node_B)


def test_a_draft_as_likely_as_the_model_says_always_stands() -> None:
    p = torch.tensor([[[0.2, 0.3, 0.5], [0.1, 0.9, 0.0], [0.4, 0.4, 0.2]]], dtype=torch.float64)
    almost_one = torch.full((1, 2), 1 - 2.0**-53, dtype=torch.float64)
    block = torch.tensor([[0, 1, 0]])
    verdict = accept_sampled(block, p, p[:, :2], almost_one, torch.tensor([[0.5, 0.5, 0.79]]).double())
    assert verdict.num_accepted_B.tolist() == [2]
    assert verdict.tokens_BT.tolist() == [[1, 0, 1]]


def test_a_draft_the_model_rules_out_never_stands_and_is_never_redrawn() -> None:
    p = torch.tensor([[[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    q = torch.tensor([[[0.5, 0.5, 0.0]]], dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for uniform in (0.0, 0.5, 1 - 2.0**-53):
        verdict = accept_sampled(
            torch.tensor([[1, 0]]), p, q, zero, torch.tensor([[uniform, uniform]], dtype=torch.float64)
        )
        assert verdict.num_accepted_B.tolist() == [0]
        # Of p - q only token 2 is left.
        assert verdict.next_token_B.tolist() == [2]


def test_acceptance_and_residual_are_the_published_ones() -> None:
    """P(accept x) = min(1, p/q), and what is drawn after a refusal is max(p - q, 0) rescaled."""
    p, q = torch.tensor([0.1, 0.6, 0.3]).double(), torch.tensor([0.5, 0.2, 0.3]).double()
    grid = (torch.arange(1000).double() + 0.5) / 1000
    num = len(grid)
    model = p.expand(num, 2, 3)
    for draft, share in ((0, 0.2), (1, 1.0), (2, 1.0)):
        block = torch.tensor([[0, draft]]).expand(num, 2)
        uniforms = torch.full((num, 2), 0.5).double()
        verdict = accept_sampled(block, model, q.expand(num, 1, 3), grid[:, None], uniforms)
        assert verdict.num_accepted_B.double().mean().item() == share
    refused = accept_sampled(
        torch.tensor([[0, 0]]).expand(num, 2),
        model,
        q.expand(num, 1, 3),
        torch.full((num, 1), 0.99).double(),
        grid[:, None].expand(num, 2),
    )
    assert refused.next_token_B.bincount(minlength=3).tolist() == [0, 1000, 0]
