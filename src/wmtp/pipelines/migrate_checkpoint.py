"""Old `.pt` checkpoints turned into model folders that everything here, and plain transformers, loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from wmtp import __version__
from wmtp.components.loader.sources import open_source
from wmtp.components.tokenizer import HfTokenizer, RawTokenizer
from wmtp.components.tokenizer.hf import TokenizerSettings
from wmtp.exceptions import UserInputError, WmtpError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.load import assemble
from wmtp.modeling.formats.sources import WMTP_FILE
from wmtp.modeling.heads import HeadRequest
from wmtp.pipelines.migrate_state_dict import read_state_dict_file, read_state_dict_parts
from wmtp.pipelines.provenance import hub_id, public_name
from wmtp.settings import Config
from wmtp.storage import PathResolver, publish_directory

_HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedCheckpoint:
    """What was made of an old checkpoint.

    Attributes:
        source: the old file.
        folder: the model folder.
        base: the model whose configuration and tokenizer were taken.
        num_parameters: of model and heads.
        dtype: precision of the weights, the old file's.
        head: form of heads 1..H-1.
        horizon: number of heads.
        left_out: entries of the old file that are no part of the model, such as `optimizer`.
        notes: what the user should know.
    """

    source: str
    folder: Path
    base: str
    num_parameters: int
    dtype: str
    head: str
    horizon: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def convert_state_dict_file(
    path: str,
    base: str,
    output: str | Path,
    *,
    config: Config | None = None,
    force: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
) -> ConvertedCheckpoint:
    """Write a torch file that holds a state dict as a model folder, as `wmtp export` writes them.

    Args:
        path: the old file, local or on S3; a state dict, or a checkpoint with one under `model` or the like.
        base: the model it was trained from: a directory, a hub id, a built-in name, or `s3://...`.
        output: the folder to write.
        config: access to S3.
        force: replace a model that is in the output folder.
        dry_run: read and check everything, write nothing.
        trust_remote_code: let the base's configuration and tokenizer run code that comes with them.

    Raises:
        ModelLoadError: the file would run code, is damaged, or does not fit the base; the message names the
            file and the tensor.
        UserInputError: an output that cannot be written.
    """
    config = config or Config()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = _output_folder(output, force=force)
    saved = read_state_dict_file(path, config)
    parts = read_state_dict_parts(saved, base, config, dtype=saved.dtype, trust_remote_code=trust_remote_code)
    model = assemble(MTPModel, parts, HeadRequest(horizon=None), saved.file)
    tokenizer, notes = _tokenizer(base, config, trust_remote_code=trust_remote_code)
    metadata = {
        "wmtp_version": __version__,
        "base": public_name(base),
        "base_model": hub_id(base),
        "converted_from": public_name(path),
    }
    try:
        if not dry_run:
            _write(model, folder, tokenizer, metadata)
    except OSError as error:
        raise UserInputError(
            f"{folder} cannot be written: {error}", remedy="check the permissions and the free space there"
        ) from error
    return ConvertedCheckpoint(
        source=saved.file,
        folder=folder,
        base=base,
        num_parameters=model.num_parameters,
        dtype=str(saved.dtype).removeprefix("torch."),
        head=model.head_form,
        horizon=model.horizon,
        left_out=saved.left_out,
        notes=notes,
    )


def _write(model: MTPModel, folder: Path, tokenizer: HfTokenizer | None, metadata: Mapping[str, Any]) -> None:
    with publish_directory(folder, replace=folder.exists()) as staging:
        hugging_face = None if tokenizer is None else tokenizer.tokenizer
        model.save_pretrained(staging, tokenizer=hugging_face, metadata=metadata)
        if tokenizer is not None:
            tokenizer.save_sentencepiece_model(staging)


def _output_folder(output: str | Path, *, force: bool) -> Path:
    kind, resolved = PathResolver().resolve(output)
    if kind not in ("local", "hub"):
        raise UserInputError(
            f"output {output} is not a local folder", remedy="give a local folder and copy it from there"
        )
    folder = Path(output if kind == "hub" else resolved).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserInputError(f"output {folder} is a file", remedy="give a folder that does not exist yet")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not force:
        raise UserInputError(
            f"output {folder} exists already and is not empty",
            remedy="choose another folder, or replace this one with --force",
        )
    if not (folder / WMTP_FILE).is_file():
        raise UserInputError(
            f"output {folder} holds no model of this program, so --force does not replace it",
            remedy="choose another folder, or remove this one yourself",
        )
    return folder


def _tokenizer(
    base: str, config: Config, *, trust_remote_code: bool
) -> tuple[HfTokenizer | None, tuple[str, ...]]:
    """The tokenizer of the base, and what is to be said where it has none."""
    settings = TokenizerSettings(path=base, trust_remote_code=trust_remote_code, s3=config.s3)
    reader: type[HfTokenizer] = HfTokenizer
    if PathResolver().resolve(base)[0] != "builtin":
        source = open_source(config, base)
        if not source.names().intersection(_HUGGING_FACE_FILES):
            reader = RawTokenizer
    try:
        return reader(settings), ()
    except WmtpError as error:
        return None, (f"{base} gave no tokenizer ({error.message}); save one into the folder",)
