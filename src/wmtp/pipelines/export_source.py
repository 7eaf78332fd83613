"""What `wmtp export` reads: the model, its tokenizer and how it was made, from any kind of checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from wmtp import __version__
from wmtp.components.loader import MICRO_LLAMA, ModelLoaderContext
from wmtp.components.loader.sources import open_source
from wmtp.components.loader.step_stores import find_checkpoint
from wmtp.components.loader.training_state import ARCHITECTURE_KEY, holds_adapters_only
from wmtp.components.tokenizer import HfTokenizer, RawTokenizer
from wmtp.components.tokenizer.hf import TokenizerSettings
from wmtp.components.tokenizer.raw_files import RAW_FILES
from wmtp.distributed.checkpoint_reading import STATE_NAME, Checkpoint
from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.kinds import PARAMS_FILE
from wmtp.modeling.formats.meta_native_write import original_dtype
from wmtp.modeling.formats.sources import (
    CONFIG_FILE,
    WMTP_FILE,
    LocalSource,
    ModelSource,
    read_source_json,
)
from wmtp.modeling.lora import add_lora, check_same_base
from wmtp.modeling.trainable import checkpoint_tensors
from wmtp.pipelines.checkpoints import locate_model
from wmtp.pipelines.provenance import hub_id, public_name
from wmtp.settings import Config
from wmtp.storage import PathResolver, S3Folder

TOKENIZER_MODEL = "tokenizer.model"
RUN_TOKENIZER = "tokenizer"
"""Folder of the run's tokenizer, beside its `step-N` folders."""

_HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadModel:
    """A model on its way to an export.

    Attributes:
        model: the model, adapters not yet merged.
        dtype: precision it is to be written in.
        tokenizer: of the model; None where it has none.
    """

    model: MTPModel
    dtype: torch.dtype
    tokenizer: HfTokenizer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSource:
    """A checkpoint that has been found but not yet read.

    Attributes:
        path: the model folder, model id or `step-N` folder.
        files: its files; None for the model that comes with this package.
        checkpoint: the training checkpoint that it is, else None.
        trust_remote_code: let the model run code that comes with it.
    """

    path: str
    files: ModelSource | None
    checkpoint: Checkpoint | None
    trust_remote_code: bool

    @property
    def training_state(self) -> dict[str, Any] | None:
        """The JSON state of a training checkpoint."""
        return None if self.checkpoint is None else self.checkpoint.state

    @property
    def directory(self) -> Path | None:
        """Its folder, None where it is not on this machine."""
        return self.files.directory if isinstance(self.files, LocalSource) else None

    def metadata(self) -> dict[str, Any]:
        """How the model was made, see `wmtp.pipelines.provenance.describe_run`."""
        if self.training_state is not None:
            step = self.training_state["step"]
            return {**self.training_state["export"]["metadata"], "steps": step, "wmtp_version": __version__}
        if self.files is not None and WMTP_FILE in self.files.names():
            found = read_source_json(self.files, WMTP_FILE).get("metadata")
            if isinstance(found, dict) and found:
                return {**found, "wmtp_version": __version__}
        return {
            "wmtp_version": __version__,
            "base": public_name(self.path),
            "base_model": hub_id(self.path),
        }

    def load(self, dtype: torch.dtype | None) -> ReadModel:
        """Read it.

        Args:
            dtype: precision it is to be written in; None keeps the one it is stored in.

        Raises:
            ModelLoadError: files missing, unreadable or not fitting.
        """
        if self.training_state is not None:
            return ReadModel(
                model=self._load_step(self.training_state),
                dtype=dtype or torch.float32,
                tokenizer=self._tokenizer(),
            )
        stored = self._stored_dtype()
        wanted = dtype or stored
        # Values that a precision cannot hold are found after loading, so they must survive it.
        loaded_in = torch.float32 if wanted == torch.float16 and stored != torch.float16 else wanted
        context = ModelLoaderContext(
            self.path, dtype=loaded_in or torch.float32, trust_remote_code=self.trust_remote_code
        )
        model: MTPModel = ComponentFactory.create_model_loader(Config()).run(context).model
        return ReadModel(
            model=model,
            dtype=wanted or original_dtype(model.config),
            tokenizer=self._tokenizer(),
        )

    def _load_step(self, state: dict[str, Any]) -> MTPModel:
        """Load the model of a `step-N` folder; with LoRA, on the base that the run was started from."""
        described = state["export"]
        loader = ComponentFactory.create_model_loader(Config())
        if not holds_adapters_only(state):
            model: MTPModel = loader.run(ModelLoaderContext(self.path)).model
        else:
            heads = state[ARCHITECTURE_KEY]
            model = loader.run(
                ModelLoaderContext(
                    described["base"],
                    horizon=len(heads["offsets"]),
                    head=heads["head"],
                    offsets=heads["offsets"],
                    trust_remote_code=self.trust_remote_code,
                )
            ).model
            add_lora(model, **described["lora"])
            check_same_base(model, state["base"])
            assert self.checkpoint is not None
            self.checkpoint.load_into({"model": checkpoint_tensors(model)})
        model.causal_lm.generation_config = GenerationConfig.from_dict(described["generation_config"])
        return model

    def _stored_dtype(self) -> torch.dtype | None:
        """Precision on disk; None where only reading tells."""
        if self.files is None:
            return torch.float32
        if CONFIG_FILE not in self.files.names():
            return None
        config = read_source_json(self.files, CONFIG_FILE)
        name = config.get("dtype", config.get("torch_dtype"))
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def _tokenizer(self) -> HfTokenizer | None:
        path = self.path
        reader = HfTokenizer
        if self.training_state is not None:
            path = self._tokenizer_of_run() or self.training_state["export"]["tokenizer"]
        elif self.files is not None and not self.files.names().intersection(_HUGGING_FACE_FILES):
            if all(self._folder_with(name) is None for name in RAW_FILES):
                return None
            reader = RawTokenizer
        return reader(TokenizerSettings(path=path, trust_remote_code=self.trust_remote_code))

    def _tokenizer_of_run(self) -> str | None:
        """The folder beside the steps, where it is."""
        above = None if self.files is None else self.files.parent()
        if above is None or RUN_TOKENIZER not in above.subfolders():
            return None
        return f"{above}/{RUN_TOKENIZER}"

    def _folder_with(self, name: str) -> ModelSource | None:
        """Where a file of the tokenizer is: beside the model or, for Meta's layout, one folder up."""
        if self.files is None:
            return None
        above = self.files.parent() if PARAMS_FILE in self.files.names() else None
        return next((folder for folder in (self.files, above) if folder and name in folder.names()), None)


