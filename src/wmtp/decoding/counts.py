"""What a generation cost, what its drafts were worth, and which tokens are worth drafting."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain


@dataclass(slots=True)
class GenerationCounts:
    """How many forwards a generation took, and how often the heads' drafts were right.

    Attributes:
        num_forwards: forwards of the model; rows that run together share one.
        accepted_per_head: entry 0: forwards that rows took part in, in each of which head 0 gave a row one
            token; entry h: how many of them gave an (h+1)-th token, because the drafts of heads 1..h stood.
            The sum is the number of new tokens.
    """

    num_forwards: int = 0
    accepted_per_head: list[int] = field(default_factory=list)

    def add(self, num_tokens: int) -> None:
        """Count what a forward gave a row."""
        for head in range(num_tokens):
            if head == len(self.accepted_per_head):
                self.accepted_per_head.append(0)
            self.accepted_per_head[head] += 1

    @property
    def num_tokens(self) -> int:
        """New tokens, of all rows together."""
        return sum(self.accepted_per_head)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens that a forward gives a row, on average; nan where nothing was generated."""
        return self.num_tokens / self.accepted_per_head[0] if self.num_tokens else math.nan

    @property
    def acceptance(self) -> list[float]:
        """Entry h: share of a row's forwards in which the drafts of heads 1..h all stood; entry 0 is 1."""
        return [count / self.accepted_per_head[0] for count in self.accepted_per_head]


def frequent_tokens(texts: Iterable[Iterable[int]], limit: int | None = None) -> list[int]:
    """Return the tokens of some texts, the most frequent first: for `Speculation.token_ids`.

    Args:
        texts: token ids of text like what is to be written.
        limit: return so many at most; None returns every token that occurs.
    """
    return [token_id for token_id, _ in Counter(chain.from_iterable(texts)).most_common(limit)]
