"""Shapes of drafts, and the masks that go with them."""

from __future__ import annotations

import pytest
import torch

from wmtp.decoding.masks import BlockMask
from wmtp.decoding.tree import MAX_NODES, DraftTree
from wmtp.exceptions import UserInputError


def test_widths_give_every_combination_of_ranks_once_depth_by_depth() -> None:
    tree = DraftTree.of_widths([2, 3])
    assert tree.parents == (-1, 0, 0, 1, 1, 1, 2, 2, 2)
    assert tree.depths == (0, 1, 1, 2, 2, 2, 2, 2, 2)
    assert tree.ranks == (0, 0, 1, 0, 1, 2, 0, 1, 2)
    assert tree.children == ((1, 2), (3, 4, 5), (6, 7, 8), (), (), (), (), (), ())
    assert (tree.num_nodes, tree.num_drafts, tree.width, tree.is_chain) == (9, 2, 3, False)
    assert tree.ancestors(torch.device("cpu"))[5].nonzero()[:, 0].tolist() == [0, 1, 5]


def test_a_chain_is_the_tree_of_width_one() -> None:
    chain = DraftTree.chain(3)
    assert chain == DraftTree.of_widths((1, 1, 1))
    assert chain.is_chain
    assert torch.equal(chain.ancestors(torch.device("cpu")), torch.ones(4, 4).tril().bool())
    assert not DraftTree.of_widths((1, 2)).is_chain


@pytest.mark.parametrize("widths", [(0,), (2, -1), (MAX_NODES,), (9, 9, 9, 9)])
def test_trees_that_are_none_or_too_large_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(UserInputError, match="widths"):
        DraftTree.of_widths(widths)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("widths", [(1, 1, 1), (2, 2), (3,)])
def test_masks_are_what_every_pair_of_tokens_says(widths: tuple[int, ...], window: int | None) -> None:
    tree, capacity = DraftTree.of_widths(widths), 12
    ancestors = tree.ancestors(torch.device("cpu"))
    mask = BlockMask(
        ancestors, torch.tensor(tree.depths), window=window, capacity=capacity, dtype=torch.float64
    )

    def naive(start: int, num_columns: int) -> list[list[bool]]:
        rows = []
        for node, depth in enumerate(tree.depths):
            row = []
            for column in range(num_columns):
                in_block = 0 <= column - start < tree.num_nodes
                position = start + tree.depths[column - start] if in_block else column
                seen = bool(ancestors[node, column - start]) if in_block else column < start
                row.append(seen and (window is None or start + depth - position < window))
            rows.append(row)
        return rows

    for start in (0, 1, 5):
        num_columns = start + tree.num_nodes
        cut = mask.cut(start, num_columns)
        assert cut.shape == (1, 1, tree.num_nodes, num_columns)
        assert (cut[0, 0] == 0).tolist() == naive(start, num_columns)
        assert cut.unique().tolist() in ([0.0], [torch.finfo(torch.float64).min, 0.0])
    # Rows at columns of their own; the shorter ones see nothing behind their block.
    starts, num_columns = [4, 0, 2], 4 + tree.num_nodes
    ragged = mask.cut(torch.tensor(starts), num_columns)
    for row, start in enumerate(starts):
        assert (ragged[row, 0] == 0).tolist() == naive(start, num_columns)
