"""What generation needs of a model, and self-speculation of one with heads.

Shapes: B rows, T tokens of a block, P prompt, M heads that draft at once, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wmtp.decoding.tree import DraftTree


class DecoderProtocol(Protocol):
    """What generation needs of a model; any Hugging Face decoder-only causal language model has it."""

    config: Any

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Return all submodules and the model itself."""
        ...

    def eval(self) -> Any:
        """Switch dropout off."""
        ...

    def __call__(self, **inputs: Any) -> Any:
        """Return an object with `logits`, given the usual keyword inputs."""
        ...


# Hidden states [B,M,D] of the next M heads, after the final norm -> their drafts [B,M]. Heads that draft from
# one another's drafts ask for one at a time.
ChooseDrafts = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class DraftPoint:
    """Where a batch stands after a block: the only place that it drafts from.

    Attributes:
        start: column of the block's first token: one for all rows, or [B].
        paths: nodes of the block that stand, of each row. Once accepted, they are in the columns from
            `start` on.
        num_columns: columns up to the last accepted token of the longest row.
        next_token_B: the token after it, which head 0 has chosen.
        is_chain: whether nodes follow one another already.
    """

    start: int | Tensor
    paths: Sequence[Sequence[int]]
    num_columns: int
    next_token_B: Tensor
    is_chain: bool


class Drafter(Protocol):
    """A model with heads at work on one batch, with one cache for the trunk and every head."""

    def write_prefix(self, input_ids_BP: Tensor) -> None:
        """Store keys and values of the tokens at columns 0..P-1, without predictions."""
        ...

    def run_prompt(self, input_ids_BP: Tensor) -> Tensor:
        """Run the tokens at columns 0..P-1 as the first block; returns what `run_block` does."""
        ...

    def run_block(
        self, input_ids_BT: Tensor, positions_BT: Tensor, start: int | Tensor, num_columns: int
    ) -> Tensor:
        """Run a block whose first token belongs at column `start`.

        Args:
            input_ids_BT: a single token, or the nodes of the tree.
            positions_BT: of the tokens in the text.
            start: one column for all rows, or [B].
            num_columns: end of the block in the longest row.

        Returns:
            Head 0's hidden states after the final norm, [B,T,D].
        """
        ...

    def draft(self, point: DraftPoint, choose: ChooseDrafts) -> None:
        """Run the other heads on the block just run, and give their states at `point` to `choose`.

        Afterwards the columns behind `point.start` hold what was accepted, in its order.
        """
        ...

    def keep_rows(self, kept_B: Tensor) -> None:
        """Drop all rows but those at the given positions."""
        ...


class DraftingSession(Protocol):
    """A model whose heads are ready to draft."""

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        ...

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    def build_drafter(self, batch_size: int, capacity: int, tree: DraftTree) -> Drafter:
        """Return a drafter for a batch with room for `capacity` columns a row."""
        ...

    def check_tree(self, tree: DraftTree) -> None:
        """Raise `UserInputError` where the heads cannot draft such a tree."""
        ...

    def unembed(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., D] after the final norm to logits [..., V]."""
        ...

    def partial_unembedding(self, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a map of hidden states [..., D] to the logits of these tokens alone."""
        ...


class DraftingModel(Protocol):
    """A causal language model whose heads guess the tokens after the next."""

    @property
    def horizon(self) -> int:
        """Number of heads, the one for the next token included."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Return all submodules and the model itself."""
        ...

    def eval(self) -> Any:
        """Switch dropout off."""
        ...

    def decoding_session(self) -> AbstractContextManager[DraftingSession]:
        """Make the heads ready to draft inside the block.

        Raises:
            UserInputError: they cannot.
        """
        ...
