"""Training checkpoints: step folders that are whole or absent, verified before use.

Layout of a run folder:

    <run>/step-200/model.safetensors       one safetensors file a tensor group
                   optimizer.safetensors
                   rng.safetensors
                   state.json              counters, schedule, data position, ... (JSON only)
                   manifest.json           sizes and SHA-256 of the files above; written last
    <run>/step-300.tmp-<id>                an unfinished save; never read, removed by the next save
    <run>/step-200.replaced-<id>           an older state of the same step, only while it is being replaced

There is no pickle on any path: JSON and safetensors only.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wmtp.distributed.checkpoint_tensors import TensorGroup, read_group, write_group
from wmtp.distributed.publishing import (
    STAGING_PATTERN,
    discard_directory,
    publish_directory,
    read_manifest,
    verify_manifest,
)
from wmtp.exceptions import CheckpointError

FORMAT = "wmtp-checkpoint"
STATE_NAME = "state.json"
_LOCK_NAME = ".checkpoint.lock"
_STEP_NAME = re.compile(r"^step-(?P<step>\d+)$")
_GROUP_NAME = re.compile(r"^[A-Za-z0-9_]+$")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint; `sequence` counts the saves of a run folder, so the highest was saved last."""

    path: Path
    step: int
    sequence: int


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep_last: int | None = None,
) -> Path:
    """Save to `<run_dir>/step-<step>`, atomically, then delete checkpoints beyond the newest `keep_last`.

    Args:
        run_dir: the run's folder of checkpoints; created where absent.
        step: optimizer steps done.
        tensors: groups of named tensors, e.g. `{"model": model.state_dict(), "rng": capture_rng_state()}`;
            any dtype and device; tensors that share memory stay tied. A group's name becomes a file name.
        state: JSON values with string keys: dict, list, str, int, float, bool, None (floats come back
            exactly). A tuple or another type is an error, since it would come back as something else.
        keep_last: how many committed checkpoints stay (at least 1); None keeps all. The new one always stays;
            only folders written by this function are ever deleted, and only after the new one is on disk.

    Returns:
        The committed folder. A checkpoint of the same step is replaced.

    Raises:
        CheckpointError: the disk is full or read-only, or another process is saving into `run_dir`.
    """
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last must be at least 1 or None, not {keep_last}")
    for name in tensors:
        if _GROUP_NAME.match(name) is None:
            raise ValueError(f"tensor group {name!r} cannot be a file name; use letters, digits and _")
    _check_json(state, "state")
    run_dir = Path(run_dir)
    final = run_dir / f"step-{step}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with _only_writer(run_dir):
            sequence = 1 + max((info.sequence for info in list_checkpoints(run_dir)), default=0)
            extra = {"format": FORMAT, "step": step, "sequence": sequence}
            with publish_directory(final, extra=extra, replace=True) as staging:
                aliases = {
                    name: write_group(staging / f"{name}.safetensors", group)
                    for name, group in tensors.items()
                }
                document = {"state": state, "aliases": aliases}
                (staging / STATE_NAME).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
            _remove_leftovers(run_dir)
            if keep_last is not None:
                _prune(run_dir, keep_last)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {final} could not be saved: {error}",
            remedy="Check free space and permissions there; earlier checkpoints are untouched.",
        ) from error
    return final


def load_checkpoint(
    path: str | os.PathLike[str], *, groups: Collection[str] | None = None
) -> tuple[dict[str, TensorGroup], dict[str, Any]]:
    """Verify a checkpoint folder against its manifest, then read it.

    Args:
        path: the folder.
        groups: tensor groups to read; None reads all. All are verified.

    Returns:
        `(tensors, state)` as given to `save_checkpoint`, tensors on the CPU.

    Raises:
        CheckpointError: it is missing, unfinished or damaged; the message names each file that is.
    """
    path = Path(path)
    problem = _problem(path)
    if problem is not None:
        raise CheckpointError(
            f"{path} is not a valid checkpoint: {problem}",
            remedy="Resume from another step folder of the run, or start without --resume.",
        )
    document = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
    aliases: dict[str, dict[str, str]] = document["aliases"]
    tensors = {
        name: read_group(path / f"{name}.safetensors", aliases[name])
        for name in aliases
        if groups is None or name in groups
    }
    return tensors, document["state"]


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[CheckpointInfo]:
    """Committed checkpoints of a run folder, oldest save first, by their manifests alone (not verified)."""
    infos = []
    for path in _step_folders(Path(run_dir)):
        info = _info(path)
        if info is not None:
            infos.append(info)
    return sorted(infos, key=lambda info: info.sequence)


def find_latest_valid(run_dir: str | os.PathLike[str]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the checkpoint that was saved last and is whole.

    Returns:
        `(path, skipped)`: path is None when there is none; skipped lists newer folders that cannot be used,
        with reasons.
    """
    run_dir = Path(run_dir)
    skipped = [
        (path, "left by a save that did not finish")
        for path in _folders(run_dir)
        if _leftover_kind(path) == "tmp"
    ]
    # A folder whose manifest cannot be read has no sequence number: its step decides what it would have come
    # before.
    candidates = [(_info(path), path) for path in _step_folders(run_dir)]
    unreadable = [(path, _problem(path) or "") for info, path in candidates if info is None]
    readable = sorted((info for info, _ in candidates if info is not None), key=lambda info: -info.sequence)
    for info in readable:
        problem = _problem(info.path)
        if problem is None:
            newer = [(path, reason) for path, reason in unreadable if _step_of(path) > info.step]
            return info.path, skipped + newer
        skipped.append((info.path, problem))
    return None, skipped + unreadable


def _problem(path: Path) -> str | None:
    if not path.is_dir():
        return "there is no such folder"
    problems = verify_manifest(path)
    if problems:
        return "; ".join(problems)
    manifest = read_manifest(path)
    if manifest.get("format") != FORMAT or STATE_NAME not in manifest["files"]:
        return "it was not written as a training checkpoint"
    return None


def _info(path: Path) -> CheckpointInfo | None:
    try:
        manifest = read_manifest(path)
    except ValueError:
        return None
    if manifest.get("format") != FORMAT:
        return None
    return CheckpointInfo(path=path, step=manifest["step"], sequence=manifest["sequence"])


def _folders(run_dir: Path) -> list[Path]:
    return sorted(path for path in run_dir.iterdir() if path.is_dir()) if run_dir.is_dir() else []


def _step_folders(run_dir: Path) -> list[Path]:
    # A folder that was set aside by a replacement is a whole checkpoint, and the only one if the replacement
    # was cut off.
    return [
        path
        for path in _folders(run_dir)
        if _STEP_NAME.match(path.name) is not None or _leftover_kind(path) == "replaced"
    ]


def _leftover_kind(path: Path) -> str | None:
    match = STAGING_PATTERN.match(path.name)
    return match["kind"] if match is not None and _STEP_NAME.match(match["name"]) is not None else None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").partition(".")[0])


def _remove_leftovers(run_dir: Path) -> None:
    # Only called under the lock and after a commit, so no other process is writing here.
    for path in _folders(run_dir):
        kind = _leftover_kind(path)
        original = run_dir / path.name.partition(".")[0]
        if kind == "replaced" and not original.exists():
            # The replacement was cut off between its two renames: the old one is the state of that step.
            path.rename(original)
        elif kind is not None:
            shutil.rmtree(path)


def _prune(run_dir: Path, keep_last: int) -> None:
    infos = list_checkpoints(run_dir)
    # Cut or missing files do not count as kept; hashes would mean reading every checkpoint at every save.
    whole = [info for info in infos if not verify_manifest(info.path, hashes=False)]
    oldest_kept = whole[-keep_last:][0].sequence
    for info in infos:
        if info.sequence < oldest_kept:
            discard_directory(info.path)


@contextmanager
def _only_writer(run_dir: Path) -> Iterator[None]:
    with open(run_dir / _LOCK_NAME, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"Another process is saving a checkpoint into {run_dir}.",
                remedy="Give each run its own --run-name; two runs must not share a folder.",
            ) from error
        yield


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
