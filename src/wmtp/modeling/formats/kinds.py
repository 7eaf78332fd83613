"""Which kind of model lies in a folder, told by its files and never by its name."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.sources import (
    CONFIG_FILE,
    TORCH_SUFFIXES,
    WMTP_FILE,
    ModelSource,
    read_source_json,
)
from wmtp.modeling.formats.tensors import (
    INDEX_FILES,
    SINGLE_FILES,
    open_tensors,
    read_shard_index,
)

PARAMS_FILE = "params.json"
STARLING_HEAD = "v_head.weight"
_NATIVE_WEIGHTS = re.compile(r"consolidated(\.\d+)?\.pth")
_STEP_FOLDER = re.compile(r"step-\d+")
_STEP_FILES = frozenset({"manifest.json", "state.json", "index.json"})
# Written by trainers beside the weights of a model; no model.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")


class ModelKind(StrEnum):
    """The kinds of models on disk."""

    HUGGING_FACE = "hugging_face"
    META_NATIVE = "meta_native"
    WMTP_EXPORT = "wmtp_export"
    WMTP_CHECKPOINT = "wmtp_checkpoint"
    STARLING_REWARD = "starling_reward"
    SEQUENCE_CLASSIFICATION = "sequence_classification"

    @property
    def description(self) -> str:
        """What messages call it."""
        return _DESCRIPTIONS[self]


CAUSAL_KINDS: Final = frozenset(
    {ModelKind.HUGGING_FACE, ModelKind.META_NATIVE, ModelKind.WMTP_EXPORT, ModelKind.WMTP_CHECKPOINT}
)
REWARD_KINDS: Final = frozenset({ModelKind.STARLING_REWARD, ModelKind.SEQUENCE_CLASSIFICATION})

_DESCRIPTIONS = {
    ModelKind.HUGGING_FACE: "a Hugging Face model",
    ModelKind.META_NATIVE: "a native model of Meta's",
    ModelKind.WMTP_EXPORT: "an export of this program",
    ModelKind.WMTP_CHECKPOINT: "a training checkpoint of this program",
    ModelKind.STARLING_REWARD: "a reward model in the layout of Starling-RM",
    ModelKind.SEQUENCE_CLASSIFICATION: "a reward model (sequence classification)",
}
_NEEDS = {
    ModelKind.HUGGING_FACE: f"{CONFIG_FILE} and {', '.join(SINGLE_FILES + INDEX_FILES)}",
    ModelKind.META_NATIVE: f"{PARAMS_FILE} and consolidated.pth",
    ModelKind.WMTP_EXPORT: f"the files of a Hugging Face model and {WMTP_FILE}",
    ModelKind.WMTP_CHECKPOINT: f"{', '.join(sorted(_STEP_FILES))}, or step-N folders that have them",
    ModelKind.STARLING_REWARD: f"one torch file ({' '.join(TORCH_SUFFIXES)}) with the tensor {STARLING_HEAD}",
    ModelKind.SEQUENCE_CLASSIFICATION: "the files of a Hugging Face model of the architecture "
    "...ForSequenceClassification",
}


def detect_kind(source: ModelSource) -> ModelKind:
    """Tell what kind of model a folder holds.

    Raises:
        ModelLoadError: nothing that is known, or two kinds at once; the message lists what is there and what
            each kind needs. Also a file that has to be looked into and cannot be read.
    """
    names = source.names()
    found = []
    if CONFIG_FILE in names:
        kind = _kind_by_description(source, names)
        is_starling = kind is ModelKind.HUGGING_FACE and _has_starling_head(source, names)
        found.append(ModelKind.STARLING_REWARD if is_starling else kind)
    if PARAMS_FILE in names and _has_native_weights(names):
        found.append(ModelKind.META_NATIVE)
    # In an object store the files of a step lie one level deeper, and its manifest names them.
    is_remote_step = "manifest.json" in names and _STEP_FOLDER.fullmatch(str(source).rpartition("/")[2])
    if names >= _STEP_FILES or is_remote_step or any(map(_STEP_FOLDER.fullmatch, source.subfolders())):
        found.append(ModelKind.WMTP_CHECKPOINT)
    if not found and _has_starling_head(source, names):
        found.append(ModelKind.STARLING_REWARD)
    if len(found) == 1:
        return found[0]
    if found:
        raise _two_models(source, found)
    raise _nothing_found(source, names)


def detect_described_kind(source: ModelSource) -> ModelKind:
    """Tell the kind by the files that describe a model; its weights need not be there, and are not read.

    A reward model in the layout of Starling-RM is told by its weights alone: with a configuration it is
    described as any Hugging Face model.

    Raises:
        ModelLoadError: no description, or two at once.
    """
    names = source.names()
    has_config = CONFIG_FILE in names
    # Some Hugging Face models have a params.json besides, of the same weights in another layout.
    is_native = PARAMS_FILE in names and (not has_config or _has_native_weights(names))
    if has_config and is_native:
        raise _two_models(source, [_kind_by_description(source, names), ModelKind.META_NATIVE])
    if is_native:
        return ModelKind.META_NATIVE
    if not has_config:
        listed = _shown([*sorted(names), *(f"{folder}/" for folder in source.subfolders())])
        raise ModelLoadError(
            f"{source} has neither {CONFIG_FILE} nor {PARAMS_FILE} (it holds: {listed})",
            remedy="give a model's directory or hub id; a folder of a repository is org/name:folder",
        )
    return _kind_by_description(source, names)


def detect_causal_lm(source: ModelSource) -> ModelKind:
    """Tell what kind of causal language model a folder holds.

    Raises:
        ModelLoadError: as `detect_kind`, or it is a reward model.
    """
    kind = detect_kind(source)
    if kind not in CAUSAL_KINDS:
        raise ModelLoadError(
            f"{source} is {kind.description}, not a causal language model",
            remedy="give a language model here; reward models go to paths.models.rm",
        )
    return kind


def detect_reward_model(source: ModelSource) -> ModelKind:
    """Tell what kind of reward model a folder holds.

    Raises:
        ModelLoadError: as `detect_kind`, or it is no reward model.
    """
    kind = detect_kind(source)
    if kind not in REWARD_KINDS:
        raise ModelLoadError(
            f"{source} is {kind.description}, not a reward model: it has no reward head",
            remedy=f"a reward model has {_NEEDS[ModelKind.STARLING_REWARD]}, or is of the architecture "
            "...ForSequenceClassification with one label",
        )
    return kind


def native_weights(source: ModelSource) -> str:
    """Return the name of the weights file of a native model.

    Raises:
        ModelLoadError: there are several: slices for as many devices, which are not put together.
    """
    files = sorted(name for name in source.names() if _NATIVE_WEIGHTS.fullmatch(name))
    if len(files) != 1:
        raise ModelLoadError(
            f"{source} has {len(files)} weights files ({_shown(files)}); a native model is read from one",
            remedy="use a model that is not sliced for several devices",
        )
    return files[0]


def lone_torch_file(names: frozenset[str]) -> str | None:
    """Return the one torch file of a folder that can be a model; None where there are none or several."""
    files = [name for name in names if name.endswith(TORCH_SUFFIXES) and name not in _NOT_WEIGHTS]
    return files[0] if len(files) == 1 else None


def _has_native_weights(names: frozenset[str]) -> bool:
    return any(_NATIVE_WEIGHTS.fullmatch(name) for name in names)


def _kind_by_description(source: ModelSource, names: frozenset[str]) -> ModelKind:
    """The kind of a folder with a config.json, by that file."""
    if WMTP_FILE in names:
        return ModelKind.WMTP_EXPORT
    architectures = read_source_json(source, CONFIG_FILE).get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return ModelKind.SEQUENCE_CLASSIFICATION
    return ModelKind.HUGGING_FACE


def _has_starling_head(source: ModelSource, names: frozenset[str]) -> bool:
    if INDEX_FILES[1] in names:
        return STARLING_HEAD in read_shard_index(source, INDEX_FILES[1])
    if any(name.endswith(".safetensors") for name in names):
        return False
    file = lone_torch_file(names)
    return file is not None and STARLING_HEAD in open_tensors(source, file)


def _two_models(source: ModelSource, found: list[ModelKind]) -> ModelLoadError:
    both = " and ".join(f"{kind.description} ({_NEEDS[kind]})" for kind in found)
    return ModelLoadError(
        f"{source} holds two models: {both}; its files are {_shown(sorted(source.names()))}",
        remedy="give each model a folder of its own",
    )


def _nothing_found(source: ModelSource, names: frozenset[str]) -> ModelLoadError:
    folders = source.subfolders()
    listed = [*sorted(names), *(f"{folder}/" for folder in folders)]
    lone = lone_torch_file(names)
    if lone is not None:
        listed[listed.index(lone)] = f"{lone}, which has no tensor {STARLING_HEAD!r}"
    needs = "".join(f"\n  {kind.description} needs {_NEEDS[kind]}" for kind in ModelKind)
    remedy = "give a model's directory, or a hub id"
    if folders:
        remedy += f"; or did you mean one of its folders ({_shown(folders)})?"
    return ModelLoadError(
        f"{source} is no model that is known here (it holds: {_shown(listed)}){needs}", remedy=remedy
    )


def _shown(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
