"""What `wmtp export` reads: the model, its tokenizer and how it was made, from any kind of checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from wmtp import __version__
from wmtp.components.loader import MICRO_LLAMA, ModelLoaderContext
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.tokenizer.hf import TokenizerSettings
from wmtp.exceptions import CheckpointError, UserInputError
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.export import read_export_metadata
from wmtp.modeling.formats.sources import CONFIG_FILE, ModelFiles, read_json
from wmtp.pipelines.checkpoints import LocatedModel, locate_model
from wmtp.pipelines.provenance import hub_id, public_name
from wmtp.settings import Config
from wmtp.storage import PathResolver

TOKENIZER_MODEL = "tokenizer.model"
_PARAMS_FILE = "params.json"
_TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_MODEL, "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadModel:
    """A model on its way to an export.

    Attributes:
        model: the model, adapters not yet merged.
        dtype: precision it is to be written in.
        tokenizer: of the model; None where it has none.
        tokenizer_model: its SentencePiece file; None where it has none.
    """

    model: MTPModel
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_model: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSource:
    """A checkpoint that has been found but not yet read.

    Attributes:
        path: the model folder, model id or `step-N` folder.
        is_training_state: whether it is a `step-N` folder.
        trust_remote_code: let the model run code that comes with it.
        metadata: how it was made, see `wmtp.pipelines.provenance.describe_run`.
    """

    path: str
    is_training_state: bool
    trust_remote_code: bool
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path | None:
        """Its folder, None for a model id."""
        path = Path(self.path)
        return path if path.is_dir() else None

    def load(self, dtype: torch.dtype | None) -> ReadModel:
        """Read it.

        Args:
            dtype: precision it is to be written in; None keeps the one it is stored in.

        Raises:
            ModelLoadError: files missing, unreadable or not fitting.
            CheckpointError: a training checkpoint that is not whole.
        """
        if self.is_training_state:
            return self._load_training_state(dtype)
        stored = self._stored_dtype()
        loader = ComponentFactory.create_model_loader(Config())
        wanted = dtype or stored
        # Values that a precision cannot hold are found after loading, so they must survive it.
        loaded_in = torch.float32 if wanted == torch.float16 and stored != torch.float16 else wanted
        model: MTPModel = loader.run(
            ModelLoaderContext(
                self.path, dtype=loaded_in or torch.float32, trust_remote_code=self.trust_remote_code
            )
        ).model
        return ReadModel(
            model=model,
            dtype=wanted or _native_dtype(model),
            tokenizer=self._tokenizer(self.path),
            tokenizer_model=find_tokenizer_model(self.path),
        )

    def _stored_dtype(self) -> torch.dtype | None:
        """What config.json says; None where there is none."""
        if self.path == MICRO_LLAMA:
            return torch.float32
        file = _model_files(self.path).find(CONFIG_FILE)
        if file is None:
            return None
        config = read_json(file)
        name = config.get("dtype", config.get("torch_dtype"))
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def _tokenizer(self, path: str) -> PreTrainedTokenizerBase | None:
        files = _model_files(path)
        if path != MICRO_LLAMA and all(files.find(name) is None for name in _TOKENIZER_FILES):
            return None
        settings = TokenizerSettings(path=path, trust_remote_code=self.trust_remote_code)
        return HfTokenizer(settings).tokenizer

    def _load_training_state(self, dtype: torch.dtype | None) -> ReadModel:
        raise CheckpointError(
            f"{self.path} holds the state of a training run, not a model",
            remedy="export the finished run (its folder, or final in it)",
        )


def read_source(checkpoint: str, trust_remote_code: bool) -> ExportSource:
    """Find what `checkpoint` names, and how it was made; no weights are read.

    Raises:
        CheckpointError: a local path that does not exist or holds no model.
        UserInputError: a built-in model that is only made when it is needed.
    """
    kind, resolved = PathResolver().resolve(checkpoint)
    if kind == "builtin" and resolved != MICRO_LLAMA:
        raise UserInputError(
            f"{checkpoint} is trained by the first run that needs it and then lies in that run's output",
            remedy=f"give that folder, such as runs/models/{resolved.removeprefix('builtin:')}",
        )
    if kind not in ("local", "hub", "builtin"):
        raise UserInputError(
            f"{checkpoint} is neither on this machine nor on the hub",
            remedy="copy it here and give its folder",
        )
    if kind == "local" and (Path(resolved) / _PARAMS_FILE).is_file():
        located = LocatedModel(resolved, is_training_state=False)
    else:
        located = locate_model(Config(), checkpoint)
    return ExportSource(
        path=located.path,
        is_training_state=located.is_training_state,
        trust_remote_code=trust_remote_code,
        metadata={} if located.is_training_state else _model_metadata(located.path),
    )


def find_tokenizer_model(path: str) -> Path | None:
    """The SentencePiece file of a model: beside it, or one folder up, where Meta's repository has it."""
    if path == MICRO_LLAMA:
        return None
    files = _model_files(path)
    found = files.find(TOKENIZER_MODEL)
    if found is not None or files.find(_PARAMS_FILE) is None:
        return found
    if files.directory is None:
        return ModelFiles(files.source, str(PurePosixPath(files.subfolder).parent)).find(TOKENIZER_MODEL)
    above = files.directory.resolve().parent / TOKENIZER_MODEL
    return above if above.is_file() else None


def _model_metadata(path: str) -> dict[str, Any]:
    """How a model was made: what its `wmtp.json` says, else that it is a model of its own."""
    found = {} if path == MICRO_LLAMA else read_export_metadata(_model_files(path))
    if found:
        return {**found, "wmtp_version": __version__}
    return {"wmtp_version": __version__, "base": public_name(path), "base_model": hub_id(path)}


def _model_files(path: str) -> ModelFiles:
    """Like `locate_model` of the formats, without a look at what is there."""
    if Path(path).is_dir():
        return ModelFiles(path)
    source, _, subfolder = path.partition(":")
    return ModelFiles(source, subfolder)


def _native_dtype(model: MTPModel) -> torch.dtype:
    """The precision that Meta's native reader found on disk and noted in the configuration."""
    name = model.config.to_dict()["meta_native_dtype"]
    dtype = getattr(torch, str(name).removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype
