"""Training checkpoints: step folders that are whole or absent, verified before use.

Layout of a run:

    <run>/step-200/model.safetensors       a safetensors file a tensor group, or one a group and rank
                   optimizer.safetensors
                   rng.safetensors
                   index.json              which tensor, or part of one, is in which file
                   state.json              counters, schedule, data position, ... (JSON only)
                   manifest.json           sizes and SHA-256 of the files above; written last
    <run>/step-300.tmp-<id>                an unfinished save; never read, removed by the next save
    <run>/step-200.replaced-<id>           an older state of the same step, only while it is being replaced
    <run>/latest                           name of the step that was saved last, for people and scripts

In an object store, where nothing can be renamed, the files lie below `step-200/<id>/` and the manifest alone
makes them a checkpoint. There is no pickle on any path: JSON and safetensors only.
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from wmtp.distributed.checkpoint_files import FileEntries, SafetensorsWriter
from wmtp.distributed.checkpoint_reading import (
    FORMAT,
    INDEX_NAME,
    MAX_JSON_BYTES,
    STATE_NAME,
    Checkpoint,
    CheckpointInfo,
    checkpoint_info,
    run_planners,
)
from wmtp.distributed.checkpoint_store import StepDraft, StepFolder, StepStore
from wmtp.distributed.checkpoint_tensors import find_aliases, flatten_groups
from wmtp.distributed.hashing import create_hashed
from wmtp.distributed.publishing import manifest_bytes, parse_manifest
from wmtp.distributed.ranks import agree, raise_together, rank_in
from wmtp.exceptions import (
    CheckpointError,
    StorageDamagedError,
    StorageError,
    StorageUnavailableError,
)

logger = logging.getLogger(__name__)

_GROUP_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_COPY_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        keep_last: how many of those saved last (at least 1); None keeps all.
        keep_best: how many with the best score, beside those; of equal scores the one saved last is better.
        best_mode: whether a low or a high score is good.
        permanent_every_steps: steps divisible by this stay for ever.
    """

    keep_last: int | None = None
    keep_best: int = 0
    best_mode: Literal["min", "max"] = "min"
    permanent_every_steps: int | None = None

    def __post_init__(self) -> None:
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"keep_last must be at least 1 or None, not {self.keep_last}")
        if self.keep_best < 0:
            raise ValueError(f"keep_best must not be negative, {self.keep_best} is")
        if self.permanent_every_steps is not None and self.permanent_every_steps < 1:
            raise ValueError(
                f"permanent_every_steps must be at least 1 or None, not {self.permanent_every_steps}"
            )


def save_checkpoint(
    store: StepStore,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    retention: Retention = Retention(),
    score: float | None = None,
    sequence_after: int = 0,
    process_group: dist.ProcessGroup | None = None,
) -> CheckpointInfo:
    """Save to `step-<step>` of a run, atomically, then delete checkpoints that `retention` does not keep.

    Where torch.distributed runs, every rank calls this with its part: tensors that all have (DDP) are written
    once, sharded ones (DTensor) by their owners.

    Args:
        store: the run's step folders.
        step: optimizer steps done.
        tensors: groups of named tensors, e.g. `{"model": model.state_dict(), "rng": capture_rng_state()}`;
            any dtype and device; names for one tensor stay tied. A group's name becomes a file name.
        state: JSON values with string keys: dict, list, str, int, float, bool, None (floats come back
            exactly). A tuple or another type is an error, since it would come back as something else. Rank
            0's is kept.
        retention: which others stay. Only folders written by this function are ever deleted, and only after
            the new one is on disk.
        score: the metric `retention.keep_best` judges by.
        sequence_after: count this save after the one of that number, which may lie in another store.
        process_group: ranks that save together, of a backend for the CPU; None is the default group.

    Returns:
        The committed checkpoint. One of the same step is replaced.

    Raises:
        CheckpointError: the disk is full or read-only, or another process is saving into the run.
        StorageError: an object store does not take it.
    """
    is_coordinator = rank_in(process_group) == 0
    uri = store.uri(f"step-{step}")
    failure: BaseException | None = None
    info: CheckpointInfo | None = None
    with ExitStack() as held:
        # What one rank runs into, the others wait to hear of.
        try:
            _check_groups(tensors)
            _check_json(state, "state")
            if is_coordinator:
                held.enter_context(store.only_writer())
        except BaseException as error:
            failure = error
        raise_together(failure, uri, process_group)
        draft_id, aliases = agree((uuid.uuid4().hex, find_aliases(tensors)), process_group)
        flat = flatten_groups(tensors, aliases)
        writer = SafetensorsWriter(lambda: store.draft(f"step-{step}", draft_id))
        try:
            run_planners(lambda: save(flat, storage_writer=writer, process_group=process_group))
            if is_coordinator:
                info = _commit(store, step, writer, aliases, state, retention, score, sequence_after)
        except BaseException as error:
            failure = error
            # A store that is away would keep everyone waiting once more; the next save removes what is left.
            if writer.draft is not None and not isinstance(error, StorageUnavailableError):
                writer.draft.abandon()
        raise_together(failure, uri, process_group)
        if info is not None:
            tidy(store, info, retention)
        info = agree(info, process_group)
    assert info is not None
    return info


