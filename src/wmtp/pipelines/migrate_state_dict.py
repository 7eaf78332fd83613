"""Models out of torch files with a state dict: old `.pt` checkpoints, which do not say what model they are.

The configuration comes from a base model; the tensors are put in their places by name. Wrappers leave their
marks in names (`module.` of DDP, `_orig_mod.` of torch.compile, FSDP's), and the model may stand behind a
prefix; both are taken off. What is left over, or missing, is an error that names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmtp.components.loader.sources import open_source
from wmtp.components.tokenizer import HfTokenizer
from wmtp.exceptions import ModelLoadError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.configuration import causal_lm_class, text_config
from wmtp.modeling.formats.hugging_face import fill_model
from wmtp.modeling.formats.kinds import PARAMS_FILE, ModelKind
from wmtp.modeling.formats.load import assemble
from wmtp.modeling.formats.meta_native import read_native
from wmtp.modeling.formats.parts import LoadedParts
from wmtp.modeling.formats.sources import LocalSource, ModelSource, read_source_json
from wmtp.modeling.formats.tensors import (
    StoredTensor,
    StoredTensors,
    check_tensors,
    shapes_of,
    stored_in_torch,
)
from wmtp.modeling.formats.torch_files import load_torch_file
from wmtp.modeling.heads import HeadForm, HeadRequest, SavedHeads
from wmtp.modeling.state_dict import tied_names
from wmtp.pipelines.environment import Environment
from wmtp.pipelines.meta_models import ModelDescription, describe_causal_lm
from wmtp.pipelines.models import load_tokenizer
from wmtp.pipelines.outputs import RunOptions
from wmtp.settings import Config, Recipe, require_model
from wmtp.storage import PathResolver, create_s3_manager

STATE_DICT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Where trainers put the state dict among the rest, in the order of search.
_MODEL_ENTRIES = ("model", "model_state_dict", "state_dict", "module", "model_state", "weights")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_HEADS = "extra_heads."
_TRUNK = "causal_lm."
_NATIVE_EMBEDDING = "tok_embeddings.weight"
# Buffers that older versions of transformers saved, and that are made anew.
_BUFFERS = ("inv_freq", "masked_bias")


@dataclass(frozen=True, slots=True)
class StateDictFile:
    """A torch file with a state dict.

    Attributes:
        file: its path or address.
        source: the folder it is in.
        tensors: by name, wrappers taken off.
        left_out: entries of the file beside the state dict, such as `optimizer`.
    """

    file: str
    source: ModelSource
    tensors: StoredTensors
    left_out: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point format of most of its numbers."""
        sizes: Counter[torch.dtype] = Counter()
        for stored in self.tensors.stored().values():
            if stored.dtype.is_floating_point:
                sizes[stored.dtype] += torch.Size(stored.shape).numel()
        return sizes.most_common(1)[0][0] if sizes else torch.float32


def is_state_dict_file(path: str) -> bool:
    """Whether a path names a single torch file, by its form and what lies there."""
    kind, resolved = PathResolver().resolve(path)
    if not resolved.lower().endswith(STATE_DICT_SUFFIXES):
        return False
    return kind == "s3" or (kind == "local" and Path(resolved).is_file())


def read_state_dict_file(path: str, config: Config) -> StateDictFile:
    """Open a torch file, local or on S3; it may hold a state dict or one among other things.

    Raises:
        ModelLoadError: it is missing, damaged, would run code, or holds no state dict.
        StorageError: S3 does not give it.
    """
    kind, resolved = PathResolver().resolve(path)
    folder, _, name = resolved.rpartition("/")
    source: ModelSource
    if kind == "s3":
        source = create_s3_manager(config).folder(folder)
    elif kind == "local" and Path(resolved).is_file():
        source = LocalSource(Path(resolved).parent, name)
    else:
        raise ModelLoadError(f"{path} is not a file", remedy="give the .pt file of an old checkpoint")
    file = f"{source}/{name}"
    try:
        loaded = load_torch_file(source, name)
    except ModelLoadError as error:
        if "which is code" not in error.message:
            raise
        raise ModelLoadError(
            error.message,
            remedy="where the file was made, load it and save the numbers alone: "
            "torch.save(model.state_dict(), 'weights.pt')",
        ) from error
    found, left_out = _find_state_dict(file, loaded)
    stored: dict[str, StoredTensor] = {}
    for original, value in found.items():
        tensor = stored_in_torch(file, original, value)
        cleaned = _without_wrappers(original)
        if cleaned in stored:
            raise ModelLoadError(
                f"{file} has two tensors that both mean {cleaned!r}", remedy="save the state dict again"
            )
        stored[cleaned] = replace(tensor, name=cleaned)
    return StateDictFile(file, source, StoredTensors(stored.values()), left_out)


