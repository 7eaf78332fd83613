"""`unified-model-loader`: one way in for every kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wmtp.components.base import Component
from wmtp.components.loader.builtin import MICRO_LLAMA, build_micro_llama
from wmtp.components.loader.sources import open_source
from wmtp.components.loader.step_stores import find_checkpoint
from wmtp.components.loader.training_state import read_training_state
from wmtp.components.registry import loader_registry
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.kinds import ModelKind, detect_causal_lm
from wmtp.modeling.formats.load import assemble, read_parts
from wmtp.modeling.formats.parts import LoadedParts
from wmtp.modeling.formats.sources import ModelSource
from wmtp.modeling.heads import Adapter, HeadForm, HeadRequest
from wmtp.modeling.state_dict import set_precision
from wmtp.settings import Config


@dataclass(frozen=True, slots=True)
class ModelLoaderContext:
    """What to load.

    Attributes:
        model_path: a directory, a hub id, an `s3://` folder, or a built-in name.
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
    """A model and what is known of it.

    Attributes:
        model: the model.
        metadata: `training_algorithm` ("mtp"), `horizon` and `offsets`, which a collator must know; and
            `kind`, a `ModelKind` or "builtin".
    """

    model: MTPModel
    metadata: dict[str, Any]


@loader_registry.register(
    "unified-model-loader", version="1.0.0", description="language models of every kind"
)
class UnifiedModelLoader(Component[ModelLoaderContext, LoadedModel]):
    """Loads every kind of causal language model, told by its files, and the built-in ones.

    A `step-N` folder, or a run folder (its export, else its newest valid step), needs nothing besides.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, context: ModelLoaderContext) -> LoadedModel:
        """Load the model.

        Raises:
            ModelLoadError: nothing that can be loaded is there, or a reward model.
            CheckpointError: training checkpoints, none of which is whole.
            UserInputError: heads that cannot be had from this model.
        """
        request = HeadRequest(
            horizon=context.horizon, head=context.head, adapter=context.adapter, offsets=context.offsets
        )
        kind: str
        if context.model_path == MICRO_LLAMA:
            model = MTPModel.from_causal_lm(
                build_micro_llama(),
                horizon=context.horizon or 1,
                head=context.head or "transformer",
                adapter=context.adapter,
                offsets=context.offsets,
            )
            set_precision(model, context.dtype)
            kind = "builtin"
        else:
            source = open_source(self.config, context.model_path)
            kind = detect_causal_lm(source)
            model = assemble(MTPModel, self._read(source, kind, context), request, str(source))
        metadata = {
            "training_algorithm": "mtp",
            "horizon": model.horizon,
            "offsets": list(model.offsets),
            "kind": str(kind),
        }
        return LoadedModel(model, metadata)

    def _read(self, source: ModelSource, kind: ModelKind, context: ModelLoaderContext) -> LoadedParts:
        if kind is ModelKind.WMTP_CHECKPOINT:
            return read_training_state(find_checkpoint(self.config, str(source)), dtype=context.dtype)
        return read_parts(source, kind, dtype=context.dtype, trust_remote_code=context.trust_remote_code)
