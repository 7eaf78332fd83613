"""Loaders of models and checkpoints."""

from wmtp.components.loader.builtin import MICRO_BASE, MICRO_LLAMA, MICRO_REFERENCE
from wmtp.components.loader.checkpoint_loader import CheckpointLoader, LoadedCheckpoint
from wmtp.components.loader.reward_model_loader import RewardLoaderContext, RewardModelLoader
from wmtp.components.loader.unified_model_loader import LoadedModel, ModelLoaderContext, UnifiedModelLoader

__all__ = [
    "MICRO_BASE",
    "MICRO_LLAMA",
    "MICRO_REFERENCE",
    "CheckpointLoader",
    "LoadedCheckpoint",
    "LoadedModel",
    "ModelLoaderContext",
    "RewardLoaderContext",
    "RewardModelLoader",
    "UnifiedModelLoader",
]