def load_state_dict_file(
    path: str,
    base: str,
    config: Config,
    *,
    request: HeadRequest | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> MTPModel:
    """Load the model of a torch file; arguments and errors as for the two functions it is made of.

    Args:
        path: the file, local or on S3.
        base: a model of the same architecture and size, for its configuration.
        config: access to S3.
        request: the heads that are wanted; None takes those of the file.
        dtype: of the parameters; None takes the file's.
        trust_remote_code: let the base's configuration run code that comes with it.
    """
    saved = read_state_dict_file(path, config)
    parts = read_state_dict_parts(
        saved, base, config, dtype=dtype or saved.dtype, trust_remote_code=trust_remote_code
    )
    return assemble(MTPModel, parts, request or HeadRequest(horizon=None), saved.file)


def read_state_dict_parts(
    saved: StateDictFile,
    base: str,
    config: Config,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> LoadedParts:
    """Put the tensors of a state dict into a model of the base's configuration.

    Args:
        saved: from `read_state_dict_file`.
        base: the model it was trained from, or any of the same architecture and size; no weight of it is
            used.
        config: access to S3.
        dtype: of the parameters.
        trust_remote_code: let the base's configuration run code that comes with it.

    Raises:
        ModelLoadError: a tensor is missing, misshapen, or of no part of the model; the message names it.
    """
    described = describe_causal_lm(config, base, trust_remote_code=trust_remote_code)
    if _NATIVE_EMBEDDING in saved.tensors:
        return _native_parts(saved, described, base, config, dtype)
    model_class = causal_lm_class(described.config, base)
    with torch.device("meta"):
        skeleton: Any = model_class(text_config(described.config, model_class))
    embedding = skeleton.get_input_embeddings().weight
    anchor = next(name for name, parameter in skeleton.named_parameters() if parameter is embedding)
    wanted = shapes_of(skeleton.state_dict())
    prefix = _prefix(saved, anchor, base)
    outer = prefix.removesuffix(_TRUNK)
    own: dict[str, StoredTensor] = {}
    heads: dict[int, dict[str, StoredTensor]] = {}
    unknown = []
    for name, stored in saved.tensors.stored().items():
        if name.startswith(f"{outer}{_HEADS}"):
            number, _, rest = name.removeprefix(f"{outer}{_HEADS}").partition(".")
            heads.setdefault(int(number) if number.isdecimal() else -1, {})[rest] = stored
            continue
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and inner in wanted:
            own[inner] = replace(stored, name=inner)
        elif not _is_buffer(name, stored):
            unknown.append(name)
    if unknown:
        raise ModelLoadError(
            f"{saved.file} has the tensor {unknown[0]!r}{_more(unknown)}, which a model like {base} does not",
            remedy="give the base model it was trained from; adapters (LoRA) must be merged first",
        )
    stands_for = {second: first for second, first in tied_names(skeleton).items() if second not in own}
    shapes = {name: stored.shape for name, stored in own.items()}
    check_tensors(saved.file, {name: wanted[name] for name in wanted if name not in stands_for}, shapes)
    causal_lm = fill_model(
        model_class, described.config, StoredTensors(own.values()), saved.source, dtype=dtype
    )
    form, offsets = _describe_heads(saved.file, heads)

    def head_tensors(head: int) -> Mapping[str, Tensor]:
        return {name: stored[...] for name, stored in heads[head - 1].items()}

    return LoadedParts(causal_lm, SavedHeads(form, offsets), head_tensors, saved.file)


def load_located_state_dict(
    config: Config, recipe: Recipe, environment: Environment, path: str, options: RunOptions
) -> tuple[MTPModel, HfTokenizer]:
    """Load a torch file as an evaluation does: with the recipe's base, tokenizer and horizon, in fp32.

    Raises:
        ModelLoadError, UserInputError: as for `load_state_dict_file`; the recipe names no base.
    """
    base, trust = require_model(config, recipe, "base").path, options.trust_remote_code
    mtp = recipe.model.mtp
    model = load_state_dict_file(
        path,
        base,
        config,
        request=HeadRequest(horizon=mtp.horizon, adapter=mtp.adapter),
        dtype=torch.float32,
        trust_remote_code=trust,
    )
    return model.to(environment.device), load_tokenizer(config, recipe, base, trust_remote_code=trust)


def _find_state_dict(file: str, loaded: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The state dict in what a file holds, and the names of what is beside it."""
    if not isinstance(loaded, dict) or not loaded:
        raise ModelLoadError(
            f"{file} holds {type(loaded).__name__ if loaded else 'nothing'}, not tensors by name",
            remedy="give a file that was saved from model.state_dict()",
        )
    if any(isinstance(value, Tensor) for value in loaded.values()):
        return _only_tensors(file, loaded), ()
    for entry in _MODEL_ENTRIES:
        inner = loaded.get(entry)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            others = tuple(str(name) for name in loaded if name != entry)
            return _only_tensors(file, inner), others
    raise ModelLoadError(
        f"{file} holds no state dict: its entries are {_listed(map(str, loaded))}",
        remedy=f"the state dict is looked for at the top and under {_listed(_MODEL_ENTRIES)}",
    )


def _only_tensors(file: str, entries: dict[Any, Any]) -> dict[str, Any]:
    other = next((name for name, value in entries.items() if not isinstance(value, Tensor)), None)
    if other is not None and not str(other).endswith("_extra_state"):
        raise ModelLoadError(
            f"{file}: the entry {other!r} is {type(entries[other]).__name__}, not a tensor",
            remedy="save the state dict again with its tensors alone",
        )
    return {name: value for name, value in entries.items() if isinstance(value, Tensor)}


def _without_wrappers(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _prefix(saved: StateDictFile, anchor: str, base: str) -> str:
    """What stands before the names of the next-token model, told by the name of its embedding."""
    found = [
        name.removesuffix(anchor)
        for name in saved.tensors
        if (name == anchor or name.endswith(f".{anchor}")) and _HEADS not in name
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelLoadError(
            f"{saved.file} holds {len(found)} models: {_listed(f'{prefix}{anchor}' for prefix in found)}",
            remedy="save the state dict of the trained model alone",
        )
    raise ModelLoadError(
        f"{saved.file} has no tensor {anchor!r}, which {base} calls its embedding; it has "
        f"{_listed(saved.tensors)}",
        remedy="give the base model it was trained from",
    )


def _is_buffer(name: str, stored: StoredTensor) -> bool:
    leaf = name.rpartition(".")[2]
    is_mask = leaf == "bias" and stored.dtype in (torch.bool, torch.uint8)
    return leaf in _BUFFERS or is_mask


def _describe_heads(
    file: str, heads: Mapping[int, Mapping[str, StoredTensor]]
) -> tuple[HeadForm, tuple[int, ...]]:
    """Form and offsets of the heads, by the names of their tensors."""
    if not heads:
        return "transformer", (1,)
    if sorted(heads) != list(range(len(heads))):
        raise ModelLoadError(
            f"{file} has the heads {_listed(f'{_HEADS}{number}' for number in sorted(heads))}, which are not "
            "numbered from 0 without a gap",
            remedy="the file is incomplete; save it again",
        )
    names = set(heads[0])
    form: HeadForm
    if any(name.startswith("projection.") for name in names):
        form = "sequential"
    elif any(name.startswith("layer.") for name in names):
        form = "transformer"
    elif names == {"map.weight", "map.bias"}:
        form = "medusa"
    elif names == {"map.weight"}:
        form = "linear"
    else:
        raise ModelLoadError(
            f"{file}: heads with the tensors {_listed(sorted(names))} are of no form that is known",
            remedy="the forms are transformer, linear, medusa and sequential",
        )
    return form, tuple(range(1, len(heads) + 2))


def _native_parts(
    saved: StateDictFile, described: ModelDescription, base: str, config: Config, dtype: torch.dtype
) -> LoadedParts:
    if described.kind is not ModelKind.META_NATIVE:
        raise ModelLoadError(
            f"{saved.file} has the names of Meta's native layout ({_NATIVE_EMBEDDING}), and {base} is not a "
            "native model",
            remedy="give a base folder with the params.json of this model",
        )
    source = open_source(config, base)
    return read_native(
        read_source_json(source, PARAMS_FILE),
        saved.tensors,
        dtype=dtype,
        params_source=f"{source}/{PARAMS_FILE}",
        weights_source=saved.file,
    )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _listed(names: Iterable[str], limit: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
