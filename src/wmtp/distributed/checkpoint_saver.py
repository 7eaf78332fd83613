"""Saving while training goes on, and somewhere else while the store is away."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from wmtp.distributed.checkpoint import (
    Retention,
    copy_checkpoint,
    list_checkpoints,
    save_checkpoint,
    tidy,
)
from wmtp.distributed.checkpoint_reading import Checkpoint, CheckpointInfo
from wmtp.distributed.checkpoint_store import LocalStore, StepStore
from wmtp.distributed.checkpoint_tensors import copy_to_host
from wmtp.distributed.ranks import agree, is_distributed, raise_together, rank_in
from wmtp.exceptions import (
    CheckpointError,
    StorageConflictError,
    StorageDamagedError,
    StorageError,
    StorageUnavailableError,
)

logger = logging.getLogger(__name__)


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """One save: what `save_checkpoint` is given.

    `before` is called by rank 0 before the store gets the checkpoint: what a resumed run needs beside it is
    where that is. A `StorageError` of it is a warning, or sends the checkpoint to the fallback.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    score: float | None = None
    before: Callable[[], None] = _nothing


class CheckpointSaver:
    """Saves the checkpoints of one run.

    Where there is a fallback, a checkpoint that the store does not take (it is away, refuses the credentials,
    is full, ...) goes there. From then on checkpoints are committed there first, and all are brought to the
    store, in their place in the order, when it is reachable again.

    Args:
        store: the run's step folders.
        retention: which checkpoints stay.
        is_async: copy the state to host memory and write it in another thread while training goes on; one
            save at a time. A save that failed is raised by `raise_if_failed`, `save` or `wait`, whichever
            comes next.
        fallback: takes a checkpoint that the store does not take.
        is_reachable: asks the store, which was away, in a few seconds; called by rank 0.
    """

    def __init__(
        self,
        store: StepStore,
        retention: Retention,
        *,
        is_async: bool = False,
        fallback: LocalStore | None = None,
        is_reachable: Callable[[], bool] = lambda: True,
    ) -> None:
        self.store = store
        self.retention = retention
        self.latest: CheckpointInfo | None = None
        """What was saved last; a resumed run puts its own checkpoint here, which later ones count after."""
        self._fallback = fallback
        self._is_reachable = is_reachable
        self._is_away = False
        # Filled by one thread and emptied by another.
        self._committed: deque[CheckpointInfo] = deque()
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
        copied = replace(request, tensors=tensors, state=state)
        self._pending = self._thread.submit(self._save, copied)

    def take_committed(self) -> list[CheckpointInfo]:
        """The checkpoints committed or brought back since the last call, in that order, where they are now.

        One that went to the fallback first is in it again when it was brought to the store.
        """
        return [self._committed.popleft() for _ in range(len(self._committed))]

    def bring_back(self, before: Callable[[], None] = _nothing) -> None:
        """Bring what the fallback holds to the store; while that is away, warn where it is.

        For the start and the end of a run, when no save is under way.

        Args:
            before: see `SaveRequest`; called where there is something to bring.

        Raises:
            CheckpointError: another process has taken over the run.
        """
        if self._fallback is None:
            return
        reason = self._try_to_bring_back(before)
        if reason is not None:
            logger.warning(
                "%s; the last checkpoints are in %s until a later save or --resume brings them to %s",
                reason,
                self._fallback.uri(),
                self.store.uri(),
            )

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
            if self._fallback is None:
                self._save_to(self.store, request)
            else:
                self._save_to_either(self._fallback, request)
        except (StorageError, CheckpointError) as error:
            if self.latest is None:
                raise
            message = f"{error.message}\nThe last checkpoint is {self.latest.uri}."
            raise type(error)(message, remedy=error.remedy) from error

    def _save_to_either(self, fallback: LocalStore, request: SaveRequest) -> None:
        reason: str | None = None
        if not self._is_away:
            try:
                self._save_to(self.store, request)
                return
            except StorageError as error:
                if isinstance(error, (StorageConflictError, StorageDamagedError)):
                    raise
                reason, self._is_away = _told(error), True
        # Before the store is asked again: what is saved is saved.
        try:
            self._save_to(fallback, request)
        except CheckpointError as error:
            message = f"{error.message}\n{reason or f'{self.store.uri()} was away'}"
            raise CheckpointError(message, remedy=error.remedy) from error
        if reason is None:
            reason = self._try_to_bring_back(request.before)
        if reason is not None:
            logger.warning(
                "%s; step %d was saved to %s and will be brought back by a later save",
                reason,
                request.step,
                fallback.uri(),
            )

    def _save_to(self, store: StepStore, request: SaveRequest) -> None:
        if store is self.store:
            self._on_rank_0(lambda: self._call_before(request.before))
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
        self._committed.append(self.latest)

    def _call_before(self, before: Callable[[], None]) -> None:
        try:
            before()
        except StorageError as error:
            if isinstance(error, StorageUnavailableError) and self._fallback is not None:
                # Nobody waits for the same store twice.
                raise
            # Whether the store takes the checkpoint itself is about to be seen.
            logger.warning("what belongs to the next checkpoint was not copied: %s", _told(error))

    def _try_to_bring_back(self, before: Callable[[], None]) -> str | None:
        """Move what the fallback holds to the store; why that could not be, None where it is done."""
        moved: list[str | None] = []
        self._on_rank_0(lambda: moved.append(self._move_all(before)))
        reason, self.latest = agree((moved[0] if moved else None, self.latest), self._group)
        self._is_away = reason is not None
        return reason

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        """Run on rank 0; what it raises is raised on every rank."""
        failure: BaseException | None = None
        if rank_in(self._group) == 0:
            try:
                action()
            except BaseException as error:
                failure = error
        raise_together(failure, self.store.uri(), self._group)

    def _move_all(self, before: Callable[[], None]) -> str | None:
        assert self._fallback is not None
        infos = list_checkpoints(self._fallback)
        if not infos:
            return None
        if not self._is_reachable():
            return f"{self.store.uri()} is still away"
        try:
            self._call_before(before)
            with self.store.only_writer():
                present = {found.name: found for found in list_checkpoints(self.store)}
                for info in infos:
                    self._move(self._fallback, info, present)
                if present:
                    tidy(self.store, max(present.values(), key=lambda found: found.sequence), self.retention)
        except StorageConflictError:
            raise
        except StorageError as error:
            return _told(error)
        return None

    def _move(self, fallback: LocalStore, info: CheckpointInfo, present: dict[str, CheckpointInfo]) -> None:
        checkpoint = Checkpoint(fallback, info.name)
        problems = checkpoint.problems()
        if problems:
            # Nothing would be saved any more if this were an error.
            logger.warning("%s is damaged and stays where it is: %s", info.uri, "; ".join(problems))
            return
        if info.name not in present or present[info.name].sequence < info.sequence:
            highest = max((found.sequence for found in present.values()), default=0)
            # What this run saved last stays last, also where another machine has gone on meanwhile.
            sequence_after = highest if info == self.latest else 0
            present[info.name] = copy_checkpoint(checkpoint, self.store, sequence_after=sequence_after)
            logger.warning("step %d was brought from %s to %s", info.step, info.uri, self.store.uri())
        self._committed.append(present[info.name])
        if info == self.latest:
            self.latest = present[info.name]
        fallback.discard(info.name)


def _told(error: StorageError) -> str:
    return error.message if error.remedy is None else f"{error.message} ({error.remedy})"
