"""Going on with a run: find its checkpoint, and refuse what would not be the same run."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers

from wmtp.components.loader import LoadedCheckpoint
from wmtp.distributed.checkpoint import list_checkpoints
from wmtp.distributed.checkpoint_store import StepStore
from wmtp.exceptions import CheckpointError, UserInputError
from wmtp.factory import ComponentFactory
from wmtp.pipelines.environment import Environment, RunPaths, describe_device
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


def describe_run(config: Config, recipe: Recipe, environment: Environment) -> dict[str, dict[str, str]]:
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


def load_resume_checkpoint(
    config: Config, recipe: Recipe, environment: Environment, path: str | None
) -> LoadedCheckpoint | None:
    """The checkpoint to go on from; None for a fresh run. Changes that are allowed are named in warnings.

    Raises:
        CheckpointError: there is none, it is damaged, it is past `train.max_steps`, or the recipe has changed
        in a way
            that would make it another run.
    """
    if path is None:
        return None
    checkpoint = ComponentFactory.create_checkpoint_loader(config).run(path)
    now = describe_run(config, recipe, environment)
    _check_recipe(checkpoint.state["recipe"], now["recipe"])
    _warn_of_changes(checkpoint.state, now)
    if checkpoint.step > recipe.train.max_steps:
        raise CheckpointError(
            f"{checkpoint.uri} is at step {checkpoint.step}, past train.max_steps {recipe.train.max_steps}",
            remedy="raise train.max_steps, or resume from an earlier step",
        )
    logger.info("going on from %s", checkpoint.uri)
    return checkpoint


def refuse_existing_run(store: StepStore, paths: RunPaths) -> None:
    """A fresh run must not mix with the checkpoints of an older one.

    Raises:
        UserInputError: the run folder holds checkpoints.
    """
    if list_checkpoints(store):
        raise UserInputError(
            f"run {paths.name!r} already has checkpoints in {paths.run_uri}",
            remedy=f"go on with --resume {paths.run_uri}, or choose another --run-name",
        )


def refuse_existing_report(paths: RunPaths) -> None:
    """An evaluation must not overwrite what another run has measured.

    Raises:
        UserInputError: the report folder already holds metrics.
    """
    if paths.metrics_file.exists():
        raise UserInputError(
            f"run {paths.name!r} already has results in {paths.report}",
            remedy="choose another --run-name",
        )


def _check_recipe(before: dict[str, Any], now: dict[str, str]) -> None:
    refused = [key for key in _changed(before, now) if not key.startswith(_FREE_KEYS)]
    if refused:
        listed = "\n".join(f"  {key}: {before.get(key)} -> {now.get(key)}" for key in refused)
        raise CheckpointError(
            f"the recipe differs from the one this run was started with:\n{listed}",
            remedy="resume with the recipe of the run, or start a new run",
        )


def _warn_of_changes(before: dict[str, Any], now: dict[str, dict[str, str]]) -> None:
    for part in ("recipe", "config"):
        for key in _changed(before[part], now[part]):
            logger.warning(
                "resuming with a changed %s: %s -> %s", key, before[part].get(key), now[part].get(key)
            )
    for key in _changed(before["machine"], now["machine"]):
        logger.warning(
            "resuming with another %s: %s -> %s; numbers will be close to those of the uninterrupted run, "
            "not the same bit for bit",
            key,
            before["machine"].get(key),
            now["machine"].get(key),
        )


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
