"""Models in the Hugging Face layout: a configuration beside weights, sharded or not."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.sources import ModelFiles, check_weight_files

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
