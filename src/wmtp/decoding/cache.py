"""A key-value cache with room for the whole generation.

`transformers`' own dynamic layers concatenate at every step, which copies all keys and values of all layers
for each new token; its static ones attend to the unused room as well. Here keys and values are views of a
buffer of known size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


def build_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """Return an empty cache for a model.

    Args:
        config: of the model; says which layers attend to everything. The others (sliding windows, recurrent
            states) keep the library's own kind.
        capacity: tokens a row can hold, prompt and padding included.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # the library's hook is untyped
    """One layer's keys and values, [B, heads, tokens so far, head size], as views of buffers.

    Args:
        capacity: tokens that fit.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the library's is untyped
        self._capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers at the first update, when shapes, dtype and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate(key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens and return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows at `indices`."""
        if self.is_initialized:
            length = self.get_seq_length()
            self._allocate(self._key_buffer[indices, :, :length], self._value_buffer[indices, :, :length])

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        """Make buffers that begin with the given keys and values."""
        length = keys.shape[2]
        self._key_buffer = keys.new_empty(*keys.shape[:2], self._capacity, keys.shape[3])
        self._value_buffer = values.new_empty(*values.shape[:2], self._capacity, values.shape[3])
        self._key_buffer[:, :, :length] = keys
        self._value_buffer[:, :, :length] = values
        self.keys, self.values = self._key_buffer[:, :, :length], self._value_buffer[:, :, :length]
