"""The models of a run from their configuration files alone: on the meta device, shapes without weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import sentencepiece
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from wmtp.components.loader import MICRO_BASE, MICRO_LLAMA, MICRO_REFERENCE
from wmtp.components.loader.builtin import build_micro_llama
from wmtp.components.loader.sources import open_source
from wmtp.components.loader.step_stores import find_checkpoint
from wmtp.components.loader.training_state import describe_training_state
from wmtp.exceptions import ModelLoadError
from wmtp.modeling import MTPModel, choose_trainable
from wmtp.modeling.formats.configuration import build_config, context_length, read_config
from wmtp.modeling.formats.export import read_saved_heads
from wmtp.modeling.formats.kinds import (
    PARAMS_FILE,
    ModelKind,
    detect_causal_lm,
    detect_described_kind,
    detect_reward_model,
    lone_torch_file,
)
from wmtp.modeling.formats.meta_native import native_config
from wmtp.modeling.formats.reward import derive_llama_config
from wmtp.modeling.formats.sources import (
    CONFIG_FILE,
    TORCH_SUFFIXES,
    LocalSource,
    ModelSource,
    read_source_json,
)
from wmtp.modeling.formats.tensors import INDEX_FILES, SINGLE_FILES, open_tensors
from wmtp.modeling.heads import HeadRequest, SavedHeads, plan_heads
from wmtp.modeling.lora import add_lora
from wmtp.settings import Config, Recipe
from wmtp.settings.recipe_model import ModelSettings

BUILTIN = (MICRO_LLAMA, MICRO_BASE, MICRO_REFERENCE)
_TOKENIZER_FILE = "tokenizer.model"


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a model's files say of it before any weight is read.

    Attributes:
        name: what the user calls it.
        kind: its kind; None for a built-in model.
        config: its configuration.
        heads: the heads of the checkpoint.
        note: what was assumed, for people; empty where nothing was.
    """

    name: str
    kind: ModelKind | None
    config: PreTrainedConfig
    heads: SavedHeads
    note: str = ""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.config.get_text_config(decoder=True).vocab_size)

    @property
    def context_length(self) -> int | None:
        """Most positions the model was made for; None where its configuration does not say."""
        return context_length(self.config)

    def describe(self) -> str:
        """One line for people."""
        config = self.config.get_text_config(decoder=True)
        num_heads = len(self.heads.offsets)
        heads = f", {num_heads} heads ({self.heads.form})" if num_heads > 1 else ""
        # Layers of the next-token model: the blocks of further heads are counted as heads.
        sizes = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}"
        sizes += f", vocabulary {self.vocab_size}"
        title = "a built-in model" if self.kind is None else self.kind.description
        return f"{title}: {sizes}{heads}{self.note and f' ({self.note})'}"


def describe_causal_lm(config: Config, path: str, *, trust_remote_code: bool) -> ModelDescription:
    """Read what describes a causal language model: a directory, a hub id or a built-in name.

    Raises:
        ModelLoadError: no description is there, it cannot be had, or it is that of a reward model.
    """
    if path in BUILTIN:
        with torch.device("meta"):
            return ModelDescription(path, None, build_micro_llama().config, SavedHeads())
    source = open_source(config, path)
    kind = detect_causal_lm(source) if _has_weights_here(source) else detect_described_kind(source)
    if kind is ModelKind.META_NATIVE:
        params = read_source_json(source, PARAMS_FILE)
        # Asked for alone where the file leaves it open, because that needs the tokenizer.
        vocab_size = _vocab_size(source) if params.get("vocab_size") == -1 else None
        llama, num_heads = native_config(params, vocab_size=vocab_size, source=f"{source}/{PARAMS_FILE}")
        return ModelDescription(path, kind, llama, SavedHeads("transformer", tuple(range(1, num_heads + 1))))
    if kind is ModelKind.WMTP_CHECKPOINT:
        heads, content, file = describe_training_state(find_checkpoint(config, str(source)))
        return ModelDescription(path, kind, build_config(content, file), heads)
    if kind is ModelKind.SEQUENCE_CLASSIFICATION:
        raise ModelLoadError(
            f"{source} is {kind.description}, not a causal language model",
            remedy="give a language model here; reward models go to model.rm_id or paths.models.rm",
        )
    model_config = read_config(source, trust_remote_code=trust_remote_code)
    return ModelDescription(path, kind, model_config, read_saved_heads(source))


