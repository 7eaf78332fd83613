"""Writing models that other programs load: after training, and by `wmtp export`.

An export appears whole or not at all. It never says where on this machine anything came from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers.utils.logging import disable_progress_bar

from wmtp import __version__
from wmtp.components.tokenizer import HfTokenizer
from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.export import convert_dtype
from wmtp.modeling.formats.meta_native_write import write_native
from wmtp.modeling.formats.sources import WMTP_FILE, read_json
from wmtp.modeling.lora import merge_lora
from wmtp.pipelines.environment import RunPaths
from wmtp.pipelines.export_source import (
    RUN_TOKENIZER,
    TOKENIZER_MODEL,
    ExportSource,
    ReadModel,
    read_source,
)
from wmtp.pipelines.provenance import describe_run
from wmtp.reporting.model_card import ModelCard, render_model_card
from wmtp.settings import Config, Recipe
from wmtp.storage import PathResolver, publish_directory
from wmtp.storage.atomic import MANIFEST_NAME

if TYPE_CHECKING:
    from wmtp.pipelines.training import RunParts

ExportFormat = Literal["hf", "meta"]
ExportDtype = Literal["auto", "fp32", "bf16", "fp16"]
CARD_FILE = "README.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A folder with one of these is a model, so `force` may replace it; any other folder it leaves alone.
_MODEL_FILES = ("config.json", "params.json", WMTP_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How a model is written.

    Attributes:
        format: `hf`, a Hugging Face folder, or `meta`, Meta's native layout for multi-token prediction.
        dtype: precision of the weights; `auto` keeps the one the checkpoint is stored in.
        horizon: write the first so many heads only; None writes all.
        force: replace a model that is already at the place.
        trust_remote_code: let the model run code that comes with it.

    Raises:
        UserInputError: with every value that cannot be used.
    """

    format: ExportFormat = "hf"
    dtype: ExportDtype = "auto"
    horizon: int | None = None
    force: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.format not in get_args(ExportFormat):
            problems.append(f"unknown format {self.format!r}: choose {' or '.join(get_args(ExportFormat))}")
        if self.dtype not in get_args(ExportDtype):
            problems.append(f"unknown dtype {self.dtype!r}: choose one of {', '.join(get_args(ExportDtype))}")
        if self.horizon is not None and self.horizon < 1:
            problems.append(f"horizon is {self.horizon}: choose at least 1 (the next-token model alone)")
        if problems:
            raise UserInputError("; ".join(problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOutputs:
    """What an export wrote.

    Attributes:
        folder: where it is.
        source: the checkpoint it was made from.
        format: its layout.
        dtype: precision of its weights.
        head: form of heads 1..H-1.
        offsets: distance in tokens each head predicts; one number a head.
        num_parameters: of model and heads.
        files: file name -> size in bytes.
        notes: what the user should know, with what to do about it.
    """

    folder: Path
    source: str
    format: ExportFormat
    dtype: str
    head: str
    offsets: tuple[int, ...]
    num_parameters: int
    files: dict[str, int]
    notes: list[str]


def run_export_pipeline(
    checkpoint: str, output: str | Path, *, options: ExportOptions | None = None
) -> ExportOutputs:
    """Write a run folder, a `step-N` folder, an export or any model as a model folder of its own.

    Args:
        checkpoint: what to export; a run folder means its finished model, or its newest checkpoint.
        output: the folder to write; must not exist, or be empty, unless `options.force`.
        options: format, precision, heads.

    Raises:
        UserInputError: an output that cannot be written, or heads that the checkpoint does not have.
        CheckpointError: there is no checkpoint.
        ModelLoadError: a checkpoint that cannot be read, or cannot be written in this format or precision.
    """
    options = options or ExportOptions()
    # The progress bars of transformers say what the summary says.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    # 1. Where to, before anything large is read.
    folder = _local_folder(output)
    source = read_source(checkpoint, trust_remote_code=options.trust_remote_code)
    _check_output(folder, source, force=options.force)

    # 2. The model in the precision it is to be written in, with the heads that are wanted.
    loaded = source.load(None if options.dtype == "auto" else DTYPES[options.dtype])
    model = loaded.model
    if options.horizon is not None:
        _keep_heads(model, options.horizon, checkpoint)
    merge_lora(model)
    convert_dtype(model, loaded.dtype)

    # 3. Written beside its place, then renamed.
    metadata = source.metadata()
    try:
        with publish_directory(folder, replace=folder.exists()) as staging:
            if options.format == "hf":
                _write_hugging_face(
                    staging, model, tokenizer=loaded.tokenizer, metadata=metadata, title=folder.name
                )
            else:
                _write_native(staging, model, loaded.tokenizer, metadata, folder.name)
    except OSError as error:
        raise UserInputError(
            f"{folder} cannot be written: {error}", remedy="check the permissions and the free space there"
        ) from error
    return ExportOutputs(
        folder=folder,
        source=source.path,
        format=options.format,
        dtype=_dtype_name(model.dtype),
        head=model.head_form,
        offsets=model.offsets,
        num_parameters=model.num_parameters,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        notes=_notes(loaded, options),
    )


def export_model(
    config: Config, recipe: Recipe, parts: RunParts, paths: RunPaths, metrics: Mapping[str, float]
) -> None:
    """Publish `models/<run>/final`: model, heads, tokenizer, model card, and how it was made.

    An older one of the same run is replaced.
    """
    metadata = {**describe_run(config, recipe, parts.base_path), "metrics": dict(metrics)}
    with publish_directory(paths.export, replace=True) as staging:
        _write_hugging_face(
            staging, parts.model, tokenizer=parts.tokenizer, metadata=metadata, title=paths.name
        )


def export_state(
    config: Config, recipe: Recipe, parts: RunParts, paths: RunPaths, *, is_new: bool
) -> dict[str, Any]:
    """What a training checkpoint has to say so that it can be exported without config and recipe; JSON.

    The tokenizer is written to `models/<run>/tokenizer` once, by the run that is new; a `step-N` folder that
    is moved away from it falls back on the path the tokenizer was read from.
    """
    folder = paths.checkpoints / RUN_TOKENIZER
    if is_new or not folder.exists():
        with publish_directory(folder, replace=True) as staging:
            parts.tokenizer.save(staging)
    lora = recipe.model.lora
    generation_config = parts.model.causal_lm.generation_config
    return {
        "metadata": describe_run(config, recipe, parts.base_path),
        "base": parts.base_path,
        "lora": None if lora is None else lora.model_dump(mode="json"),
        "generation_config": {} if generation_config is None else generation_config.to_diff_dict(),
        "tokenizer": recipe.model.tokenizer.path or parts.base_path,
    }


def record_results(paths: RunPaths, model: MTPModel, metrics: Mapping[str, float]) -> None:
    """Put what was measured after training into `wmtp.json` and the model card of `models/<run>/final`.

    The weights are not written again; the folder is replaced as a whole, as by any export.
    """
    description = read_json(paths.export / WMTP_FILE)
    description["metadata"]["metrics"] = dict(metrics)
    with publish_directory(paths.export, replace=True) as staging:
        for file in paths.export.iterdir():
            if file.name not in (MANIFEST_NAME, WMTP_FILE, CARD_FILE):
                _link_or_copy(file, staging / file.name)
        _write_json(staging / WMTP_FILE, description)
        _write_card(staging, model, description["metadata"], "hf", paths.name)


def _write_hugging_face(
    folder: Path,
    model: MTPModel,
    *,
    tokenizer: HfTokenizer | None,
    metadata: Mapping[str, Any],
    title: str,
) -> None:
    hugging_face = None if tokenizer is None else tokenizer.tokenizer
    model.save_pretrained(folder, tokenizer=hugging_face, metadata=metadata)
    if tokenizer is not None:
        tokenizer.save_sentencepiece_model(folder)
    _write_card(folder, model, metadata, "hf", title)


def _write_native(
    folder: Path, model: MTPModel, tokenizer: HfTokenizer | None, metadata: Mapping[str, Any], title: str
) -> None:
    write_native(model, folder, dtype=model.dtype)
    if tokenizer is not None:
        tokenizer.save_sentencepiece_model(folder)
    _write_card(folder, model, metadata, "meta", title)


def _write_card(
    folder: Path, model: MTPModel, metadata: Mapping[str, Any], layout: ExportFormat, title: str
) -> None:
    card = ModelCard(
        title=title,
        layout=layout,
        dtype=_dtype_name(model.dtype),
        num_parameters=model.num_parameters,
        head=model.head_form,
        offsets=model.offsets,
        base=metadata.get("base"),
        base_model=metadata.get("base_model"),
        algorithm=metadata.get("algorithm"),
        data=metadata.get("data", ()),
        datasets=metadata.get("datasets", ()),
        steps=metadata.get("steps"),
        recipe=metadata.get("recipe", {}),
        metrics=metadata.get("metrics", {}),
        version=__version__,
    )
    (folder / CARD_FILE).write_text(render_model_card(card), encoding="utf-8")


def _local_folder(output: str | Path) -> Path:
    kind, resolved = PathResolver().resolve(output)
    if kind == "hub":
        # `exports/mine` has the form of a hub id, but an export is written to this machine.
        return Path(os.path.abspath(output))
    if kind != "local":
        raise UserInputError(
            f"output {output} is not a local folder", remedy="give a local folder and copy it from there"
        )
    return Path(resolved)


def _check_output(folder: Path, source: ExportSource, *, force: bool) -> None:
    """Refuse a place that would harm what is there: the source, or files of somebody else."""
    if source.directory is not None:
        place, taken = folder.resolve(), source.directory.resolve()
        if place == taken or place in taken.parents or taken in place.parents:
            raise UserInputError(
                f"output {folder} and the checkpoint {source.directory} lie in each other",
                remedy="choose a folder beside the checkpoint",
            )
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserInputError(f"output {folder} is a file", remedy="give a folder that does not exist yet")
    if not any(folder.iterdir()):
        return
    if not force:
        raise UserInputError(
            f"output {folder} exists already and is not empty",
            remedy="choose another folder, or replace this one with --force",
        )
    if not any((folder / name).is_file() for name in _MODEL_FILES):
        raise UserInputError(
            f"output {folder} holds no model, so --force does not replace it",
            remedy="choose another folder, or remove this one yourself",
        )


def _keep_heads(model: MTPModel, horizon: int, checkpoint: str) -> None:
    if horizon > model.horizon:
        raise UserInputError(
            f"{checkpoint} has {model.horizon} heads, {horizon} were asked for",
            remedy=f"choose a horizon of at most {model.horizon}; training adds heads (model.mtp.horizon)",
        )
    model.offsets = model.offsets[:horizon]
    model.extra_heads = model.extra_heads[: horizon - 1]


def _notes(loaded: ReadModel, options: ExportOptions) -> list[str]:
    tokenizer = loaded.tokenizer
    if options.format == "meta" and (tokenizer is None or tokenizer.sentencepiece_model is None):
        return [f"the checkpoint has no {TOKENIZER_MODEL}; put the SentencePiece file beside the weights"]
    if options.format == "hf" and tokenizer is None:
        return ["the checkpoint has no tokenizer; save one into the folder with tokenizer.save_pretrained"]
    return []


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # A file system without hard links.
        shutil.copyfile(source, target)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))
