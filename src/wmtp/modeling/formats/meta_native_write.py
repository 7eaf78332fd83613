"""The way back to Meta's layout; see `wmtp.modeling.formats.meta_native`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from wmtp.exceptions import UserInputError
from wmtp.modeling.formats.kinds import PARAMS_FILE
from wmtp.modeling.formats.meta_native import (
    DTYPE_ATTRIBUTE,
    DTYPES,
    LAYER_NAMES,
    MODEL_NAMES,
    PARAMS_ATTRIBUTE,
    WEIGHTS_FILE,
    NativeNames,
    feed_forward_size,
    native_config,
    to_interleaved,
)

if TYPE_CHECKING:
    from wmtp.modeling.mtp_model import MTPModel


def write_native(model: MTPModel, directory: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write `consolidated.pth` and `params.json`, which Meta's inference code reads.

    A model that came from this layout gets its own params.json back, field by field, save for what has been
    changed since (number of heads, vocabulary). Special tokens and the longest text have no place in the
    layout. Not atomic; publish the directory yourself.

    Args:
        model: a Llama with heads of the form `transformer` at offsets 1..H.
        directory: created where it is missing.
        dtype: of the file; None takes that of the checkpoint the model came from.

    Raises:
        UserInputError: the model has something that the layout cannot say; all of it is named.
    """
    config = _check_expressible(model)
    params = _params_for(config, model.horizon)
    tensors = _native_tensors(model, config, dtype or original_dtype(config))
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, directory / WEIGHTS_FILE)
    (directory / PARAMS_FILE).write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def _check_expressible(model: MTPModel) -> LlamaConfig:
    causal_lm, config = model.causal_lm, model.config
    if type(causal_lm) is not LlamaForCausalLM or not isinstance(config, LlamaConfig):
        raise UserInputError(
            f"{type(causal_lm).__name__} cannot be written in the native layout, which is Llama's",
            remedy="use the Hugging Face format (--format hf)",
        )
    rope = config.rope_parameters or {}
    has_other_heads = model.horizon > 1 and model.head_form != "transformer"
    found = {
        f"heads of the form {model.head_form!r}": has_other_heads,
        f"heads at offsets {list(model.offsets)}": model.offsets != tuple(range(1, model.horizon + 1)),
        f"rotary positions of type {rope.get('rope_type')!r}": rope.get("rope_type") != "default",
        "rotary positions on a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"attention heads of size {config.head_dim}": (
            config.head_dim != config.hidden_size // config.num_attention_heads
        ),
        "biases in attention layers": config.attention_bias,
        "biases in feed-forward layers": config.mlp_bias,
        f"the activation {config.hidden_act!r}": config.hidden_act != "silu",
    }
    problems = [name for name, is_there in found.items() if is_there]
    if problems:
        raise UserInputError(
            f"this model has {', '.join(problems)}, which the native layout cannot say",
            remedy="use the Hugging Face format (--format hf)",
        )
    if config.tie_word_embeddings:
        warnings.warn(
            "embedding and unembedding of this model are one tensor; the native layout has two, so both are "
            "written, and whoever trains them further trains them apart",
            stacklevel=3,
        )
    return config


def original_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype on disk of the native checkpoint a model came from, else that of its configuration."""
    # Saving in the Hugging Face layout replaces config.dtype, by a short string; the other attribute stays.
    name = str(config.to_dict().get(DTYPE_ATTRIBUTE) or config.dtype or torch.float32)
    dtype = DTYPES.get(f"torch.{name.removeprefix('torch.')}")
    if dtype is None:
        raise UserInputError(
            f"the model's configuration names the dtype {name!r}", remedy=f"pass one of {', '.join(DTYPES)}"
        )
    return dtype


def _native_tensors(model: MTPModel, config: LlamaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    names = NativeNames(config, model.horizon)
    found = {
        **model.causal_lm.state_dict(),
        **{
            f"heads.{head}.{name}": tensor
            for head, module in enumerate(model.extra_heads, start=1)
            for name, tensor in module.state_dict().items()
        },
    }
    sources = dict(MODEL_NAMES)
    prefixes = dict(names.layer_prefixes())
    prefixes |= {names.extra_prefix(head): f"heads.{head}.layer." for head in range(1, model.horizon)}
    for prefix, hf_prefix in prefixes.items():
        sources |= {prefix + native: hf_prefix + name for native, name in LAYER_NAMES.items()}
    strays = sorted(set(sources.values()) ^ set(found))
    if strays:
        raise UserInputError(
            f"the tensor {strays[0]!r} is not one of a plain Llama",
            remedy="merge adapters (LoRA) into the weights before writing the native layout",
        )
    tensors = {}
    for native, name in sources.items():
        tensor = found[name].detach().to(device="cpu", dtype=dtype)
        heads = names.num_rotary_heads(native)
        tensor = tensor if heads is None else to_interleaved(tensor, heads)
        # A view would be written with all of the memory it looks into.
        is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[native] = tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)
    return tensors


def _params_for(config: LlamaConfig, num_heads: int) -> dict[str, Any]:
    """Return params.json: the original's fields as far as they still hold, else those of the model."""
    current = _describe(config, num_heads)
    saved: Mapping[str, Any] | None = config.to_dict().get(PARAMS_ATTRIBUTE)
    if saved is None:
        return {**current, **feed_forward_fields(config.hidden_size, config.intermediate_size)}
    source = f"{PARAMS_ATTRIBUTE} in the model's configuration"
    original, original_heads = native_config(saved, vocab_size=config.vocab_size, source=source)
    before = _describe(original, original_heads)
    changed = {name: value for name, value in current.items() if value != before[name]}
    if (original.hidden_size, original.intermediate_size) != (config.hidden_size, config.intermediate_size):
        changed |= feed_forward_fields(config.hidden_size, config.intermediate_size)
    return {**saved, **changed}


def _describe(config: LlamaConfig, num_heads: int) -> dict[str, Any]:
    """Return every field of params.json but those of the feed-forward layer."""
    rope = config.rope_parameters or {}
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers - 1 + num_heads,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "n_future_tokens": num_heads,
    }


def feed_forward_fields(dim: int, size: int) -> dict[str, Any]:
    """Return the fields of params.json from which `feed_forward_size` computes exactly this size."""
    # The half keeps the product clear of the next lower whole number, to which it is cut.
    return {"multiple_of": 1, "ffn_dim_multiplier": (size + 0.5) / feed_forward_size(dim, 1, 1.0)}
