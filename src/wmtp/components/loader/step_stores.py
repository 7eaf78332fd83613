"""From a path to the step folders of a run, wherever these are."""

from __future__ import annotations

import logging
from pathlib import Path

from wmtp.distributed.checkpoint import find_latest_valid, list_checkpoints
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.checkpoint_store import STEP_NAME, LocalStore, StepStore
from wmtp.exceptions import CheckpointError
from wmtp.settings import Config
from wmtp.storage import PathResolver, S3Store, create_s3_manager
from wmtp.tracking.lookup import resolve_run_uri

logger = logging.getLogger(__name__)

_REMEDY = "give a run folder, one of its step-N folders, or runs:/<MLflow id>"


def open_run_store(config: Config, run: str) -> StepStore:
    """The step folders of a run: a local folder or an `s3://` address.

    Raises:
        CheckpointError: it is neither.
    """
    where, resolved = PathResolver().resolve(run)
    if where == "s3":
        return S3Store(create_s3_manager(config), resolved)
    if where not in ("local", "hub"):
        raise CheckpointError(f"there are no training checkpoints at {run}", remedy=_REMEDY)
    # `runs/mine` has the form of a hub id, but checkpoints are never on the hub.
    return LocalStore(run if where == "hub" else resolved)


def open_fallback_store(config: Config, run: str) -> LocalStore | None:
    """Where checkpoints of a run on S3 go while S3 is away: `<s3.fallback_dir>/<bucket>/<key>`; None without
    such a folder.
    """
    where, resolved = PathResolver().resolve(run)
    if config.s3.fallback_dir is None or where != "s3":
        return None
    return LocalStore(Path(config.s3.fallback_dir).expanduser() / resolved.rstrip("/").removeprefix("s3://"))


def open_run_stores(config: Config, run: str) -> list[StepStore]:
    """Every place that may hold steps of a run: its own, and the fallback of one on S3."""
    fallback = open_fallback_store(config, run)
    return [open_run_store(config, run), *([] if fallback is None else [fallback])]


def is_newest(config: Config, checkpoint: Checkpoint, run: str) -> bool:
    """Whether no other checkpoint of `run` was saved after this one; by their manifests, not verified."""
    infos = [info for store in open_run_stores(config, run) for info in list_checkpoints(store)]
    newest = max(infos, key=lambda info: info.sequence, default=None)
    return newest is not None and newest.manifest_sha256 == checkpoint.info.manifest_sha256


def run_of(config: Config, mlflow_run: str) -> str:
    """The folder of the checkpoints that the MLflow run `runs:/<id>` has recorded.

    Raises:
        CheckpointError: there is no such run, or it has recorded none.
    """
    newest = resolve_run_uri(config, mlflow_run, open_store=lambda: create_s3_manager(config))[0]
    return newest.rpartition("/")[0]


def find_checkpoint(config: Config, path: str) -> Checkpoint:
    """A `step-N` folder, verified; of a run folder or an MLflow run the newest valid one.

    Newer ones that cannot be used are named in warnings.
    Of a run on S3 whose last saves went to `s3.fallback_dir`, those count too.

    Raises:
        CheckpointError: there is none that is whole.
        StorageError: S3 cannot be reached.
    """
    if path.startswith("runs:/"):
        path = run_of(config, path)
    run, _, last = path.rstrip("/").rpartition("/")
    if STEP_NAME.match(last):
        checkpoint = Checkpoint(open_run_store(config, run or "."), last)
        checkpoint.verify()
        return checkpoint
    stores = open_run_stores(config, path)
    found: list[Checkpoint] = []
    skipped: list[tuple[str, str]] = []
    for store in stores:
        checkpoint_here, skipped_here = find_latest_valid(store)
        skipped += [(store.uri(name), reason) for name, reason in skipped_here]
        if checkpoint_here is not None:
            found.append(checkpoint_here)
    for uri, reason in skipped:
        logger.warning("checkpoint %s was skipped: %s", uri, reason)
    if not found:
        raise CheckpointError(
            f"{stores[0].uri()} holds no valid checkpoint"
            + "".join(f"\n  {uri}: {reason}" for uri, reason in skipped),
            remedy=_REMEDY if not skipped else "start the run anew without --resume",
        )
    return max(found, key=lambda checkpoint: checkpoint.info.sequence)
