"""A key-value cache that is written in blocks at free columns and rolled back for nothing.

Column c of a row holds the keys and values of its token c, in every layer alike, so there is one length a row
for the trunk and all heads. A block of tokens that turns out wrong is rolled back by not counting it: the
next block is written over it, and until then the mask hides it. Rows of one batch have lengths of their own
and need no padding on the left.

Shapes: B rows, T tokens of a block, K columns in use, C columns that fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class KeysWrittenError(Exception):
    """Ends a layer's forward once its keys and values are in the cache; see `BlockCache.view`."""


class BlockCache(Cache):
    """Keys and values of all layers and heads, [B, heads, C, head size] each.

    Args:
        num_layers: layers of the model and of its heads; head h > 0 owns index L-1+h, as a copied layer's own
            index is that of head 0.
        capacity: tokens a row can hold, C.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._start: int | Tensor = 0
        self._num_columns = 0

    def place_block(self, start: int | Tensor, num_columns: int) -> None:
        """Say where the next block goes, in every layer.

        Args:
            start: its first column, one number for all rows or, where they differ, [B].
            num_columns: columns that attention is given, K: at least the end of the longest row's block.
        """
        self._start = start
        self._num_columns = num_columns

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a block [B, heads, T, head size] and return all keys and values, K columns."""
        buffers = self._buffers[layer_idx]
        if buffers is None:
            buffers = self._allocate(key_states), self._allocate(value_states)
            self._buffers[layer_idx] = buffers
        keys, values = buffers
        self._write(keys, key_states)
        self._write(values, value_states)
        if self._num_columns == key_states.shape[2]:
            # The first block attends to itself alone.
            return key_states, value_states
        return keys[:, :, : self._num_columns], values[:, :, : self._num_columns]

    def view(self, index: int, *, keys_only: bool = False) -> Cache:
        """Return this cache as a single layer sees it that must use `index` whatever it thinks its index is.

        Args:
            index: of the layer's buffers.
            keys_only: end the layer's forward (`KeysWrittenError`) when its keys and values are written: all
                that a position contributes which nobody asks for a prediction.
        """
        return _LayerView(self, index, keys_only=keys_only)

    def move(self, sources_BN: Tensor, targets_BN: Tensor) -> None:
        """Copy columns to other columns, in all layers."""
        rows_B1 = torch.arange(sources_BN.shape[0], device=sources_BN.device)[:, None]
        for buffers in self._buffers:
            for buffer in buffers or ():
                buffer[rows_B1, :, targets_BN] = buffer[rows_B1, :, sources_BN]

    def keep_rows(self, kept_B: Tensor) -> None:
        """Drop all rows but those at the given positions."""
        self._buffers = [
            None if buffers is None else (buffers[0][kept_B], buffers[1][kept_B]) for buffers in self._buffers
        ]

    def _allocate(self, states: Tensor) -> Tensor:
        shape = (*states.shape[:2], self.capacity, states.shape[3])
        if len(states) == 1:
            # A single row has written every column in use.
            return states.new_empty(shape)
        # Columns that a shorter row has not written yet are masked, and still take part as 0 * value: not
        # with whatever was in memory, as 0 * nan is nan.
        return states.new_zeros(shape)

    def _write(self, buffer: Tensor, states: Tensor) -> None:
        num_tokens = states.shape[2]
        if isinstance(self._start, int):
            buffer[:, :, self._start : self._start + num_tokens] = states
            return
        rows_B1 = torch.arange(states.shape[0], device=states.device)[:, None]
        columns_BT = self._start[:, None] + torch.arange(num_tokens, device=states.device)
        buffer[rows_B1, :, columns_BT] = states.transpose(1, 2)

    # What models ask a cache when they make the mask of the first block themselves.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the first block; later ones bring their positions."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of a block's first query, for the first block."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys and offset, for the first block."""
        return query_length, 0

    @property
    def is_sliding(self) -> list[bool]:
        """No layer forgets: windows are cut by the mask."""
        return [False] * len(self._buffers)

    @property
    def is_linear(self) -> list[bool]:
        """No layer is recurrent."""
        return [False] * len(self._buffers)

    @property
    def is_dummy(self) -> list[bool]:
        """Every layer has keys of its own."""
        return [False] * len(self._buffers)

    @property
    def is_compileable(self) -> bool:
        """Shapes grow with the text."""
        return False


class _LayerView(BlockCache):
    """A block cache that reads and writes one layer of another."""

    def __init__(self, cache: BlockCache, index: int, *, keys_only: bool) -> None:
        Cache.__init__(self, layers=[])
        self._cache = cache
        self._index = index
        self._keys_only = keys_only

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write and read the layer that this view is of."""
        result = self._cache.update(key_states, value_states, self._index)
        if self._keys_only:
            raise KeysWrittenError
        return result
