"""Models in the Hugging Face layout: a configuration beside weights, sharded or not, safetensors or pickle.

Configuration and tensors are read here, from wherever they are, and handed to transformers as objects. So
files are read the same way everywhere, and transformers looks for none of its own: no adapter, no code, no
other weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.configuration import (
    build_config,
    causal_lm_class,
    check_architecture,
    check_config,
    code_keys,
    refuse_code,
    text_config,
    where_code_is,
)
from wmtp.modeling.formats.sources import CONFIG_FILE, ModelSource, read_source_json
from wmtp.modeling.formats.tensors import StoredTensor, StoredTensors, open_weights

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
GENERATION_FILE = "generation_config.json"


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
    if trust_remote_code and any(code_keys(read_source_json(source, CONFIG_FILE))):
        return _load_with_its_own_code(source, dtype)
    file = f"{source}/{CONFIG_FILE}"
    content = read_source_json(source, CONFIG_FILE)
    refuse_code(content, file)
    check_architecture(file, content)
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
                state_dict={
                    name: replace(stored, becomes=dtype) for name, stored in tensors.stored().items()
                },
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
    for kept in (*model.parameters(), *model.buffers()):
        # What the model keeps in another precision was not converted, so it may be a view of the file.
        if kept.dtype != dtype:
            kept.data = kept.data.clone()
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
            **where_code_is(source),
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
