"""Reward models on disk: the Starling-RM layout, and Hugging Face sequence classifiers with one label.

Both readers take a configuration and tensors, so that they do not depend on where files lie. The reward head
is read by its name: a loader that fills in what is missing would give a random head, and random rewards.

Shapes: D hidden size.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, LlamaConfig, PreTrainedConfig, PreTrainedModel

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.configuration import read_config
from wmtp.modeling.formats.kinds import ModelKind, detect_reward_model, lone_torch_file
from wmtp.modeling.formats.sources import CONFIG_FILE, ModelSource, locate_source
from wmtp.modeling.formats.tensors import StoredTensor, StoredTensors, open_tensors, open_weights

logger = logging.getLogger(__name__)

STARLING_HEAD = "v_head.weight"
CLASSIFICATION_HEAD = "score.weight"
# A state dict of a module that holds a causal language model and, under a second name, that model's decoder.
_STARLING_COPIES = ("model.model.", "transformer.")
_STARLING_OTHERS = ("model.lm_head.weight", STARLING_HEAD)
# Buffers that older versions of transformers saved; models compute them.
_ROTARY_BUFFER = "rotary_emb.inv_freq"
_ADD_CONFIG = "put the config.json of the model it was trained from beside the file"

_LLAMA2_HEAD_DIM = 128
_LLAMA2_THETA = 10000.0
_LLAMA2_EPS = 1e-5
_LLAMA2_CONTEXT = 4096
# Llama 2's vocabulary, and with a padding token added.
_LLAMA2_VOCABULARIES = (32000, 32001)


@dataclass(frozen=True, slots=True)
class RewardParts:
    """What was read from a reward model of either layout.

    Attributes:
        base: the decoder, without unembedding.
        head_weight_1D: fp32, the linear map from its last hidden state to the score.
    """

    base: PreTrainedModel
    head_weight_1D: Tensor


def read_sequence_classifier(
    source: object,
    config: PreTrainedConfig,
    tensors: StoredTensors,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> RewardParts:
    """Read a Hugging Face `*ForSequenceClassification` with one label.

    Args:
        source: the file or directory that messages name.
        config: its configuration.
        tensors: its state dict: the decoder under the family's prefix, and `score.weight`.
        dtype: of the decoder.
        trust_remote_code: let the model's own code run.

    Raises:
        ModelLoadError: more than one label, or a tensor that is missing, misshapen or of another model.
    """
    if config.num_labels != 1:
        raise ModelLoadError(
            f"{source} is a classifier with {config.num_labels} labels, a reward model has one",
            remedy="choose a reward model (num_labels 1 in its config.json)",
        )
    stored = tensors.stored()
    head_weight_1D = _read_head(source, CLASSIFICATION_HEAD, stored, config)
    rest = {name: tensor for name, tensor in stored.items() if name != CLASSIFICATION_HEAD}
    base = _load_decoder(source, config, rest, dtype=dtype, trust_remote_code=trust_remote_code)
    return RewardParts(base, head_weight_1D)


def read_starling(
    source: object, config: PreTrainedConfig | None, tensors: StoredTensors, *, dtype: torch.dtype
) -> RewardParts:
    """Read the Starling-RM layout: one state dict with the decoder, mostly twice, and `v_head.weight`.

    Args:
        source: the file that messages name.
        config: the decoder's configuration; None derives that of a Llama from the tensors.
        tensors: the decoder under `model.model.` (with `model.lm_head.weight`) and under `transformer.`, or
            one of the two, and the head.
        dtype: of the decoder.

    Raises:
        ModelLoadError: the two copies differ, a tensor is missing, misshapen or of another model, or no
            configuration was given and the tensors do not tell it.
    """
    stored = tensors.stored()
    if STARLING_HEAD not in stored:
        raise _missing_head(source, STARLING_HEAD)
    decoder = _starling_decoder(source, stored)
    if config is None:
        config = derive_llama_config(source, decoder)
    head_weight_1D = _read_head(source, STARLING_HEAD, stored, config)
    return RewardParts(_load_decoder(source, config, decoder, dtype=dtype), head_weight_1D)


def derive_llama_config(source: object, decoder: Mapping[str, StoredTensor]) -> LlamaConfig:
    """Tell a Llama's configuration from the shapes of its decoder and its old rotary buffers.

    Without the buffers the file must have the shapes of a Llama 2 (heads of 128, its vocabulary). What no
    tensor tells is Llama 2's: epsilon 1e-5 of the norms.

    Raises:
        ModelLoadError: a tensor is missing, or head size or rotary base cannot be told.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in decoder or len(decoder[name].shape) != 2:
            raise ModelLoadError(
                f"{source} lacks the matrix {name!r} of a Llama decoder, so its configuration is unknown",
                remedy=_ADD_CONFIG,
            )
        return decoder[name].shape

    vocabulary, hidden = shape("embed_tokens.weight")
    query_rows = shape("layers.0.self_attn.q_proj.weight")[0]
    key_rows = shape("layers.0.self_attn.k_proj.weight")[0]
    buffer = next((tensor for name, tensor in decoder.items() if name.endswith(_ROTARY_BUFFER)), None)
    if buffer is not None:
        frequencies = buffer.read()
        head_dim, theta = 2 * frequencies.numel(), _rotary_base(source, frequencies)
    else:
        head_dim, theta = _LLAMA2_HEAD_DIM, _LLAMA2_THETA
        if vocabulary not in _LLAMA2_VOCABULARIES or query_rows != hidden:
            raise ModelLoadError(
                f"{source} has no config.json beside it and no {_ROTARY_BUFFER}, and its shapes (vocabulary "
                f"{vocabulary}, hidden size {hidden}) are not those of a Llama 2",
                remedy=_ADD_CONFIG,
            )
    if query_rows % head_dim or key_rows % head_dim:
        raise ModelLoadError(
            f"{source}: {query_rows} query and {key_rows} key rows are not heads of {head_dim}",
            remedy=_ADD_CONFIG,
        )
    logger.warning(
        "%s has no config.json: taken for a Llama with heads of %d, rotary base %g and norm epsilon %g; "
        "if that is not so, %s",
        *(source, head_dim, theta, _LLAMA2_EPS, _ADD_CONFIG),
    )
    numbers = [int(match[1]) for name in decoder if (match := re.match(r"layers\.(\d+)\.", name))]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=shape("layers.0.mlp.gate_proj.weight")[0],
        num_hidden_layers=max(numbers) + 1,
        num_attention_heads=query_rows // head_dim,
        num_key_value_heads=key_rows // head_dim,
        head_dim=head_dim,
        max_position_embeddings=_LLAMA2_CONTEXT,
        rms_norm_eps=_LLAMA2_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )


