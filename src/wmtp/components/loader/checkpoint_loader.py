"""`checkpoint-loader`: the newest whole checkpoint of a run, or the one that was named."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wmtp.components.base import Component
from wmtp.components.registry import loader_registry
from wmtp.distributed.checkpoint import find_latest_valid, load_checkpoint
from wmtp.exceptions import CheckpointError
from wmtp.settings import Config
from wmtp.storage import PathResolver

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint in memory.

    Attributes:
        path: its `step-N` folder.
        step: finished updates.
        epoch: epoch the next micro-batch belongs to, counted from 0.
        mlflow_run_id: the MLflow run to go on with, where there was one.
        tensors: groups of named tensors: modules, optimizer, random states.
        state: the JSON state.
    """

    path: Path
    step: int
    epoch: int
    mlflow_run_id: str | None
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@loader_registry.register("checkpoint-loader", version="1.0.0", description="training checkpoints")
class CheckpointLoader(Component[str, LoadedCheckpoint]):
    """Loads a `step-N` folder, or the newest valid one of a run folder, saying which were skipped and why."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, context: str) -> LoadedCheckpoint:
        """Find, verify and read the checkpoint at the path `context`.

        Raises:
            CheckpointError: there is none that is whole.
        """
        _, resolved = PathResolver().resolve(context)
        path = find_checkpoint(Path(resolved))
        tensors, state = load_checkpoint(path)
        return LoadedCheckpoint(path, state["step"], state["epoch"], state["mlflow_run_id"], tensors, state)


def find_checkpoint(folder: Path) -> Path:
    """Return a `step-N` folder as it is, and of a run folder the newest valid one, with a warning for each
    that was skipped.

    Raises:
        CheckpointError: there is none.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no checkpoint at {folder}", remedy="give a run folder or one of its step-N folders"
        )
    if folder.name.startswith("step-"):
        return folder
    path, skipped = find_latest_valid(folder)
    for skipped_path, reason in skipped:
        logger.warning("checkpoint %s was skipped: %s", skipped_path, reason)
    if path is None:
        raise CheckpointError(
            f"{folder} holds no valid checkpoint"
            + "".join(f"\n  {skipped_path.name}: {reason}" for skipped_path, reason in skipped),
            remedy="start the run anew without --resume",
        )
    return path
