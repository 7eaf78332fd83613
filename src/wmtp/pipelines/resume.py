"""Going on with a run: find its checkpoint, and refuse what would not be the same run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from wmtp.components.loader import LoadedCheckpoint
from wmtp.components.loader.step_stores import is_newest, open_run_stores
from wmtp.distributed.checkpoint import list_checkpoints
from wmtp.distributed.checkpoint_store import STEP_NAME
from wmtp.exceptions import CheckpointError, UserInputError
from wmtp.factory import ComponentFactory
from wmtp.pipelines.environment import Environment, RunPaths, default_run_name, describe_device, run_paths
from wmtp.pipelines.remote_output import RemoteOutput
from wmtp.settings import Config, Recipe, redacted_dump
from wmtp.tracking import flatten_params

logger = logging.getLogger(__name__)

# What may change between a run and its continuation: how long, how often, and what is measured afterwards.
# How the data is read may too: the position in the data knows whether the same examples come of it.
_FREE_KEYS = (
    "train.max_steps",
    "train.log_every_steps",
    "train.eval_every_steps",
    "train.save_every_steps",
    "train.keep_",
    "train.best_",
    "train.permanent_every_steps",
    "train.async_checkpoints",
    "train.on_nonfinite",
    "train.max_nonfinite_steps",
    "data.eval.",
    "data.train.num_workers",
    "data.train.streaming",
    "data.train.in_memory_mib",
    "data.on_bad_row",
    "eval.",
)


def describe_conditions(
    config: Config, recipe: Recipe, environment: Environment
) -> dict[str, dict[str, str]]:
    """What a checkpoint keeps of its run, as flat text: the recipe, models and data, and the machine.

    Resumed training equals uninterrupted training bit for bit only where all of it is the same.
    """
    where = redacted_dump(config)
    paths = {name: where["paths"][name] for name in ("models", "datasets")}
    return {
        "recipe": flatten_params(recipe.model_dump(mode="json", by_alias=True), max_value=10**6),
        "config": flatten_params({"paths": paths, "devices": where["devices"]}, max_value=10**6),
        "machine": {
            "device": describe_device(environment.device),
            "precision": str(environment.precision).removeprefix("torch."),
            "CPU threads": str(torch.get_num_threads()),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }


@dataclass(frozen=True, slots=True)
class RunStart:
    """Where a run begins.

    Attributes:
        paths: its folders.
        checkpoint: what it goes on from; None for a fresh run.
        is_new: whether the folders are to be empty: a fresh run, or a branch, which goes on from a checkpoint
            of another run and leaves that one alone.
    """

    paths: RunPaths
    checkpoint: LoadedCheckpoint | None
    is_new: bool

    @property
    def origin(self) -> LoadedCheckpoint | None:
        """The checkpoint of another run that a branch goes on from."""
        return self.checkpoint if self.is_new else None

    @property
    def continued(self) -> LoadedCheckpoint | None:
        """The checkpoint of this very run; None for a fresh run and for a branch."""
        return None if self.is_new else self.checkpoint


def find_start(
    config: Config, recipe: Recipe, environment: Environment, resume: str | None, run_name: str | None
) -> RunStart:
    """Find the checkpoint to go on from, and whose run that is; allowed changes are named in warnings.

    Args:
        config: where the run is.
        recipe: what it does.
        environment: the machine.
        resume: a run or a step, see `CheckpointLoader`; None for a fresh run.
        run_name: None takes the name of the resumed run, or makes one.

    Raises:
        CheckpointError: there is none, it is damaged, it is past `train.max_steps`, or the recipe has changed
            in a way that would make it another run.
        UserInputError: the folders of a run that is to be new are in use.
    """
    if resume is None:
        paths = run_paths(config, run_name or default_run_name(recipe))
        start = RunStart(paths, None, is_new=True)
    else:
        checkpoint = _load_checkpoint(config, recipe, environment, resume)
        paths = run_paths(config, run_name or checkpoint.run_uri.rpartition("/")[2])
        places = {store.uri() for store in open_run_stores(config, paths.run_uri)}
        start = RunStart(paths, checkpoint, is_new=checkpoint.run_uri not in places)
    if start.is_new:
        refuse_existing_run(config, paths)
    return start


def recheck_start(
    config: Config, recipe: Recipe, environment: Environment, resume: str | None, start: RunStart
) -> RunStart:
    """The same start, looked at again by the process that alone writes into the run from here on.

    The process that had the run before may have saved once more since it was looked at.
    """
    if start.is_new:
        refuse_existing_run(config, start.paths)
    if start.continued is None or resume is None or STEP_NAME.match(resume.rstrip("/").rpartition("/")[2]):
        return start
    if is_newest(config, start.continued.checkpoint, start.paths.run_uri):
        return start
    checkpoint = _load_checkpoint(config, recipe, environment, resume)
    return RunStart(start.paths, checkpoint, is_new=False)


def _load_checkpoint(config: Config, recipe: Recipe, environment: Environment, path: str) -> LoadedCheckpoint:
    checkpoint = ComponentFactory.create_checkpoint_loader(config).run(path)
    now = describe_conditions(config, recipe, environment)
    _check_recipe(checkpoint.state["recipe"], now["recipe"])
    _warn_of_changes(checkpoint.state, now)
    if checkpoint.step > recipe.train.max_steps:
        raise CheckpointError(
            f"{checkpoint.uri} is at step {checkpoint.step}, past train.max_steps {recipe.train.max_steps}",
            remedy="raise train.max_steps, or resume from an earlier step",
        )
    return checkpoint


def refuse_existing_run(config: Config, paths: RunPaths) -> None:
    """A new run must not mix with what an older one of its name has left.

    Raises:
        UserInputError: the run has checkpoints, also where they went while S3 was away, or a finished
            model.
    """
    for store in open_run_stores(config, paths.run_uri):
        if list_checkpoints(store):
            raise UserInputError(
                f"run {paths.name!r} already has checkpoints in {store.uri()}",
                remedy=f"go on with --resume {paths.run_uri}, or choose another --run-name",
            )
    if RemoteOutput(config, paths).exists(paths.export):
        raise UserInputError(
            f"run {paths.name!r} already has a finished model in {paths.run_uri}/final",
            remedy="choose another --run-name, or move that model away",
        )


def refuse_existing_report(config: Config, paths: RunPaths) -> None:
    """An evaluation must not overwrite what another run has measured.

    Raises:
        UserInputError: the report folder already holds metrics.
    """
    if RemoteOutput(config, paths).exists(paths.metrics_file):
        raise UserInputError(
            f"run {paths.name!r} already has results in {paths.report}",
            remedy="choose another --run-name",
        )


def _check_recipe(before: dict[str, Any], now: dict[str, str]) -> None:
    refused = [key for key in changed_keys(before, now) if not key.startswith(_FREE_KEYS)]
    if refused:
        raise CheckpointError(
            "the recipe differs from the one this run was started with:\n"
            + list_changes(before, now, refused),
            remedy="resume with the recipe of the run, or start a new run",
        )


def _warn_of_changes(before: dict[str, Any], now: dict[str, dict[str, str]]) -> None:
    for part in ("recipe", "config"):
        for key in changed_keys(before[part], now[part]):
            logger.warning(
                "resuming with a changed %s: %s -> %s", key, before[part].get(key), now[part].get(key)
            )
    if before["recipe"].get("train.max_steps") != now["recipe"]["train.max_steps"]:
        scheduler = now["recipe"]["optim.scheduler"]
        if scheduler != "constant":
            logger.warning(
                "the learning rate follows the %s schedule of the new length from here on; a run of that "
                "length from the start would have had other rates before",
                scheduler,
            )
    for key in changed_keys(before["machine"], now["machine"]):
        logger.warning(
            "resuming with another %s: %s -> %s; numbers will be close to those of the uninterrupted run, "
            "not the same bit for bit",
            key,
            before["machine"].get(key),
            now["machine"].get(key),
        )


def changed_keys(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose flat text differs, those that only one side has too; sorted."""
    return [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]


def list_changes(before: Mapping[str, str], now: Mapping[str, str], keys: Iterable[str]) -> str:
    """The changes as a message shows them, a line each."""
    return "\n".join(f"  {key}: {before.get(key)} -> {now.get(key)}" for key in keys)
