"""Configurations of Hugging Face models, read without running what they name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.sources import (
    CONFIG_FILE,
    HubSource,
    LocalSource,
    ModelSource,
    read_source_json,
)

# Configuration keys that make transformers import code, fetch compiled kernels or change its own classes, as
# whoever wrote the file chose; with the values that stay inside PyTorch.
_CODE_KEYS: dict[str, tuple[Any, ...]] = {
    "auto_map": (None, {}),
    "custom_pipelines": (None, {}),
    "quantization_config": (None, {}),
    "fusion_config": (None, {}),
    "attn_implementation": (None, "eager", "sdpa", "flex_attention"),
    "_attn_implementation": (None, "eager", "sdpa", "flex_attention"),
    "experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
    "_experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
}
# A layer has tensors, so there cannot be more layers than tensors; building what a hostile number asks for
# would take hours.
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def read_safe_config(source: ModelSource) -> dict[str, Any]:
    """Read config.json and refuse one that would make the loader run or fetch code.

    Raises:
        ModelLoadError: the file is missing, is no JSON object, has such a key (the message names it), or
            belongs to an adapter.
    """
    config = read_source_json(source, CONFIG_FILE)
    refuse_code(config, f"{source}/{CONFIG_FILE}")
    return config


def read_config(source: ModelSource, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Read a configuration as transformers' object; code it brings is run only where the user allows it.

    Raises:
        ModelLoadError: as for `read_safe_config` and `build_config`.
    """
    file = f"{source}/{CONFIG_FILE}"
    if trust_remote_code and any(code_keys(read_source_json(source, CONFIG_FILE))):
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                **where_code_is(source), trust_remote_code=True
            )
        # Code that came with a model can raise anything.
        except Exception as error:
            raise ModelLoadError(
                f"{file} cannot be used with its own code: {type(error).__name__}: {error}",
                remedy="check that the model is complete and fits this version of transformers",
            ) from error
        return config
    return build_config(read_safe_config(source), file)


def check_config(content: dict[str, Any], file: str, num_tensors: int) -> None:
    """Refuse a configuration that would make the loader run code, or build more than the weights can fill.

    Raises:
        ModelLoadError: `file` has such a key; the message names it.
    """
    refuse_code(content, file)
    for key, value in _walk(content):
        if key in _LAYER_COUNTS and isinstance(value, int) and value > num_tensors:
            raise ModelLoadError(
                f"{file} has {key} {value}, and the weights have {num_tensors} tensors altogether",
                remedy="config.json belongs to other weights; fetch both again",
            )


def build_config(content: dict[str, Any], file: str) -> PreTrainedConfig:
    """Make transformers' object of the content of a config.json that `read_safe_config` let pass.

    Raises:
        ModelLoadError: it cannot be understood; `file` is what the message names.
    """
    if not isinstance(content.get("model_type"), str):
        raise ModelLoadError(
            f"{file} has no model_type, so the architecture is unknown",
            remedy="save the model anew with a current version of transformers",
        )
    with TemporaryDirectory() as folder:
        # Through a file, because that is where transformers understands what older versions have written.
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(content), encoding="utf-8")
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        # Its constructors take the file's values as they are, and fail in as many ways as there are values.
        except Exception as error:
            raise ModelLoadError(
                f"{file} cannot be used: {type(error).__name__}: {str(error).replace(folder, file)}",
                remedy="fetch it again; or update transformers, if the architecture is new",
            ) from error
    config.name_or_path = ""
    return config


def causal_lm_class(config: PreTrainedConfig, file: str) -> type[PreTrainedModel]:
    """Return the class of the causal language model of a configuration.

    Raises:
        ModelLoadError: there is none; `file` is what the message names.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelLoadError(
            f"{file} describes {config.model_type!r}, which is no decoder-only causal language model",
            remedy="use a model of the Llama, Qwen, Gemma, GPT-2 or a similar family",
        )
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return model_class


def text_config(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """The part of a larger model's configuration that its language model takes; mostly all of it."""
    is_part = config.sub_configs.get("text_config") is model_class.config_class is not None
    return config.get_text_config() if is_part else config


def context_length(config: PreTrainedConfig) -> int | None:
    """Most positions a model was made for, whatever its family calls them; None where none are named."""
    decoder = config.get_text_config(decoder=True)
    name = decoder.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    length = decoder.to_dict().get(name)
    return None if length is None else int(length)


def check_architecture(file: str, content: dict[str, Any]) -> None:
    """Refuse a model that is no causal language model by its own account.

    Raises:
        ModelLoadError: `file` names another kind of architecture.
    """
    architectures = content.get("architectures") or []
    listed = (
        names if isinstance(names, tuple) else (names,)
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )
    known = {name for names in listed for name in names}
    if architectures and not any(
        name in known or str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures
    ):
        raise ModelLoadError(
            f"{file} says that the model is {', '.join(map(str, architectures))}, which is no decoder-only "
            "causal language model",
            remedy="use a model of the Llama, Qwen, Gemma, GPT-2 or a similar family",
        )


def where_code_is(source: ModelSource) -> dict[str, Any]:
    """Where transformers finds a model that brings code."""
    match source:
        case LocalSource():
            return {"pretrained_model_name_or_path": str(source)}
        case HubSource():
            return {
                "pretrained_model_name_or_path": source.repo,
                "subfolder": source.subfolder,
                "revision": source.commit,
            }
        case _:
            raise ModelLoadError(
                f"{source} brings code of its own, which is only run from a local directory or the hub",
                remedy="copy the model to a local directory",
            )


def refuse_code(content: dict[str, Any], file: str) -> None:
    """Refuse a configuration that would make the loader run or fetch code.

    Raises:
        ModelLoadError: naming the key.
    """
    key = next(code_keys(content), None)
    if key is not None:
        raise ModelLoadError(
            f"{file} has {key[0]!r}: {key[1]!r}, which can make the loader run code that is not part of this "
            "program",
            remedy="use a model without it; or read that code, then pass trust_remote_code=True "
            "(--trust-remote-code)",
        )


def code_keys(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys that would make the loader run or fetch code, with their values."""
    return (
        (key, value) for key, value in _walk(config) if key in _CODE_KEYS and value not in _CODE_KEYS[key]
    )


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of nested mappings and lists: a text model may stand inside a larger one."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)
