"""State dicts in which every parameter stands once.

A tied unembedding is the embedding under a second name. Checkpoint files refuse tensors that share memory,
and a second copy would be a way for the two to come apart, so the second name is left out and put back on
loading.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def tied_names(module: nn.Module) -> dict[str, str]:
    """Return {second name: first name} of parameters that occur under several names."""
    first_name: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        kept = first_name.setdefault(id(parameter), name)
        if kept != name:
            tied[name] = kept
    return tied


def drop_tied_copies(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State dict post-hook: remove second names."""
    for name in tied_names(module):
        state_dict.pop(prefix + name, None)


def restore_tied_copies(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load state dict pre-hook: fill second names that the file leaves out, so that strict loading stays
    strict."""
    for name, kept in tied_names(module).items():
        if prefix + kept in state_dict:
            state_dict.setdefault(prefix + name, state_dict[prefix + kept])


def floating_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, and buffers that are saved, which hold floating-point numbers; each once, by name."""
    saved = module.state_dict()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    tensors = {**dict(module.named_parameters()), **buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def set_precision(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert `floating_tensors` in place.

    Buffers that are made anew on loading stay, unlike with `module.to(dtype)`: rotary frequencies in 16 bits
    would put the tokens of a long text at wrong positions.
    """
    for tensor in floating_tensors(module).values():
        tensor.data = tensor.data.to(dtype)
