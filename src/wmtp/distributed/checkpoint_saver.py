"""Saving while training goes on, and somewhere else while the store is away."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from wmtp.distributed.checkpoint import Retention, copy_checkpoint, list_checkpoints, save_checkpoint
from wmtp.distributed.checkpoint_reading import Checkpoint, CheckpointInfo
from wmtp.distributed.checkpoint_store import LocalStore, StepStore
from wmtp.distributed.checkpoint_tensors import copy_to_host
from wmtp.distributed.ranks import is_distributed, raise_together, rank_in
from wmtp.exceptions import StorageUnavailableError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """One save: what `save_checkpoint` is given."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    score: float | None = None


class CheckpointSaver:
    """Saves the checkpoints of one run.

    Args:
        store: the run's step folders.
        retention: which checkpoints stay.
        is_async: copy the state to host memory and write it in another thread while training goes on; one
            save at a time. A save that failed is raised by `raise_if_failed`, `save` or `wait`, whichever
            comes next.
        fallback: takes a checkpoint that the store could not be reached for; it is brought to the store by a
            later save.
    """

    def __init__(
        self,
        store: StepStore,
        retention: Retention,
        *,
        is_async: bool = False,
        fallback: LocalStore | None = None,
    ) -> None:
        self.store = store
        self.retention = retention
        self.latest: CheckpointInfo | None = None
        """What was saved last; a resumed run puts its own checkpoint here, which later ones count after."""
        self._fallback = fallback
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if is_async else None
        # The thread has collectives of its own, which must not mix with those of training.
        self._group = dist.new_group(backend="gloo") if is_async and is_distributed() else None

    def save(self, request: SaveRequest) -> None:
        """Save now, or begin to; waits for the save before it."""
        self.wait()
        if self._thread is None:
            self._save(request)
            return
        # Both are out of reach of training from here on.
        tensors, state = copy_to_host(request.tensors), copy.deepcopy(request.state)
        copied = SaveRequest(request.step, tensors, state, request.score)
        self._pending = self._thread.submit(self._save, copied)

    def raise_if_failed(self) -> None:
        """Raise what a finished save in the other thread raised; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is saved; raises what the save raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait for a save under way, whose error is only logged: the run is ending, perhaps because of it."""
        try:
            self.wait()
        except Exception:
            logger.exception("the last checkpoint was not saved")
        if self._thread is not None:
            self._thread.shutdown()

    def _save(self, request: SaveRequest) -> None:
        try:
            self._bring_back()
            self._save_to(self.store, request)
        except StorageUnavailableError as error:
            if self._fallback is None:
                raise
            self._save_to(self._fallback, request)
            logger.warning(
                "%s; step %d was saved to %s and will be brought back by a later save",
                error.message,
                request.step,
                self._fallback.uri(),
            )

    def _save_to(self, store: StepStore, request: SaveRequest) -> None:
        self.latest = save_checkpoint(
            store,
            request.step,
            tensors=request.tensors,
            state=request.state,
            retention=self.retention,
            score=request.score,
            sequence_after=0 if self.latest is None else self.latest.sequence,
            process_group=self._group,
        )

    def _bring_back(self) -> None:
        """Copy what the fallback holds to the store, oldest first, and remove it there; rank 0 does."""
        if self._fallback is None:
            return
        failure: BaseException | None = None
        if rank_in(self._group) == 0:
            try:
                for info in list_checkpoints(self._fallback):
                    self._bring_one_back(self._fallback, info)
            except BaseException as error:
                failure = error
        raise_together(failure, self.store.uri(), self._group)

    def _bring_one_back(self, fallback: LocalStore, info: CheckpointInfo) -> None:
        checkpoint = Checkpoint(fallback, info.name)
        problems = checkpoint.problems()
        if problems:
            # Nothing would be saved any more if this were an error.
            logger.warning("%s is damaged and stays where it is: %s", info.uri, "; ".join(problems))
            return
        present = {found.name: found.sequence for found in list_checkpoints(self.store)}
        if present.get(info.name, 0) < info.sequence:
            copy_checkpoint(checkpoint, self.store)
            logger.warning("step %d was brought from %s to %s", info.step, info.uri, self.store.uri())
        fallback.discard(info.name)
