"""Datasets of many forms to batches of token ids: reading, recognising, packing, batching, collating."""

from __future__ import annotations

from wmtp.components.data.batching import BatchPlan, MicroBatches, TrainingData, evaluation_batches, to_device
from wmtp.components.data.collators import CollatorSettings, LMDataCollator, MTPDataCollator
from wmtp.components.data.examples import Batch, Bin, Example, Feature, Weight
from wmtp.components.data.packing import PackingSummary, pack_lengths, summarise_packing
from wmtp.components.data.streaming import StreamingData
from wmtp.components.data.streaming_blocks import ChunkTokenizer, StreamSettings
from wmtp.components.data.streaming_sources import (
    ExampleSource,
    StreamPosition,
    hold_out,
    open_source,
    read_epoch,
)
from wmtp.components.data.unified_loader import (
    HUMANEVAL_SOURCE,
    MICROCODE_SOURCE,
    DataLoaderContext,
    DataLoaderSettings,
    MicroCodeOptions,
    UnifiedDataLoader,
)

__all__ = [
    "HUMANEVAL_SOURCE",
    "MICROCODE_SOURCE",
    "Batch",
    "BatchPlan",
    "Bin",
    "ChunkTokenizer",
    "CollatorSettings",
    "DataLoaderContext",
    "DataLoaderSettings",
    "Example",
    "ExampleSource",
    "Feature",
    "LMDataCollator",
    "MTPDataCollator",
    "MicroBatches",
    "MicroCodeOptions",
    "PackingSummary",
    "StreamPosition",
    "StreamSettings",
    "StreamingData",
    "TrainingData",
    "UnifiedDataLoader",
    "Weight",
    "evaluation_batches",
    "hold_out",
    "open_source",
    "pack_lengths",
    "read_epoch",
    "summarise_packing",
    "to_device",
]
