"""Models in the Hugging Face layout: a configuration beside weights, sharded or not, safetensors or pickle.

Configuration and tensors are read here, from wherever they are, and handed to transformers as objects. So
files are read the same way everywhere, and transformers looks for none of its own: no adapter, no code, no
other weights.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.sources import (
    CONFIG_FILE,
    HubSource,
    LocalSource,
    ModelSource,
    read_source_json,
)
from wmtp.modeling.formats.tensors import StoredTensor, StoredTensors, open_weights

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
GENERATION_FILE = "generation_config.json"
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
    _refuse_code(config, f"{source}/{CONFIG_FILE}")
    return config


def read_config(source: ModelSource, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Read a configuration as transformers' object; code it brings is run only where the user allows it.

    Raises:
        ModelLoadError: as for `read_safe_config` and `build_config`.
    """
    file = f"{source}/{CONFIG_FILE}"
    if trust_remote_code and any(_code_keys(read_source_json(source, CONFIG_FILE))):
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                **_where_code_is(source), trust_remote_code=True
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
    _refuse_code(content, file)
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


def load_causal_lm(source: ModelSource, *, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Load the next-token model; a tensor that is missing or misshapen is an error and never a random one.

    Raises:
        ModelLoadError: with the names of files and tensors.
    """
    if ADAPTER_FILE in source.names():
        raise ModelLoadError(
            f"{source} holds an adapter ({ADAPTER_FILE}), whose base model would come from elsewhere",
            remedy="merge the adapter into its base model and save that",
        )
    if trust_remote_code and any(_code_keys(read_source_json(source, CONFIG_FILE))):
        return _load_with_its_own_code(source, dtype)
    file = f"{source}/{CONFIG_FILE}"
    content = read_source_json(source, CONFIG_FILE)
    _refuse_code(content, file)
    _check_architecture(file, content)
    tensors = open_weights(source)
    check_config(content, file, len(tensors))
    config = build_config(content, file)
    config.name_or_path = str(source)
    generation_config = _read_generation_config(source)
    return fill_model(
        causal_lm_class(config, file),
        config,
        tensors,
        source,
        dtype=dtype,
        generation_config=generation_config,
    )


def fill_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: StoredTensors,
    source: ModelSource,
    *,
    dtype: torch.dtype,
    generation_config: GenerationConfig | None = None,
) -> PreTrainedModel:
    """Build a model and fill it with tensors, named as on disk.

    Raises:
        ModelLoadError: a tensor is missing or misshapen; the message names it and its file.
    """
    try:
        _check_size(model_class, text_config(config, model_class), tensors.shapes(), source)
        with _quiet_transformers():
            loaded: Any = model_class.from_pretrained(
                None,
                config=text_config(config, model_class),
                state_dict=tensors.stored(),
                dtype=dtype,
                generation_config=generation_config,
                output_loading_info=True,
                # Reported below with file and shapes; never used with the random values in their place.
                ignore_mismatched_sizes=True,
            )
    except ModelLoadError:
        raise
    # As for configurations: hostile or damaged values fail in as many ways as there are values.
    except Exception as error:
        raise ModelLoadError(
            f"{source} cannot be loaded as {model_class.__name__}: {type(error).__name__}: {error}",
            remedy="check that config.json belongs to these weights, and fetch both again",
        ) from error
    model: PreTrainedModel = loaded[0]
    _check_report(loaded[1], tensors.stored(), source, model_class.__name__)
    model.config.name_or_path = model.name_or_path = str(source)
    return model


def _check_size(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    found: dict[str, tuple[int, ...]],
    source: ModelSource,
) -> None:
    """Refuse a configuration of a far larger model, for which memory would be allocated before the report.

    Names and shapes on disk may differ from the model's, so only the sum is compared, generously.
    """
    with torch.device("meta"):
        skeleton = model_class(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    num_wanted, num_found = (sum(map(math.prod, shapes.values())) for shapes in (wanted, found))
    if num_wanted <= 2 * num_found:
        return
    for name, shape in wanted.items():
        if found.get(name, shape) != shape:
            raise ModelLoadError(
                f"{source}: tensor {name!r} has shape {list(found[name])}, the model needs {list(shape)}",
                remedy="config.json belongs to a model of another size; fetch it again",
            )
    missing = next((name for name in wanted if name not in found), None)
    raise ModelLoadError(
        f"{source}/{CONFIG_FILE} describes {num_wanted} parameters, and the weights have {num_found}"
        + ("" if missing is None else f"; the tensor {missing!r} is missing"),
        remedy="the checkpoint is incomplete, or config.json belongs to other weights; fetch both again",
    )


def _check_report(
    report: dict[str, Any], stored: dict[str, StoredTensor], source: ModelSource, model_name: str
) -> None:
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise ModelLoadError(
            f"{_file_of(name, stored, source)}: tensor {name!r} has shape {list(found)}, the model needs "
            f"{list(wanted)}{_and_more(report['mismatched_keys'])}",
            remedy="config.json belongs to a model of another size, or the file is damaged; fetch both again",
        )
    if report["missing_keys"]:
        files = sorted({tensor.file for tensor in stored.values()})
        where = files[0] if len(files) == 1 else f"{source} ({len(files)} files of weights)"
        raise ModelLoadError(
            f"{where} lacks the tensor {min(report['missing_keys'])!r}{_and_more(report['missing_keys'])}, "
            f"which {model_name} needs",
            remedy="the checkpoint is incomplete or of another kind of model; fetch it again",
        )
    if report["unexpected_keys"]:
        unexpected = report["unexpected_keys"]
        logger.warning(
            "%s: tensor %r%s is not used by %s", source, min(unexpected), _and_more(unexpected), model_name
        )


def _file_of(name: str, stored: dict[str, StoredTensor], source: ModelSource) -> str:
    """The file of a tensor that the model calls `name`; on disk a prefix may be absent or there besides."""
    files = {
        tensor.file
        for on_disk, tensor in stored.items()
        if f".{on_disk}".endswith(f".{name}") or f".{name}".endswith(f".{on_disk}")
    }
    return files.pop() if len(files) == 1 else str(source)


def _and_more(names: set[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _check_architecture(file: str, content: dict[str, Any]) -> None:
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


def _read_generation_config(source: ModelSource) -> GenerationConfig | None:
    if GENERATION_FILE not in source.names():
        return None
    content = read_source_json(source, GENERATION_FILE)
    try:
        config: GenerationConfig = GenerationConfig.from_dict(content)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"{source}/{GENERATION_FILE} cannot be used: {error}", remedy="fetch it again, or delete it"
        ) from error
    return config


def _load_with_its_own_code(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """Let transformers load a model that brings code, which the user has allowed."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **_where_code_is(source),
            dtype=dtype,
            trust_remote_code=True,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    # Code that came with a model can raise anything.
    except Exception as error:
        raise ModelLoadError(
            f"{source} cannot be loaded with its own code: {type(error).__name__}: {error}",
            remedy="check that it is complete and that its code fits this version of transformers",
        ) from error
    model: PreTrainedModel = loaded[0]
    _check_report(loaded[1], {}, source, type(model).__name__)
    return model


def _where_code_is(source: ModelSource) -> dict[str, Any]:
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


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep back transformers' own table of missing and misshapen tensors: here these are errors."""
    reporter = logging.getLogger("transformers.modeling_utils")

    def drop(_: logging.LogRecord) -> bool:
        return False

    reporter.addFilter(drop)
    try:
        yield
    finally:
        reporter.removeFilter(drop)


def _refuse_code(content: dict[str, Any], file: str) -> None:
    key = next(_code_keys(content), None)
    if key is not None:
        raise ModelLoadError(
            f"{file} has {key[0]!r}: {key[1]!r}, which can make the loader run code that is not part of this "
            "program",
            remedy="use a model without it; or read that code, then pass trust_remote_code=True "
            "(--trust-remote-code)",
        )


def _code_keys(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
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
