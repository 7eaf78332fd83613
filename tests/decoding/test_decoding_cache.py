"""The preallocated cache holds what the library's growing one holds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from wmtp.decoding.cache import PreallocatedLayer, build_cache

CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)
# (new tokens, rows to keep, tokens to roll back)
STEPS = [(7, None, 0), (1, [4, 0, 2], 0), (3, None, 2), (1, [1], 1), (4, None, 0)]


def test_it_equals_the_growing_cache_through_updates_row_selection_and_roll_back() -> None:
    ours, theirs = build_cache(CONFIG, 20), DynamicCache(config=CONFIG)
    num_rows = 5
    for num_new, kept, num_dropped in STEPS:
        for layer in range(2):
            keys, values = torch.randn(2, num_rows, 2, num_new, 4).unbind()
            mine, other = ours.update(keys, values, layer), theirs.update(keys, values, layer)
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])
        for cache in (ours, theirs):
            cache.crop(-num_dropped)
            if kept is not None:
                cache.batch_select_indices(torch.tensor(kept))
        num_rows = num_rows if kept is None else len(kept)
        assert ours.get_seq_length() == theirs.get_seq_length()
        for mine_layer, other_layer in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(mine_layer.keys, other_layer.keys)
            assert torch.equal(mine_layer.values, other_layer.values)


def test_appending_copies_nothing_that_is_there() -> None:
    cache = build_cache(CONFIG, 6)
    keys = torch.randn(1, 2, 3, 4)
    first, _ = cache.update(keys, keys, 0)
    second, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    assert first.data_ptr() == second.data_ptr()


def test_more_tokens_than_the_capacity_are_an_error() -> None:
    cache = build_cache(CONFIG, 4)
    keys = torch.randn(1, 2, 3, 4)
    cache.update(keys, keys, 0)
    with pytest.raises(RuntimeError):
        cache.update(keys, keys, 0)


def test_sliding_windows_keep_the_librarys_layer() -> None:
    sliding = build_cache(MistralConfig(num_hidden_layers=2, sliding_window=8), 100)
    assert {type(layer) for layer in sliding.layers} == {DynamicSlidingWindowLayer}
    assert {type(layer) for layer in build_cache(CONFIG, 100).layers} == {PreallocatedLayer}
