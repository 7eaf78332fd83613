"""Listening in on the wrapped model's last decoder layer: what it is called with, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.outputs import LayerArguments, TrunkOutput


def split_call(positional: tuple[Any, ...], keyword: dict[str, Any], input_ids_BS: Tensor) -> TrunkOutput:
    """Tell the hidden states a decoder layer is called with from its other arguments."""
    if positional:
        return TrunkOutput(positional[0], LayerArguments(positional[1:], keyword), input_ids_BS)
    others = {name: value for name, value in keyword.items() if name != "hidden_states"}
    return TrunkOutput(keyword["hidden_states"], LayerArguments((), others), input_ids_BS)


class LastLayerRecorder(nn.Module):
    """Stands in for the last decoder layer and notes what it was called with.

    Attributes:
        input_ids_BS: the tokens of the forward at hand.
    """

    def __init__(self, input_ids_BS: Tensor) -> None:
        super().__init__()
        self.input_ids_BS = input_ids_BS
        self._recorded: TrunkOutput | None = None

    def forward(self, *positional: Any, **keyword: Any) -> Tensor:
        """Note the arguments and pass the hidden states through."""
        self._recorded = split_call(positional, keyword, self.input_ids_BS)
        # What the wrapped model makes of it (its final norm) is not used.
        return self._recorded.trunk_BSD

    @property
    def recorded(self) -> TrunkOutput:
        """The last call."""
        if self._recorded is None:
            raise ModelLoadError("the wrapped model did not run its last decoder layer")
        return self._recorded


class LastLayerTap:
    """Listens to the last decoder layer while it does its own work.

    Attributes:
        input_ids_BS: the tokens of the forward at hand, set by who runs it.
        answers_in_tuple: whether the layer answers more than hidden states.
    """

    def __init__(self) -> None:
        self._trunk: TrunkOutput | None = None
        self._state_BSD: Tensor | None = None
        self.input_ids_BS = torch.empty(0)
        self.answers_in_tuple = False

    @property
    def trunk(self) -> TrunkOutput:
        """What the layer was last called with."""
        if self._trunk is None:
            raise ModelLoadError("the wrapped model did not run its last decoder layer")
        return self._trunk

    @property
    def state_BSD(self) -> Tensor:
        """What it answered, before the final norm."""
        if self._state_BSD is None:
            raise ModelLoadError("the wrapped model did not run its last decoder layer")
        return self._state_BSD

    @contextmanager
    def listening(self, layer: nn.Module) -> Iterator[None]:
        """Listen to a layer inside the block."""
        before = layer.register_forward_pre_hook(self._note_call, with_kwargs=True)
        after = layer.register_forward_hook(self._note_answer)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self._trunk = self._state_BSD = None

    def _note_call(self, module: nn.Module, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
        self._trunk = split_call(positional, keyword, self.input_ids_BS)

    def _note_answer(self, module: nn.Module, positional: tuple[Any, ...], answer: Any) -> None:
        self.answers_in_tuple = isinstance(answer, tuple)
        self._state_BSD = answer[0] if self.answers_in_tuple else answer