def copy_checkpoint(checkpoint: Checkpoint, store: StepStore, *, sequence_after: int = 0) -> CheckpointInfo:
    """Copy a checkpoint to another store of the same run, with its place in the order of saves.

    Args:
        checkpoint: what is copied.
        store: where to.
        sequence_after: count it after the save of that number at least.

    Raises:
        CheckpointError: a file of it is damaged; nothing appears in `store` then.
        StorageError: a store cannot be reached.
    """
    info = checkpoint.info
    with store.only_writer():
        draft = store.draft(f"step-{info.step}", uuid.uuid4().hex)
        try:
            files: FileEntries = {}
            for name, expected in checkpoint.files.items():
                with checkpoint.open(name) as source, create_hashed(draft, name) as target:
                    buffer = memoryview(bytearray(_COPY_BYTES))
                    while count := source.readinto(buffer):
                        target.write(buffer[:count])
                if target.entry() != dict(expected):
                    raise CheckpointError(f"{info.uri}: {name} differs from its manifest and was not copied")
                files[draft.prefix + name] = target.entry()
            sequence = max(info.sequence, sequence_after + 1)
            raw = _manifest(files, draft.prefix, info.step, sequence, info.score, info.is_permanent)
            draft.commit(raw)
        except BaseException as error:
            # As in a save: nobody waits for the same store twice.
            if not isinstance(error, StorageUnavailableError):
                draft.abandon()
            raise
        store.point_latest(f"step-{info.step}")
    return checkpoint_info(store, f"step-{info.step}", raw, parse_manifest(raw))


def tidy(store: StepStore, info: CheckpointInfo, retention: Retention) -> None:
    """After a commit: name the newest (`info`), remove leftovers, delete what need not stay.

    Called by the one writer. What goes wrong here is only told: the checkpoint is saved, and the next save
    tries again.
    """
    try:
        store.point_latest(info.name)
        store.clean()
        if retention.keep_last is not None:
            _delete_old(store, retention, retention.keep_last)
    except (OSError, StorageError, CheckpointError) as error:
        logger.warning("%s is saved, but what need not stay could not be deleted: %s", info.uri, error)


def list_checkpoints(store: StepStore) -> list[CheckpointInfo]:
    """Committed checkpoints of a run, oldest save first, by their manifests alone (not verified)."""
    # A save that was cut off before its last rename has a manifest already.
    found = (_try_info(store, folder) for folder in store.folders() if folder.kind != "unfinished")
    return sorted((info for info in found if isinstance(info, CheckpointInfo)), key=lambda i: i.sequence)


