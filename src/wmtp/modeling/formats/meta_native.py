"""Meta's layout of multi-token prediction models: `params.json` beside `consolidated.pth`.

A Llama of D = dim, whose last decoder layer exists once for each future token. With L = n_layers and
H = n_future_tokens (one shared norm, embedding and unembedding):

    layers.0 .. layers.{L-H}            the next-token Llama; the last of them is head 0
    extra_heads.0 .. extra_heads.{H-2}  whole decoder layers as well: heads 1..H-1, which read the trunk

The trunk is therefore layers.0 .. layers.{L-H-1}, and `layers.{L-H}` is no part of it. Rotary pairs are the
neighbouring rows 2i, 2i+1 of `wq` and `wk`; Hugging Face pairs row i with row i + d/2 of a head of size d, so
these rows are reordered, in the extra heads too. Nothing else differs but the names.

Source: Gloeckle et al., 2024 (arXiv:2404.19737), and the model `facebook/multi-token-prediction`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.kinds import PARAMS_FILE
from wmtp.modeling.formats.parts import LoadedParts
from wmtp.modeling.formats.tensors import StoredTensor, StoredTensors, check_tensors
from wmtp.modeling.heads import SavedHeads

WEIGHTS_FILE = "consolidated.pth"
# Attributes of the Hugging Face configuration that remember where a model came from, for the way back.
PARAMS_ATTRIBUTE = "meta_native_params"
DTYPE_ATTRIBUTE = "meta_native_dtype"
DEFAULT_ROPE_THETA = 10000.0
# Native name -> name in Hugging Face's Llama; those of a decoder layer stand behind a prefix.
MODEL_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
# A table that the inference code computes again; some files have it.
_IGNORED = ("rope.freqs",)
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
# The layout names no longest text. Rotary positions need none; this is what the published models were
# trained on (table S13 of the paper).
_MAX_POSITIONS = 4096
_MISSING = object()


# -------------------------------------------------------------------- configuration


def native_config(
    params: Mapping[str, Any], *, vocab_size: int | None = None, source: str = PARAMS_FILE
) -> tuple[LlamaConfig, int]:
    """Return the configuration of the next-token Llama, and the number of heads H.

    The configuration keeps `params` as `meta_native_params`, all of its fields, for the way back. Ids of
    special tokens are not part of the layout and keep Llama's defaults (bos 1, eos 2).

    Args:
        params: contents of params.json; unknown fields are left alone.
        vocab_size: number of tokens where `params` says -1.
        source: the file, for messages.

    Raises:
        ModelLoadError: fields that are missing, of the wrong type, or do not go together; all are named.
    """
    fields = _Fields(params)
    dim, n_layers, n_heads = (fields.positive_int(name) for name in ("dim", "n_layers", "n_heads"))
    n_kv_heads = fields.positive_int("n_kv_heads", default=n_heads, may_be_null=True)
    n_future_tokens = fields.positive_int("n_future_tokens", default=1)
    multiple_of = fields.positive_int("multiple_of")
    multiplier = fields.positive_float("ffn_dim_multiplier", default=1.0, may_be_null=True)
    norm_eps = fields.positive_float("norm_eps")
    rope_theta = fields.positive_float("rope_theta", default=DEFAULT_ROPE_THETA)
    num_tokens = fields.vocab_size(vocab_size)
    problems = fields.problems or _contradictions(dim, n_layers, n_heads, n_kv_heads, n_future_tokens)
    if problems:
        raise ModelLoadError(
            f"{source} cannot be used: " + "; ".join(problems),
            remedy="fetch it again; it must be the params.json that was published with these weights",
        )
    config = LlamaConfig(
        vocab_size=num_tokens,
        hidden_size=dim,
        intermediate_size=feed_forward_size(dim, multiple_of, multiplier),
        num_hidden_layers=n_layers - n_future_tokens + 1,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        rms_norm_eps=norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=False,
    )
    setattr(config, PARAMS_ATTRIBUTE, copy.deepcopy(dict(params)))
    return config, n_future_tokens


def feed_forward_size(dim: int, multiple_of: int, multiplier: float) -> int:
    """Width of the gated feed-forward layer as Llama computes it: 2/3 of 4 dim, scaled, then rounded up."""
    size = int(multiplier * int(2 * (4 * dim) / 3))
    return multiple_of * ((size + multiple_of - 1) // multiple_of)


def _contradictions(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, n_future_tokens: int
) -> list[str]:
    problems = []
    if dim % (2 * n_heads):
        problems.append(f"n_heads is {n_heads}, which does not divide dim, {dim}, into heads of an even size")
    if n_heads % n_kv_heads:
        problems.append(f"n_kv_heads is {n_kv_heads}, which does not divide n_heads, {n_heads}")
    if n_future_tokens > n_layers:
        problems.append(
            f"n_future_tokens is {n_future_tokens}, more than n_layers, {n_layers}: head 0 has no layer"
        )
    return problems


class _Fields:
    """Reads the fields of params.json and notes everything that is wrong with them.

    A field with a problem comes back as 1, which is never used: problems end in an error.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self.problems: list[str] = []

    def positive_int(self, name: str, *, default: int | None = None, may_be_null: bool = False) -> int:
        value = self._read(name, default, may_be_null)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        return self._note(name, value, "a whole number of at least 1")

    def positive_float(self, name: str, *, default: float | None = None, may_be_null: bool = False) -> float:
        value = self._read(name, default, may_be_null)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and math.isfinite(value) and value > 0:
            return float(value)
        return self._note(name, value, "a number above 0")

    def vocab_size(self, from_elsewhere: int | None) -> int:
        if self._params.get("vocab_size") != -1:
            return self.positive_int("vocab_size")
        if from_elsewhere is None:
            self.problems.append("vocab_size is -1 (the tokenizer's), and that number is not known here")
            return 1
        return from_elsewhere

    def _read(self, name: str, default: float | None, may_be_null: bool) -> Any:
        if name not in self._params or (may_be_null and self._params[name] is None):
            return _MISSING if default is None else default
        return self._params[name]

    def _note(self, name: str, value: Any, rule: str) -> int:
        is_missing = value is _MISSING
        self.problems.append(f"{name} is missing" if is_missing else f"{name} is {value!r}, not {rule}")
        return 1


