"""One way in for every kind of model: look at the files, read them, give the model its heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.export import read_saved_heads, saved_head_tensors
from wmtp.modeling.formats.hugging_face import load_causal_lm
from wmtp.modeling.formats.kinds import PARAMS_FILE, ModelKind, detect_causal_lm, native_weights
from wmtp.modeling.formats.meta_native import read_native
from wmtp.modeling.formats.parts import LoadedParts
from wmtp.modeling.formats.sources import ModelSource, locate_source, read_source_json
from wmtp.modeling.formats.tensors import check_tensors, open_tensors, shapes_of
from wmtp.modeling.heads import HeadRequest, plan_heads

if TYPE_CHECKING:
    from wmtp.modeling.mtp_model import MTPModel

ModelT = TypeVar("ModelT", bound="MTPModel")


def load_mtp_model(
    model_class: type[ModelT],
    path: str | Path | ModelSource,
    request: HeadRequest,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> ModelT:
    """Load a model; arguments and errors as for `MTPModel.from_pretrained`, and `path` may be a source."""
    source = locate_source(path) if isinstance(path, str | Path) else path
    parts = read_parts(source, detect_causal_lm(source), dtype=dtype, trust_remote_code=trust_remote_code)
    return assemble(model_class, parts, request, str(source))


def read_parts(
    source: ModelSource, kind: ModelKind, *, dtype: torch.dtype, trust_remote_code: bool
) -> LoadedParts:
    """Read a model of a known kind.

    Raises:
        ModelLoadError: files missing, unreadable or not fitting; or a training checkpoint, which is more
            than a model.
    """
    match kind:
        case ModelKind.HUGGING_FACE | ModelKind.WMTP_EXPORT:
            causal_lm = load_causal_lm(source, dtype=dtype, trust_remote_code=trust_remote_code)
            saved = read_saved_heads(source)
            return LoadedParts(causal_lm, saved, *saved_head_tensors(source, saved))
        case ModelKind.META_NATIVE:
            weights = native_weights(source)
            return read_native(
                read_source_json(source, PARAMS_FILE),
                open_tensors(source, weights),
                dtype=dtype,
                params_source=f"{source}/{PARAMS_FILE}",
                weights_source=f"{source}/{weights}",
            )
        case _:
            raise ModelLoadError(
                f"{source} is {kind.description}, which is more than a model",
                remedy="write the model it holds with `wmtp export`, or use its `final` folder",
            )


def assemble(model_class: type[ModelT], parts: LoadedParts, request: HeadRequest, source: str) -> ModelT:
    """Give what was read the heads that are wanted; `source` names the checkpoint in messages.

    Raises:
        ModelLoadError: a tensor of a head is missing, misshapen or unknown.
        UserInputError: heads that cannot be had from this checkpoint.
    """
    plan = plan_heads(request, parts.heads, source)
    model = model_class(parts.causal_lm, form=plan.form, offsets=plan.offsets)
    for head in range(1, plan.num_saved):
        _fill_head(model, head, parts)
    return model


def _fill_head(model: MTPModel, head: int, parts: LoadedParts) -> None:
    found = parts.head_tensors(head)
    targets = model.extra_heads[head - 1].state_dict()

    def prefixed(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {f"heads.{head}.{name}": shape for name, shape in shapes_of(tensors).items()}

    check_tensors(parts.head_source, prefixed(targets), prefixed(found))
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(found[name])