def find_latest_valid(store: StepStore) -> tuple[Checkpoint | None, list[tuple[str, str]]]:
    """Find the checkpoint that was saved last and is whole; every file of it has been read and compared.

    Returns:
        `(checkpoint, skipped)`: None when there is none; skipped lists newer folders that cannot be used, by
        name, with reasons.
    """
    skipped: list[tuple[str, str]] = []
    infos: list[CheckpointInfo] = []
    unreadable: list[tuple[StepFolder, str]] = []
    for folder in sorted(store.folders(), key=lambda folder: folder.name):
        found = _try_info(store, folder)
        if folder.kind == "unfinished":
            skipped.append((folder.name, "left by a save that did not finish"))
        elif isinstance(found, str):
            unreadable.append((folder, found))
        else:
            infos.append(found)
    for info in sorted(infos, key=lambda info: -info.sequence):
        checkpoint = Checkpoint(store, info.name)
        problems = checkpoint.problems()
        if not problems:
            # A folder whose manifest cannot be read has no sequence number: its step decides what it would
            # have come before.
            newer = [(folder.name, reason) for folder, reason in unreadable if folder.step > info.step]
            return checkpoint, skipped + newer
        skipped.append((info.name, "; ".join(problems)))
    return None, skipped + [(folder.name, reason) for folder, reason in unreadable]


def _commit(
    store: StepStore,
    step: int,
    writer: SafetensorsWriter,
    aliases: Mapping[str, Mapping[str, str]],
    state: Mapping[str, Any],
    retention: Retention,
    score: float | None,
    sequence_after: int,
) -> CheckpointInfo:
    """Write the JSON files and the manifest of a draft that holds all tensors."""
    draft = writer.draft
    assert draft is not None
    files = {draft.prefix + name: entry for name, entry in writer.files.items()}
    _write_json(draft, STATE_NAME, state, files)
    _write_json(draft, INDEX_NAME, {"tensors": writer.index, "aliases": aliases}, files)
    every = retention.permanent_every_steps
    sequence = 1 + max((info.sequence for info in list_checkpoints(store)), default=0)
    is_permanent = every is not None and step % every == 0
    raw = _manifest(files, draft.prefix, step, max(sequence, sequence_after + 1), score, is_permanent)
    draft.commit(raw)
    return checkpoint_info(store, f"step-{step}", raw, parse_manifest(raw))


def _manifest(
    files: FileEntries, prefix: str, step: int, sequence: int, score: float | None, is_permanent: bool
) -> bytes:
    extra = {
        "format": FORMAT,
        "step": step,
        "sequence": sequence,
        "score": score,
        "permanent": is_permanent,
        "prefix": prefix,
    }
    return manifest_bytes(files, extra)


def _write_json(draft: StepDraft, name: str, content: Mapping[str, Any], files: FileEntries) -> None:
    raw = json.dumps(content, ensure_ascii=False).encode()
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{name} would have {len(raw)} bytes, more than the {MAX_JSON_BYTES} that are read"
        )
    with create_hashed(draft, name) as writer:
        writer.write(raw)
    files[draft.prefix + name] = writer.entry()


def _delete_old(store: StepStore, retention: Retention, keep_last: int) -> None:
    infos = list_checkpoints(store)
    # Cut or missing files do not count as kept; hashes would mean reading every checkpoint at every save.
    whole = [i for i in infos if not Checkpoint(store, i.name).problems(hashes=False)]
    last = whole[-keep_last:]
    sign = 1 if retention.best_mode == "min" else -1
    scores = {i.name: sign * i.score for i in whole if i.score is not None and not math.isnan(i.score)}
    scored = sorted((i for i in whole if i.name in scores), key=lambda i: (scores[i.name], -i.sequence))
    kept = {i.name for i in [*last, *scored[: retention.keep_best]]}
    for old in infos:
        if old.name not in kept and not old.is_permanent and old.sequence < last[0].sequence:
            store.discard(old.name)


def _try_info(store: StepStore, folder: StepFolder) -> CheckpointInfo | str:
    """What a folder's manifest says, or why it says nothing."""
    try:
        raw = store.manifest(folder.name)
        return checkpoint_info(store, folder.name, raw, parse_manifest(raw))
    except StorageDamagedError as error:
        return error.message
    except StorageError:
        raise
    except ValueError as error:
        return str(error)


def _check_groups(tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name in tensors:
        if not name or not _GROUP_CHARACTERS.issuperset(name):
            raise ValueError(f"tensor group {name!r} cannot be a file name; use letters, digits and _")


def _check_json(value: object, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{where} has the key {key!r}: keys must be strings to come back the same from JSON"
                )
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot give back the same")
