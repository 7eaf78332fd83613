"""What `wmtp export` reads: the model, its tokenizer and how it was made, from any kind of checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from wmtp import __version__
from wmtp.components.loader import MICRO_LLAMA, ModelLoaderContext
from wmtp.components.loader.checkpoint_loader import find_checkpoint
from wmtp.components.loader.training_state import ARCHITECTURE_KEY, holds_adapters_only
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.tokenizer.hf import TokenizerSettings
from wmtp.components.tokenizer.raw_files import load_raw_tokenizer
from wmtp.distributed.checkpoint import STATE_NAME, load_checkpoint
from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.kinds import PARAMS_FILE
from wmtp.modeling.formats.meta_native import DTYPE_ATTRIBUTE
from wmtp.modeling.formats.sources import (
    CONFIG_FILE,
    WMTP_FILE,
    LocalSource,
    ModelSource,
    locate_source,
    read_source_json,
)
from wmtp.modeling.lora import add_lora, check_same_base
from wmtp.modeling.trainable import load_checkpoint_tensors
from wmtp.pipelines.checkpoints import LocatedModel, locate_model
from wmtp.pipelines.provenance import hub_id, public_name
from wmtp.settings import Config
from wmtp.storage import PathResolver

TOKENIZER_MODEL = "tokenizer.model"
RUN_TOKENIZER = "tokenizer"
"""Folder of the run's tokenizer, beside its `step-N` folders."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_MODEL,
    "tekken.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadModel:
    """A model on its way to an export.

    Attributes:
        model: the model, adapters not yet merged.
        dtype: precision it is to be written in.
        tokenizer: of the model; None where it has none that transformers reads.
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
        files: its files; None for the model that comes with this package.
        training_state: the JSON state of a `step-N` folder, else None.
        trust_remote_code: let the model run code that comes with it.
    """

    path: str
    files: ModelSource | None
    training_state: dict[str, Any] | None
    trust_remote_code: bool

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
                tokenizer_model=None,
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
            dtype=wanted or _native_dtype(model),
            tokenizer=self._tokenizer(),
            tokenizer_model=self._tokenizer_model(),
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
            tensors, _ = load_checkpoint(self.path)
            load_checkpoint_tensors(model, tensors["model"])
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

    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        if self.files is not None and PARAMS_FILE in self.files.names():
            file = self._tokenizer_model()
            return None if file is None else load_raw_tokenizer(file)
        path = self.path
        if self.training_state is not None:
            beside = Path(self.path).parent / RUN_TOKENIZER
            path = str(beside) if beside.is_dir() else self.training_state["export"]["tokenizer"]
        elif self.files is not None and not self.files.names().intersection(_TOKENIZER_FILES):
            return None
        settings = TokenizerSettings(path=path, trust_remote_code=self.trust_remote_code)
        return HfTokenizer(settings).tokenizer

    def _tokenizer_model(self) -> Path | None:
        """The SentencePiece file, beside the model or, for Meta's layout, one folder up."""
        if self.files is None:
            return None
        found = self.files.find(TOKENIZER_MODEL)
        above = self.files.parent() if PARAMS_FILE in self.files.names() else None
        return above.find(TOKENIZER_MODEL) if found is None and above is not None else found


def read_source(checkpoint: str, *, trust_remote_code: bool) -> ExportSource:
    """Find what `checkpoint` names; no weights are read.

    Raises:
        CheckpointError: a local path that does not exist or holds no model.
        ModelLoadError: a hub id that cannot be had.
        UserInputError: a place models are not read from.
    """
    kind, resolved = PathResolver().resolve(checkpoint)
    if kind == "builtin":
        if resolved != MICRO_LLAMA:
            raise UserInputError(
                f"{checkpoint} is trained by the first run that needs it and then lies in that run's output",
                remedy=f"give that folder, such as runs/models/{resolved.removeprefix('builtin:')}",
            )
        return ExportSource(
            path=resolved, files=None, training_state=None, trust_remote_code=trust_remote_code
        )
    if kind not in ("local", "hub"):
        raise UserInputError(
            f"{checkpoint} is neither on this machine nor on the hub",
            remedy="copy it here and give its folder",
        )
    is_native = kind == "local" and (Path(resolved) / PARAMS_FILE).is_file()
    located = (
        LocatedModel(resolved, is_training_state=False) if is_native else locate_model(Config(), checkpoint)
    )
    path = str(find_checkpoint(Path(located.path))) if located.is_training_state else located.path
    files = locate_source(path)
    state = _training_state(files) if located.is_training_state else None
    return ExportSource(path=path, files=files, training_state=state, trust_remote_code=trust_remote_code)


def _training_state(files: ModelSource) -> dict[str, Any]:
    state = read_source_json(files, STATE_NAME).get("state")
    if not isinstance(state, dict) or "export" not in state:
        raise ModelLoadError(
            f"{files}/{STATE_NAME} does not say what model this is: an older version wrote it",
            remedy="resume the run with --resume, which writes a new checkpoint, or export its final folder",
        )
    return state


def _native_dtype(model: MTPModel) -> torch.dtype:
    """The precision that Meta's native reader found on disk and noted in the configuration."""
    name = str(model.config.to_dict()[DTYPE_ATTRIBUTE])
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype
