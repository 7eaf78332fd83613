"""Loading and saving: Hugging Face directories, hub ids, and the WMTP export.

The export is a Hugging Face directory with two files more: `mtp_heads.safetensors` holds head h (1..H-1)
under `heads.{h}.`, `wmtp.json` says how many there are and of which form. Neither disturbs a plain loader.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.model_files import (
    HEADS_FILE,
    WMTP_FILE,
    ModelFiles,
    check_weight_files,
    locate_model,
    read_json,
    read_safe_config,
    tensor_shapes,
)
from wmtp.modeling.structure import HEAD_FORMS, check_head_options, copy_last_layer

if TYPE_CHECKING:
    from wmtp.modeling.mtp_model import MTPModel

FORMAT_VERSION = 1
# What transformers and its file readers raise for files that cannot be used.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    SafetensorError,
    pickle.UnpicklingError,
)


def load_mtp_model(
    path: str | Path,
    *,
    horizon: int | None,
    head: str,
    adapter: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, nn.ModuleList]:
    """Load wrapped model and extra heads; arguments and errors as for `MTPModel.from_pretrained`."""
    check_head_options(1 if horizon is None else horizon, head, adapter)
    files = locate_model(path)
    if not trust_remote_code:
        read_safe_config(files)
    causal_lm = load_causal_lm(files, dtype=dtype, trust_remote_code=trust_remote_code)
    saved_horizon = _saved_horizon(files)
    wanted = saved_horizon if horizon is None else horizon
    if wanted < saved_horizon:
        warnings.warn(
            f"{files} has {saved_horizon} heads; the first {wanted} are used (horizon={wanted})", stacklevel=3
        )
    extra_heads = copy_last_layer(causal_lm, wanted - 1)
    num_saved = min(wanted, saved_horizon) - 1
    if num_saved > 0:
        load_heads(_find_heads(files), list(extra_heads)[:num_saved])
    return causal_lm, extra_heads


def load_causal_lm(files: ModelFiles, *, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Load the next-token model; a tensor that is missing is an error and never a random one.

    Raises:
        ModelLoadError: with the names of files and tensors.
    """
    check_weight_files(files)
    where: dict[str, Any] = {"subfolder": files.subfolder, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(files.source, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.source, config=config, dtype=dtype, weights_only=True, output_loading_info=True, **where
        )
    except _LOAD_ERRORS as error:
        raise ModelLoadError(
            f"{files} cannot be loaded as a causal language model: {error}",
            remedy="check that the directory is complete and holds a decoder-only language model",
        ) from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ModelLoadError(
            f"the weights of {files} lack {shown}",
            remedy="the checkpoint is incomplete or of another kind of model; fetch it again",
        )
    return model


def load_heads(file: Path, heads: list[nn.Module]) -> None:
    """Copy tensors `heads.1. ...` onwards into `heads`.

    Raises:
        ModelLoadError: a tensor is missing, misshapen, or belongs to nothing; the message names file and
            tensor.
    """
    shapes = tensor_shapes(file)
    with safe_open(file, framework="pt") as reader, torch.no_grad():
        for index, module in enumerate(heads, start=1):
            targets = {f"heads.{index}.{name}": tensor for name, tensor in module.state_dict().items()}
            check_shapes(file, {name: tuple(tensor.shape) for name, tensor in targets.items()}, shapes)
            unknown = [name for name in shapes if name.startswith(f"heads.{index}.") and name not in targets]
            if unknown:
                raise ModelLoadError(
                    f"{file} has the unexpected tensor {unknown[0]!r}",
                    remedy="the heads are of another model",
                )
            for name, tensor in targets.items():
                tensor.copy_(reader.get_tensor(name))


def check_shapes(
    file: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the tensors a module needs with those a file has.

    Raises:
        ModelLoadError: naming the file and the first tensor that is missing or misshapen.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise ModelLoadError(
                f"{file} lacks the tensor {name!r}", remedy="the file is incomplete; save it again"
            )
        if found[name] != shape:
            raise ModelLoadError(
                f"{file}: tensor {name!r} has shape {list(found[name])}, the model needs {list(shape)}",
                remedy="the file belongs to a model of another size",
            )


def save_mtp_model(
    model: MTPModel,
    path: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    metadata: Mapping[str, Any] | None,
) -> None:
    """Write the export; see `MTPModel.save_pretrained`."""
    path.mkdir(parents=True, exist_ok=True)
    model.causal_lm.save_pretrained(path)
    tensors = {
        f"heads.{index}.{name}": tensor.detach().cpu().contiguous()
        for index, module in enumerate(model.extra_heads, start=1)
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, path / HEADS_FILE, metadata={"format": "pt"})
    description = {
        "format_version": FORMAT_VERSION,
        "horizon": model.horizon,
        "head": "transformer",
        "offsets": list(model.offsets),
        "metadata": dict(metadata or {}),
    }
    (path / WMTP_FILE).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _saved_horizon(files: ModelFiles) -> int:
    """Return the number of heads of an export, 1 for a plain model."""
    file = files.find(WMTP_FILE)
    if file is None:
        return 1
    description = read_json(file)
    version, horizon, head = (description.get(key) for key in ("format_version", "horizon", "head"))
    if version != FORMAT_VERSION or head not in HEAD_FORMS or not isinstance(horizon, int) or horizon < 1:
        raise ModelLoadError(
            f"{file} describes heads this version cannot read: format_version={version!r}, "
            f"horizon={horizon!r}, head={head!r}",
            remedy="use a newer version of wmtp, or export the model again",
        )
    return horizon


def _find_heads(files: ModelFiles) -> Path:
    file = files.find(HEADS_FILE)
    if file is None:
        raise ModelLoadError(
            f"{files} has {WMTP_FILE} but no {HEADS_FILE}",
            remedy="copy the whole export; the heads are missing",
        )
    return file
