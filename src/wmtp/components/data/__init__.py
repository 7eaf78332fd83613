"""Datasets of many forms to batches of token ids: reading, recognising, packing, batching, collating."""

from __future__ import annotations

from wmtp.components.data.batching import BatchPlan, MicroBatches, TrainingData, evaluation_batches, to_device
from wmtp.components.data.collators import CollatorSettings, LMDataCollator, MTPDataCollator
from wmtp.components.data.examples import Batch, Bin, Example, Feature, Weight
from wmtp.components.data.packing import PackingSummary, pack_lengths, summarise_packing
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
    "CollatorSettings",
    "DataLoaderContext",
    "DataLoaderSettings",
    "Example",
    "Feature",
    "LMDataCollator",
    "MTPDataCollator",
    "MicroBatches",
    "MicroCodeOptions",
    "PackingSummary",
    "TrainingData",
    "UnifiedDataLoader",
    "Weight",
    "evaluation_batches",
    "pack_lengths",
    "summarise_packing",
    "to_device",
]
