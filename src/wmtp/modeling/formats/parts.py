"""What a reader of any kind of checkpoint hands on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from wmtp.modeling.heads import SavedHeads


@dataclass(frozen=True, slots=True)
class LoadedParts:
    """What was read from a checkpoint of any kind.

    Attributes:
        causal_lm: the next-token model.
        heads: the heads the checkpoint has.
        head_tensors: gives the state dict of head h, 1..H-1, when it is asked for.
        head_source: file that messages about the heads name.
    """

    causal_lm: PreTrainedModel
    heads: SavedHeads
    head_tensors: Callable[[int], Mapping[str, Tensor]]
    head_source: str
