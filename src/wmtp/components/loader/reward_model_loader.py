"""`reward-model-loader`: models that score text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wmtp.components.base import Component
from wmtp.components.loader.sources import open_source
from wmtp.components.registry import loader_registry
from wmtp.modeling.reward_model import RewardModel, load_reward_model
from wmtp.settings import Config


@dataclass(frozen=True, slots=True)
class RewardLoaderContext:
    """What to load.

    Attributes:
        model_path: a directory, a file of one, a hub id, or an `s3://` folder.
        dtype: of the decoder's parameters.
        trust_remote_code: run code that comes with the model; only ever from the command line.
    """

    model_path: str
    dtype: torch.dtype = torch.float32
    trust_remote_code: bool = False


@loader_registry.register(
    "reward-model-loader", version="1.0.0", description="Starling-RM and sequence classifiers with one label"
)
class RewardModelLoader(Component[RewardLoaderContext, RewardModel]):
    """Loads a reward model of either layout, frozen."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, context: RewardLoaderContext) -> RewardModel:
        """Load the model.

        Raises:
            ModelLoadError: there is no reward model, or its reward head is missing or unusable.
        """
        source = open_source(self.config, context.model_path)
        return load_reward_model(source, dtype=context.dtype, trust_remote_code=context.trust_remote_code)
