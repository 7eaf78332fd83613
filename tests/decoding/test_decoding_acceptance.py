"""Acceptance of drafts, beside loops that follow its definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.decoding.acceptance import accept_path, accept_sampled
from wmtp.decoding.tree import DraftTree

WIDTHS = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(WIDTHS, st.integers(0, 2**31))
def test_the_accepted_path_is_the_longest_along_which_every_draft_is_the_models_token(
    widths: list[int], seed: int
) -> None:
    tree = DraftTree.of_widths(widths)
    generator = torch.Generator().manual_seed(seed)
    # Few tokens, so that paths are long; siblings differ, as the ranks of a head do.
    candidates = torch.stack([torch.randperm(4, generator=generator) for _ in widths])
    block = [9, *(int(candidates[d - 1, r]) for d, r in zip(tree.depths[1:], tree.ranks[1:], strict=True))]
    ancestors = tree.ancestors(torch.device("cpu"))
    for _ in range(16):
        chosen = torch.randint(0, 4, (tree.num_nodes,), generator=generator).tolist()
        standing = [
            node
            for node in range(tree.num_nodes)
            if all(
                block[other] == chosen[tree.parents[other]]
                for other in ancestors[node].nonzero()[:, 0].tolist()
                if other > 0
            )
        ]
        verdict = accept_path(tree, block, chosen)
        assert verdict.path == standing
        assert verdict.token_ids == [*(block[node] for node in standing[1:]), chosen[standing[-1]]]


def test_a_draft_as_likely_as_the_model_says_always_stands() -> None:
    p = torch.tensor([[[0.2, 0.3, 0.5], [0.1, 0.9, 0.0], [0.4, 0.4, 0.2]]], dtype=torch.float64)
    almost_one = torch.full((1, 2), 1 - 2.0**-53, dtype=torch.float64)
    block = torch.tensor([[0, 1, 0]])
    num_accepted, tokens = accept_sampled(
        block, p, p[:, :2], almost_one, torch.tensor([[0.5, 0.5, 0.79]]).double()
    )
    assert (num_accepted.tolist(), tokens.tolist()) == ([2], [1])


def test_a_draft_the_model_rules_out_never_stands_and_is_never_redrawn() -> None:
    p = torch.tensor([[[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    q = torch.tensor([[[0.5, 0.5, 0.0]]], dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for uniform in (0.0, 0.5, 1 - 2.0**-53):
        num_accepted, tokens = accept_sampled(
            torch.tensor([[1, 0]]), p, q, zero, torch.tensor([[uniform, uniform]], dtype=torch.float64)
        )
        # Of p - q only token 2 is left.
        assert (num_accepted.tolist(), tokens.tolist()) == ([0], [2])


def test_acceptance_and_residual_are_the_published_ones() -> None:
    """P(accept x) = min(1, p/q), and what is drawn after a refusal is max(p - q, 0) rescaled."""
    p, q = torch.tensor([0.1, 0.6, 0.3]).double(), torch.tensor([0.5, 0.2, 0.3]).double()
    grid = (torch.arange(1000).double() + 0.5) / 1000
    num = len(grid)
    model = p.expand(num, 2, 3)
    for draft, share in ((0, 0.2), (1, 1.0), (2, 1.0)):
        block = torch.tensor([[0, draft]]).expand(num, 2)
        uniforms = torch.full((num, 2), 0.5).double()
        num_accepted, _ = accept_sampled(block, model, q.expand(num, 1, 3), grid[:, None], uniforms)
        assert num_accepted.double().mean().item() == share
    _, tokens = accept_sampled(
        torch.tensor([[0, 0]]).expand(num, 2),
        model,
        q.expand(num, 1, 3),
        torch.full((num, 1), 0.99).double(),
        grid[:, None].expand(num, 2),
    )
    assert tokens.bincount(minlength=3).tolist() == [0, 1000, 0]
