"""The shape of what is drafted: a chain, or a tree of alternatives.

Node 0 is the token that is known; the nodes at depth d are drafts of head d for the d-th token after it, and
a node's children are alternatives for what follows it. Parallel heads know nothing of each other's drafts, so
all nodes of a depth draw on the same candidates: rank r is the head's (r+1)-th likeliest token.

Source: tree attention, Cai et al., 2024 (arXiv:2401.10774, section 2.1).
Shapes: T nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from wmtp.exceptions import UserInputError

MAX_NODES = 256


@dataclass(frozen=True)
class DraftTree:
    """A tree of drafts, depth by depth.

    Attributes:
        parents: index of each node's parent; the root's is -1.
        depths: of each node.
        ranks: which candidate of its head each node is, 0 for the likeliest.
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def chain(cls, num_drafts: int) -> DraftTree:
        """Return the tree of one draft a head."""
        return cls.of_widths((1,) * num_drafts)

    @classmethod
    def of_widths(cls, widths: Sequence[int]) -> DraftTree:
        """Return the tree in which every node at depth d has children of ranks 0 .. widths[d] - 1.

        Raises:
            UserInputError: a width below 1, or more nodes than a block should have.
        """
        if any(width < 1 for width in widths):
            raise UserInputError(f"tree widths are {list(widths)}", remedy="give at least 1 for each head")
        parents, depths, ranks = [-1], [0], [0]
        level = [0]
        for depth, width in enumerate(widths, start=1):
            if len(parents) + len(level) * width > MAX_NODES:
                raise UserInputError(
                    f"a tree of widths {list(widths)} has more than {MAX_NODES} nodes",
                    remedy="widen the first heads only, such as 3,2,1",
                )
            next_level = []
            for parent in level:
                for rank in range(width):
                    next_level.append(len(parents))
                    parents.append(parent)
                    depths.append(depth)
                    ranks.append(rank)
            level = next_level
        return cls(tuple(parents), tuple(depths), tuple(ranks))

    @property
    def num_nodes(self) -> int:
        """T."""
        return len(self.parents)

    @property
    def num_drafts(self) -> int:
        """Heads that draft: the greatest depth."""
        return self.depths[-1]

    @property
    def width(self) -> int:
        """Candidates that are needed of a head."""
        return max(self.ranks) + 1

    @cached_property
    def is_chain(self) -> bool:
        """Whether no head has alternatives."""
        return all(child == parent + 1 for parent, child in pairwise(self.depths))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of each node."""
        lists: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            lists[parent].append(node)
        return tuple(map(tuple, lists))

    def ancestors(self, device: torch.device) -> Tensor:
        """Return [T,T]: entry [i,j] tells whether j is i or one of its ancestors."""
        is_ancestor = torch.eye(self.num_nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                is_ancestor[node] |= is_ancestor[parent]
        return is_ancestor.to(device)
