"""One way in for every kind of model: look at the files, read them, give the model its heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from wmtp.modeling.formats.export import read_saved_heads, saved_head_tensors
from wmtp.modeling.formats.hugging_face import load_causal_lm
from wmtp.modeling.formats.parts import LoadedParts
from wmtp.modeling.formats.sources import ModelFiles, locate_model, read_safe_config
from wmtp.modeling.formats.tensors import check_tensors, shapes_of
from wmtp.modeling.heads import HeadRequest, plan_heads

if TYPE_CHECKING:
    from wmtp.modeling.mtp_model import MTPModel

ModelT = TypeVar("ModelT", bound="MTPModel")


def load_mtp_model(
    model_class: type[ModelT],
    path: str | Path,
    request: HeadRequest,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> ModelT:
    """Load a model; arguments and errors as for `MTPModel.from_pretrained`."""
    files = locate_model(path)
    if not trust_remote_code:
        read_safe_config(files)
    parts = _load_hugging_face(files, dtype=dtype, trust_remote_code=trust_remote_code)
    plan = plan_heads(request, parts.heads, str(files))
    model = model_class(parts.causal_lm, form=plan.form, offsets=plan.offsets)
    for head in range(1, plan.num_saved):
        _fill_head(model, head, parts)
    return model


def _load_hugging_face(files: ModelFiles, *, dtype: torch.dtype, trust_remote_code: bool) -> LoadedParts:
    causal_lm = load_causal_lm(files, dtype=dtype, trust_remote_code=trust_remote_code)
    saved = read_saved_heads(files)
    head_tensors, head_source = saved_head_tensors(files, saved)
    return LoadedParts(causal_lm, saved, head_tensors, head_source)


def _fill_head(model: MTPModel, head: int, parts: LoadedParts) -> None:
    found = parts.head_tensors(head)
    targets = model.extra_heads[head - 1].state_dict()

    def prefixed(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {f"heads.{head}.{name}": shape for name, shape in shapes_of(tensors).items()}

    check_tensors(parts.head_source, prefixed(targets), prefixed(found))
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(found[name])
