"""What the MTP model returns.

Shapes: B batch, S sequence, H heads, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LayerArguments:
    """Everything the wrapped model passes to its last decoder layer besides the hidden states.

    Attention mask, positions and rotary tables are made once by the wrapped model, so a head that runs on the
    same arguments sees the same documents at the same positions as head 0, whatever the model family.
    """

    positional: tuple[Any, ...]
    keyword: Mapping[str, Any]

    def run_layer(self, layer: nn.Module, hidden_BSD: Tensor) -> Tensor:
        """Run a decoder layer on hidden states [B,S,D] with these arguments; returns [B,S,D]."""
        output = layer(hidden_BSD, *self.positional, **self.keyword)
        # Some families return their attention weights or router logits beside the hidden states.
        result_BSD: Tensor = output[0] if isinstance(output, tuple) else output
        return result_BSD

    def with_cache(self, cache: object, other: object) -> LayerArguments:
        """Return the same arguments with one cache in the place of another, whatever its name is."""
        return LayerArguments(
            tuple(other if value is cache else value for value in self.positional),
            {name: other if value is cache else value for name, value in self.keyword.items()},
        )


@dataclass(frozen=True, slots=True)
class TrunkOutput:
    """What all heads start from.

    Attributes:
        trunk_BSD: hidden states in front of the last decoder layer.
        layer_arguments: what that layer is called with besides.
        input_ids_BS: the tokens; heads of the form `sequential` embed those that come next.
    """

    trunk_BSD: Tensor
    layer_arguments: LayerArguments
    input_ids_BS: Tensor

    def detach(self) -> TrunkOutput:
        """Return the same values cut from the graph, so that no gradient reaches the trunk."""
        return replace(self, trunk_BSD=self.trunk_BSD.detach())


@dataclass(frozen=True, slots=True)
class MTPOutput:
    """Hidden states of all heads.

    Attributes:
        hidden_BSHD: after the final norm; entry [:, t, h] predicts token t + offsets[h], by default t+h+1.
        trunk: what every head started from.
        unembed: maps hidden states [..., D] to logits [..., V], with bias, scaling and soft-capping.
    """

    hidden_BSHD: Tensor
    trunk: TrunkOutput
    unembed: Callable[[Tensor], Tensor]

    @property
    def trunk_BSD(self) -> Tensor:
        """Hidden states in front of the last decoder layer."""
        return self.trunk.trunk_BSD

    def logits(self) -> Tensor:
        """Return the logits of all heads, [B,S,H,V].

        Large: for tests and analysis. Training and scoring use the chunked losses of `wmtp.objectives`.
        """
        # One call a head on contiguous input: the very call of the wrapped model, hence its bits.
        heads = self.hidden_BSHD.unbind(dim=2)
        return torch.stack([self.unembed(hidden_BSD.contiguous()) for hidden_BSD in heads], dim=2)

    def detach(self) -> MTPOutput:
        """Return the same values cut from the graph."""
        return replace(self, hidden_BSHD=self.hidden_BSHD.detach(), trunk=self.trunk.detach())