def describe_reward_model(config: Config, path: str, *, trust_remote_code: bool) -> ModelDescription:
    """Read what describes a reward model.

    Raises:
        ModelLoadError: no description is there, it cannot be had, or the model gives several numbers.
    """
    source = open_source(config, path)
    if CONFIG_FILE not in source.names() and any(name.endswith(TORCH_SUFFIXES) for name in source.names()):
        llama, note = _starling_config(source)
        return ModelDescription(path, ModelKind.STARLING_REWARD, llama, SavedHeads(), note)
    kind = detect_reward_model(source) if _has_weights_here(source) else detect_described_kind(source)
    model_config = read_config(source, trust_remote_code=trust_remote_code)
    if kind is not ModelKind.SEQUENCE_CLASSIFICATION:
        return ModelDescription(path, ModelKind.STARLING_REWARD, model_config, SavedHeads())
    if model_config.num_labels != 1:
        raise ModelLoadError(
            f"{source} is a classifier with {model_config.num_labels} labels, a reward model has one",
            remedy="choose a reward model (one entry in id2label of its config.json)",
        )
    return ModelDescription(path, kind, model_config, SavedHeads())


def build_base(description: ModelDescription, recipe: Recipe) -> tuple[MTPModel, list[str]]:
    """Build the model to train with its heads and adapters; parameters that learn require gradients.

    Returns:
        The model, and what a run would warn of.

    Raises:
        UserInputError: heads, adapters or what is to be trained do not fit the checkpoint.
        ModelLoadError: the architecture is not understood.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = _build_mtp_model(description, head_request(recipe.model))
    if recipe.model.lora is not None:
        add_lora(model, **recipe.model.lora.model_dump())
    choose_trainable(model, recipe.model.trainable, warmup_head_steps=recipe.model.warmup_head_steps)
    return model, [str(warning.message) for warning in caught]


def build_reference(description: ModelDescription) -> MTPModel:
    """Build a reference model: head 0 alone."""
    with warnings.catch_warnings():
        # That its further heads are not used is how references work.
        warnings.simplefilter("ignore", UserWarning)
        return _build_mtp_model(description, HeadRequest(horizon=1))


def build_reward_model(description: ModelDescription) -> nn.Module:
    """Build the decoder of a reward model and its head."""
    with torch.device("meta"):
        decoder: nn.Module = AutoModel.from_config(description.config)  # type: ignore[no-untyped-call]
        hidden_size = description.config.get_text_config(decoder=True).hidden_size
        return nn.ModuleList([decoder, nn.Linear(hidden_size, 1, bias=False)])


def head_request(settings: ModelSettings) -> HeadRequest:
    """The heads a recipe asks for."""
    mtp = settings.mtp
    return HeadRequest(horizon=mtp.horizon, head=mtp.head, adapter=mtp.adapter, offsets=mtp.offsets)


def _build_mtp_model(description: ModelDescription, request: HeadRequest) -> MTPModel:
    plan = plan_heads(request, description.heads, description.name)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(description.config)  # type: ignore[no-untyped-call]
        return MTPModel(causal_lm, form=plan.form, offsets=plan.offsets)


def _has_weights_here(source: ModelSource) -> bool:
    """Whether weights can be looked into; a reward model may be described as any other model is."""
    names = source.names()
    has_weights = not names.isdisjoint(SINGLE_FILES + INDEX_FILES) or lone_torch_file(names) is not None
    return has_weights and isinstance(source, LocalSource)


def _starling_config(source: ModelSource) -> tuple[LlamaConfig, str]:
    """The configuration of a reward model that was published without one, and what was assumed."""
    files = [name for name in source.names() if name.endswith(TORCH_SUFFIXES)]
    if not isinstance(source, LocalSource) or len(files) != 1:
        return LlamaConfig(), f"no {CONFIG_FILE}; taken for a Llama 2 7B until its tensors are read"
    decoder = {
        name.removeprefix("model.model.").removeprefix("transformer."): tensor
        for name, tensor in open_tensors(source, files[0]).stored().items()
    }
    return derive_llama_config(source, decoder), f"no {CONFIG_FILE}; sizes from the shapes of its tensors"


def _vocab_size(source: ModelSource) -> int:
    """Tokens of the tokenizer beside a native model or one folder up."""
    for folder in (source, source.parent()):
        if folder is not None and _TOKENIZER_FILE in folder.names():
            with folder.open(_TOKENIZER_FILE) as stream:
                processor = sentencepiece.SentencePieceProcessor(model_proto=stream.read())
            return int(processor.vocab_size())
    raise ModelLoadError(
        f"{source}/{PARAMS_FILE} leaves the vocabulary to the tokenizer (vocab_size -1), and there is no "
        f"{_TOKENIZER_FILE} beside it or one folder up",
        remedy=f"put {_TOKENIZER_FILE} there",
    )
