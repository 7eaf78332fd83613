"""`checkpoint-loader`: the newest whole checkpoint of a run, or the one that was named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wmtp.components.base import Component
from wmtp.components.loader.step_stores import find_checkpoint
from wmtp.components.registry import loader_registry
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.settings import Config


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A verified checkpoint; its tensors are read when they are asked for.

    Attributes:
        checkpoint: `read(group)` and `load_into(...)` give the tensors of modules, optimizer, random states.
        uri: its `step-N` folder.
        step: finished updates.
        epoch: epoch the next micro-batch belongs to, counted from 0.
        mlflow_run_id: the MLflow run to go on with, where there was one.
        state: the JSON state.
    """

    checkpoint: Checkpoint
    uri: str
    step: int
    epoch: int
    mlflow_run_id: str | None
    state: dict[str, Any]

    @property
    def run_uri(self) -> str:
        """The run it belongs to."""
        return self.checkpoint.store.uri()


@loader_registry.register("checkpoint-loader", version="1.0.0", description="training checkpoints")
class CheckpointLoader(Component[str, LoadedCheckpoint]):
    """Loads a `step-N` folder, or the newest valid one of a run folder, saying which were skipped and why."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, context: str) -> LoadedCheckpoint:
        """Find and verify the checkpoint at the path `context`: a local folder or an `s3://` address.

        Raises:
            CheckpointError: there is none that is whole.
            StorageError: S3 cannot be reached.
        """
        checkpoint = find_checkpoint(self.config, context)
        state = checkpoint.state
        return LoadedCheckpoint(
            checkpoint, checkpoint.info.uri, state["step"], state["epoch"], state["mlflow_run_id"], state
        )