def _rotary_base(source: object, frequencies: Tensor) -> float:
    """The theta of frequencies theta ** (-2i / head_dim), i = 0, 1, ...; round numbers are preferred."""
    num = frequencies.numel()
    if num > 1 and bool((frequencies > 0).all()):
        # The lowest frequency tells theta best: rounding errors are not raised to a high power.
        estimate = float(frequencies.double()[-1]) ** (-num / (num - 1))
        exponents = torch.arange(num, dtype=torch.float64) / num
        tolerance = 1e-4 if frequencies.dtype in (torch.float32, torch.float64) else 2e-2
        for theta in (float(f"{estimate:.1g}"), float(f"{estimate:.2g}"), estimate):
            if torch.allclose(theta**-exponents, frequencies.double(), rtol=tolerance, atol=0):
                return theta
    raise ModelLoadError(
        f"{source}: the rotary frequencies in {_ROTARY_BUFFER} are not powers of one base (a scaled rotary "
        "embedding?), so the configuration is unknown",
        remedy=_ADD_CONFIG,
    )


def _starling_decoder(source: object, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The one decoder that stands in the file once or twice; two copies must be equal, tensor by tensor."""
    first, second = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in _STARLING_COPIES
    )
    num_known = len(first) + len(second) + sum(name in tensors for name in _STARLING_OTHERS)
    if num_known != len(tensors):
        known = (*_STARLING_COPIES, *_STARLING_OTHERS)
        unknown = next(name for name in tensors if not name.startswith(known))
        raise ModelLoadError(
            f"{source} has the unexpected tensor {unknown!r}",
            remedy=f"the file is of another model; a Starling-RM has {', '.join(known)}",
        )
    if not first or not second:
        return first or second
    for prefix, copy, other in zip(_STARLING_COPIES, (first, second), (second, first), strict=True):
        for name in other:
            if name not in copy:
                raise ModelLoadError(
                    f"{source} holds the decoder twice, but lacks the tensor {prefix + name!r} of one copy",
                    remedy="the file is incomplete; fetch it again",
                )
    for name, tensor in first.items():
        if not _is_same(tensor, second[name]):
            names = " and ".join(repr(prefix + name) for prefix in _STARLING_COPIES)
            raise ModelLoadError(
                f"{source} holds the decoder twice, but {names} differ, so it is unknown which one is meant",
                remedy="the file is damaged or was put together from two models; fetch it again",
            )
    return first


def _is_same(one: StoredTensor, other: StoredTensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = one.read(), other.read()
    # Mostly both names lie on the same bytes of the file, which then need not be compared.
    is_alias = first.data_ptr() == second.data_ptr() and first.stride() == second.stride()
    return is_alias or torch.equal(first, second)


def _read_head(
    source: object, name: str, tensors: Mapping[str, StoredTensor], config: PreTrainedConfig
) -> Tensor:
    if name not in tensors:
        raise _missing_head(source, name)
    stored = tensors[name]
    hidden = config.get_text_config(decoder=True).hidden_size
    if stored.shape != (1, hidden):
        raise ModelLoadError(
            f"{stored.file}: the reward head {name!r} has shape {list(stored.shape)}, not [1, {hidden}]",
            remedy="the head belongs to another model, or gives several numbers instead of one",
        )
    weight_1D = stored.read().detach().float().clone()
    if not bool(weight_1D.isfinite().all()):
        raise ModelLoadError(
            f"{stored.file}: the reward head {name!r} has values that are NaN or infinite",
            remedy="the file is damaged; fetch it again",
        )
    return weight_1D


def _missing_head(source: object, name: str) -> ModelLoadError:
    return ModelLoadError(
        f"{source} has no reward head: the tensor {name!r} is missing",
        remedy="choose a model that was trained as a reward model, or fetch all of its files again",
    )


def _load_decoder(
    source: object,
    config: PreTrainedConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the decoder of a configuration and fill it; every tensor must find its place."""
    model, report = _build_decoder(source, config, tensors, dtype=dtype, trust_remote_code=trust_remote_code)
    for key, problem in (
        ("missing_keys", "lacks the tensor"),
        ("mismatched_keys", "has another shape than the model needs in the tensor"),
        ("unexpected_keys", "has the unexpected tensor"),
    ):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])
        if names:
            files = {tensor.file for tensor in tensors.values()}
            where = files.pop() if len(files) == 1 else source
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelLoadError(
                f"{where} {problem} {names[0]!r}{more} ({type(model).__name__})",
                remedy="the file is incomplete, or its config.json is another model's; fetch both again",
            )
    return model


