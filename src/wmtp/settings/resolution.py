"""Which model and which dataset a run uses: what needs config and recipe together."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from wmtp.exceptions import UserInputError
from wmtp.settings.config import Config, DatasetPaths
from wmtp.settings.recipe import Recipe

ModelRole = Literal["base", "ref", "rm"]

DATASET_NAMES = tuple(DatasetPaths.model_fields)
"""Names that sources and `eval.datasets` may use."""

_ROLE_TITLES: dict[ModelRole, str] = {"base": "base", "ref": "reference", "rm": "reward"}


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The model of a role: where it is, and the key that said so."""

    path: str
    key: str


def find_model(config: Config, recipe: Recipe, role: ModelRole) -> ModelChoice | None:
    """Return the model of a role, None where neither file names one; the recipe's id wins."""
    by_recipe = {"base": recipe.model.base_id, "ref": recipe.model.ref_id, "rm": recipe.model.rm_id}[role]
    if by_recipe is not None:
        return ModelChoice(by_recipe, f"model.{role}_id")
    models = config.paths.models
    by_config = {"base": models.base, "ref": models.ref, "rm": models.rm}[role]
    return None if by_config is None else ModelChoice(by_config, f"paths.models.{role}")


def require_model(config: Config, recipe: Recipe, role: ModelRole) -> ModelChoice:
    """Return the model of a role; `UserInputError` where neither file names one."""
    choice = find_model(config, recipe, role)
    if choice is None:
        rule, remedy = explain_missing_model(role)
        raise UserInputError(f"paths.models.{role} {rule}", remedy=remedy)
    return choice


def explain_missing_model(role: ModelRole) -> tuple[str, str]:
    """Return rule and remedy for a role that neither file fills."""
    return (
        f"is not set, and this run needs a {_ROLE_TITLES[role]} model",
        f"set paths.models.{role} in the config or model.{role}_id in the recipe to a directory or a hub id",
    )


def find_dataset(config: Config, source: str) -> str:
    """Return where the rows of `source` are: the path of a named dataset, or `source` where it is a path.

    Raises:
        UserInputError: a name that is not known, or whose path is not set.
    """
    paths = config.paths.datasets.model_dump()
    fault = explain_source(source, paths)
    if fault is not None:
        raise UserInputError(f"dataset {source}: {fault[0]}", remedy=fault[1])
    return str(paths.get(source, source))


def explain_source(source: str, paths: dict[str, str | None]) -> tuple[str, str] | None:
    """Return rule and remedy where `source` is no usable dataset, None where it is; `paths` are by name."""
    if source in DATASET_NAMES:
        if paths[source] is not None:
            return None
        return f"paths.datasets.{source} is not set", f"set paths.datasets.{source} in the config"
    if any(mark in source for mark in "/\\:."):
        return None
    near = difflib.get_close_matches(source, DATASET_NAMES, n=1)
    known = ", ".join(DATASET_NAMES)
    return (
        "no dataset has that name",
        f"did you mean {near[0]}?" if near else f"use one of {known}, or a path such as data/rows.jsonl",
    )
