"""What the MTP model returns.

Shapes: B batch, S sequence, H heads, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerArguments:
    """Everything the wrapped model passes to its last decoder layer besides the hidden states.

    Attention mask, positions and rotary tables are made once by the wrapped model, so a head that runs on the
    same arguments sees the same documents at the same positions as head 0, whatever the model family.
    """

    positional: tuple[Any, ...]
    keyword: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TrunkOutput:
    """Hidden states in front of the last decoder layer, [B,S,D], and the arguments of that layer."""

    trunk_BSD: Tensor
    layer_arguments: LayerArguments

    def detach(self) -> TrunkOutput:
        """Return the same values cut from the graph, so that no gradient reaches the trunk."""
        return replace(self, trunk_BSD=self.trunk_BSD.detach())


@dataclass(frozen=True, slots=True)
class MTPOutput:
    """Hidden states of all heads.

    Attributes:
        hidden_BSHD: after the final norm; entry [:, t, h] predicts token t+h+1.
        trunk_BSD: what every head read.
        layer_arguments: what every head was called with.
        unembed: maps hidden states [..., D] to logits [..., V], with bias, scaling and soft-capping.
    """

    hidden_BSHD: Tensor
    trunk_BSD: Tensor
    layer_arguments: LayerArguments
    unembed: Callable[[Tensor], Tensor]

    @property
    def trunk(self) -> TrunkOutput:
        """The trunk alone, as `MTPModel.run_head` takes it."""
        return TrunkOutput(self.trunk_BSD, self.layer_arguments)

    def logits(self) -> Tensor:
        """Return the logits of all heads, [B,S,H,V].

        Large: for tests and analysis. Training and scoring use the chunked losses of `wmtp.objectives`.
        """
        # One call a head on contiguous input: the very call of the wrapped model, hence its bits.
        heads = self.hidden_BSHD.unbind(dim=2)
        return torch.stack([self.unembed(hidden_BSD.contiguous()) for hidden_BSD in heads], dim=2)

    def detach(self) -> MTPOutput:
        """Return the same values cut from the graph."""
        return replace(self, hidden_BSHD=self.hidden_BSHD.detach(), trunk_BSD=self.trunk_BSD.detach())