# -------------------------------------------------------------------- names and shapes


@dataclass(frozen=True, slots=True)
class NativeNames:
    """The tensors of a native checkpoint, for a next-token Llama of this configuration and H heads."""

    config: LlamaConfig
    num_heads: int

    def layer_prefixes(self) -> Iterator[tuple[str, str]]:
        """Yield (native prefix, Hugging Face prefix) of the layers of trunk and head 0."""
        for index in range(self.config.num_hidden_layers):
            yield f"layers.{index}.", f"model.layers.{index}."

    def extra_prefix(self, head: int) -> str:
        """Return the native prefix of head h, 1..H-1."""
        return f"extra_heads.{head - 1}."

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return native name -> shape of every tensor."""
        config = self.config
        dim, width, num_tokens = config.hidden_size, config.intermediate_size, config.vocab_size
        key_size = dim // config.num_attention_heads * self._num_key_value_heads
        layer = {
            "attention.wq.weight": (dim, dim),
            "attention.wk.weight": (key_size, dim),
            "attention.wv.weight": (key_size, dim),
            "attention.wo.weight": (dim, dim),
            "feed_forward.w1.weight": (width, dim),
            "feed_forward.w2.weight": (dim, width),
            "feed_forward.w3.weight": (width, dim),
            "attention_norm.weight": (dim,),
            "ffn_norm.weight": (dim,),
        }
        prefixes = [native for native, _ in self.layer_prefixes()]
        prefixes += [self.extra_prefix(head) for head in range(1, self.num_heads)]
        return {
            "tok_embeddings.weight": (num_tokens, dim),
            "norm.weight": (dim,),
            "output.weight": (num_tokens, dim),
            **{prefix + name: shape for prefix in prefixes for name, shape in layer.items()},
        }

    def num_rotary_heads(self, name: str) -> int | None:
        """Return how many heads' rotary pairs the rows of a native tensor hold; None for one without."""
        if name.endswith("attention.wq.weight"):
            return self.config.num_attention_heads
        if name.endswith("attention.wk.weight"):
            return self._num_key_value_heads
        return None

    @property
    def _num_key_value_heads(self) -> int:
        return self.config.num_key_value_heads or self.config.num_attention_heads


