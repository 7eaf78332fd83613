"""`unified-model-loader`: one way in for every kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wmtp.components.base import Component
from wmtp.components.loader.builtin import MICRO_LLAMA, build_micro_llama
from wmtp.components.registry import loader_registry
from wmtp.exceptions import ModelLoadError
from wmtp.modeling import MTPModel
from wmtp.modeling.heads import Adapter, HeadForm
from wmtp.settings import Config
from wmtp.storage import PathResolver


@dataclass(frozen=True, slots=True)
class ModelLoaderContext:
    """What to load.

    Attributes:
        model_path: a directory, a hub id, or a built-in name.
        horizon: number of heads; None takes what the checkpoint has.
        head: form of the heads; None takes the checkpoint's.
        adapter: how a model with too few heads gets more.
        offsets: how far ahead each head predicts; None takes the checkpoint's, or 1..horizon.
        dtype: of the parameters.
        trust_remote_code: run code that comes with the model; only ever from the command line.
    """

    model_path: str
    horizon: int | None = None
    head: HeadForm | None = None
    adapter: Adapter = "heads"
    offsets: Sequence[int] | None = None
    dtype: torch.dtype = torch.float32
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and what a collator must know of it: `{"training_algorithm": "mtp", "horizon": H}`."""

    model: MTPModel
    metadata: dict[str, Any]


@loader_registry.register("unified-model-loader", version="1.0.0", description="Hugging Face and WMTP models")
class UnifiedModelLoader(Component[ModelLoaderContext, LoadedModel]):
    """Loads Hugging Face directories and hub ids, exports of this tool, and the built-in models."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, context: ModelLoaderContext) -> LoadedModel:
        """Load the model.

        Raises:
            ModelLoadError: nothing that can be loaded is there.
        """
        kind, path = PathResolver().resolve(context.model_path)
        if path == MICRO_LLAMA:
            model = MTPModel.from_causal_lm(
                build_micro_llama(),
                horizon=context.horizon or 1,
                head=context.head or "transformer",
                adapter=context.adapter,
                offsets=context.offsets,
            )
            model.to(context.dtype)
        elif kind in ("local", "hub"):
            model = MTPModel.from_pretrained(
                path,
                horizon=context.horizon,
                head=context.head,
                adapter=context.adapter,
                offsets=context.offsets,
                dtype=context.dtype,
                trust_remote_code=context.trust_remote_code,
            )
        else:
            raise ModelLoadError(
                f"models cannot be loaded from {context.model_path}",
                remedy=f"give a directory, a hub id, or {MICRO_LLAMA}",
            )
        return LoadedModel(
            model, {"training_algorithm": "mtp", "horizon": model.horizon, "offsets": list(model.offsets)}
        )