def _build_decoder(
    source: object,
    config: PreTrainedConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The decoder with what fits, and transformers' report of what does not."""
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = AutoModel.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=trust_remote_code
            )
        prefix = f"{skeleton.base_model_prefix}."
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if not name.endswith(_ROTARY_BUFFER)
        }
        loaded: Any = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            # The caller reports them with the names; the random values in their place are never used.
            ignore_mismatched_sizes=True,
        )
    except ModelLoadError:
        raise
    # Hostile or damaged configurations fail in as many ways as there are values.
    except Exception as error:
        raise ModelLoadError(
            f"{source} cannot be loaded as a reward model: {type(error).__name__}: {error}",
            remedy="check that config.json belongs to these weights, and fetch both again",
        ) from error
    return loaded[0], loaded[1]


def read_reward_model(
    path: str | Path | ModelSource, *, dtype: torch.dtype, trust_remote_code: bool
) -> RewardParts:
    """Find out which layout lies at `path`, a folder, a file or a hub id, and read it; errors as above."""
    source = locate_source(path) if isinstance(path, str | Path) else path
    kind = detect_reward_model(source)
    has_config = CONFIG_FILE in source.names()
    config = read_config(source, trust_remote_code=trust_remote_code) if has_config else None
    if kind is ModelKind.SEQUENCE_CLASSIFICATION:
        assert config is not None
        tensors = open_weights(source)
        return read_sequence_classifier(
            source, config, tensors, dtype=dtype, trust_remote_code=trust_remote_code
        )
    file = lone_torch_file(source.names())
    return read_starling(
        source, config, open_weights(source) if file is None else open_tensors(source, file), dtype=dtype
    )