def to_half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder rows [heads * d, D] of each head from pairs (2i, 2i+1) to pairs (i, i + d/2)."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def to_interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Undo `to_half_split`."""
    halves = weight.view(num_heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


# -------------------------------------------------------------------- reading


def read_native(
    params: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    params_source: str,
    weights_source: str,
) -> LoadedParts:
    """Build the next-token Llama from native tensors, and offer the extra heads.

    Each tensor is read when its turn comes and copied, so that with `StoredTensors`, or a mapped file, no
    second copy of the weights is held in memory. `config.dtype` and `config.meta_native_dtype` say what was
    on disk: where dtypes are mixed, the smallest that holds all of them.

    Args:
        params: contents of params.json.
        tensors: contents of consolidated.pth.
        dtype: of the parameters in memory.
        params_source: the file of `params`, for messages.
        weights_source: the file of `tensors`, for messages.

    Raises:
        ModelLoadError: a tensor is missing, unexpected, misshapen or of a dtype without meaning here; the
            message names it and the file.
    """
    listed: Mapping[str, Tensor | StoredTensor]
    listed = tensors.stored() if isinstance(tensors, StoredTensors) else tensors
    headers = {name: header for name, header in listed.items() if name not in _IGNORED}
    disk_dtype = _dtype_on_disk(headers, weights_source)
    # Without an embedding any number will do: the missing tensor is the error.
    embedding_shape = headers["tok_embeddings.weight"].shape if "tok_embeddings.weight" in headers else ()
    config, num_heads = native_config(
        params, vocab_size=embedding_shape[0] if embedding_shape else 1, source=params_source
    )
    names = NativeNames(config, num_heads)
    found = {name: tuple(header.shape) for name, header in headers.items()}
    _check_layout(names, found, params_source, weights_source)

    def convert(name: str) -> Tensor:
        heads = names.num_rotary_heads(name)
        weight = tensors[name] if heads is None else to_half_split(tensors[name], heads)
        # Always a copy: a parameter that shared memory with a mapped file would change when the file does.
        return weight.to(dtype=dtype, device="cpu", copy=True, memory_format=torch.contiguous_format)

    def convert_head(head: int) -> dict[str, Tensor]:
        prefix = names.extra_prefix(head)
        return {f"layer.{name}": convert(prefix + native) for native, name in LAYER_NAMES.items()}

    state = {name: convert(native) for native, name in MODEL_NAMES.items()}
    for prefix, hf_prefix in names.layer_prefixes():
        state |= {hf_prefix + name: convert(prefix + native) for native, name in LAYER_NAMES.items()}
    causal_lm = _build_llama(config, state)
    config.dtype = disk_dtype
    setattr(config, DTYPE_ATTRIBUTE, str(disk_dtype))
    saved = SavedHeads("transformer", tuple(range(1, num_heads + 1)))
    return LoadedParts(causal_lm, saved, convert_head, weights_source)


def _build_llama(config: LlamaConfig, state: Mapping[str, Tensor]) -> LlamaForCausalLM:
    with torch.device("meta"):
        causal_lm = LlamaForCausalLM(config)
    causal_lm.load_state_dict(state, strict=True, assign=True)
    # Its tables are no part of a state dict and would stay without values.
    causal_lm.model.rotary_emb = LlamaRotaryEmbedding(config)
    causal_lm.eval()  # type: ignore[no-untyped-call]
    return causal_lm


def _dtype_on_disk(tensors: Mapping[str, Any], source: str) -> torch.dtype:
    for name, tensor in tensors.items():
        if not isinstance(tensor, (Tensor, StoredTensor)):
            raise ModelLoadError(
                f"{source}: {name!r} is no tensor but {type(tensor).__name__}",
                remedy="give a consolidated.pth as published: one mapping of names to tensors",
            )
        if str(tensor.dtype) not in DTYPES:
            raise ModelLoadError(
                f"{source}: tensor {name!r} has dtype {tensor.dtype}",
                remedy="give weights in float32, bfloat16 or float16; quantised ones are not read",
            )
    if not tensors:
        raise ModelLoadError(f"{source} holds no tensors", remedy="fetch it again")
    smallest: torch.dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    return smallest


def _check_layout(
    names: NativeNames, found: Mapping[str, tuple[int, ...]], params_source: str, weights_source: str
) -> None:
    try:
        check_tensors(weights_source, names.shapes(), found)
    except ModelLoadError as error:
        num_layers, num_extra = names.config.num_hidden_layers, names.num_heads - 1
        blocks = f"layers.0..{num_layers - 1}" + (f" and extra_heads.0..{num_extra - 1}" if num_extra else "")
        raise ModelLoadError(
            f"{error.message} ({params_source} calls for {blocks}{'' if num_extra else ', no extra_heads'})",
            remedy="keep params.json and consolidated.pth of the same model together; fetch both again",
        ) from error