def read_source(checkpoint: str, *, trust_remote_code: bool) -> ExportSource:
    """Find what `checkpoint` names; no weights are read.

    Raises:
        CheckpointError: a local path that does not exist or holds no model.
        ModelLoadError: a hub id that cannot be had.
        StorageError: S3 does not give it.
        UserInputError: a model that lies nowhere yet.
    """
    kind, resolved = PathResolver().resolve(checkpoint)
    if kind == "builtin":
        if resolved != MICRO_LLAMA:
            raise UserInputError(
                f"{checkpoint} is trained by the first run that needs it and then lies in that run's output",
                remedy=f"give that folder, such as runs/models/{resolved.removeprefix('builtin:')}",
            )
        return ExportSource(path=resolved, files=None, checkpoint=None, trust_remote_code=trust_remote_code)
    located = locate_model(Config(), checkpoint)
    step = find_checkpoint(Config(), located.path) if located.is_training_state else None
    path = located.path if step is None else step.info.uri
    files = open_source(Config(), path)
    if isinstance(files, S3Folder):
        # It may be the `final` folder of the run that was named.
        path = str(files)
    if step is not None:
        _require_description(step)
    return ExportSource(path=path, files=files, checkpoint=step, trust_remote_code=trust_remote_code)


def _require_description(checkpoint: Checkpoint) -> None:
    if "export" not in checkpoint.state:
        raise ModelLoadError(
            f"{checkpoint.info.uri}/{STATE_NAME} does not say what model this is: an older version wrote it",
            remedy="resume the run with --resume, which writes a new checkpoint, or export its final folder",
        )
