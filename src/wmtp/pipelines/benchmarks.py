"""The problems of an evaluation: which datasets, under which names, with which prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final

from wmtp.components.data import UnifiedDataLoader
from wmtp.evaluation import Task, few_shot_tasks
from wmtp.exceptions import DataError
from wmtp.factory import ComponentFactory
from wmtp.settings import Config, Recipe, find_dataset
from wmtp.settings.recipe_eval import EvalType

# What a type reads: problems, held-out batches, or either.
TASK_TYPES: Final[frozenset[EvalType]] = frozenset({"meta-mtp", "exact-match", "self-speculation"})
DATA_TYPES: Final[frozenset[EvalType]] = frozenset({"perplexity", "token-accuracy"})
_NEEDS: Final[dict[EvalType, str]] = {
    "meta-mtp": "tests, so pass@k cannot be measured on it",
    "exact-match": "completions, so exact match cannot be measured on it",
    "self-speculation": "prompts, so decoding cannot be measured on it",
}


def evaluation_tasks(config: Config, recipe: Recipe) -> dict[str, list[Task]]:
    """The tasks of every dataset of `eval.datasets`, at most `eval.max_problems` each, by name.

    Raises:
        DataError: a dataset is missing, or its rows have nothing that one of `eval.types` could measure.
    """
    loader = ComponentFactory.create_data_loader(recipe, config)
    labels = dataset_labels(recipe.eval.datasets)
    tasks = {}
    for source, label in zip(recipe.eval.datasets, labels, strict=True):
        found = _load(loader, find_dataset(config, source), recipe)
        _require_use(source, found, recipe.eval.types)
        tasks[label] = found
    return tasks


def dataset_labels(sources: Sequence[str]) -> list[str]:
    """A short name for each source, for metrics and files: its own, or the stem of its path.

    `mbpp` is `mbpp`, `data/rows.jsonl.gz` is `rows`; names that occur again get a number.
    """
    labels: list[str] = []
    for source in sources:
        stem = PurePosixPath(source.removeprefix("builtin:").rstrip("/")).name.partition(".")[0]
        label = re.sub(r"[^A-Za-z0-9_-]", "_", stem) or "dataset"
        number = 2
        unique = label
        while unique in labels:
            unique, number = f"{label}_{number}", number + 1
        labels.append(unique)
    return labels


def _load(loader: UnifiedDataLoader, path: str, recipe: Recipe) -> list[Task]:
    tasks = loader.load_tasks(path, split="test", limit=recipe.eval.max_problems)
    if recipe.eval.mbpp_shots == 3 and any(task.benchmark == "mbpp" for task in tasks):
        return few_shot_tasks(tasks, loader.load_tasks(path, split="prompt"))
    return tasks


def _require_use(source: str, tasks: Sequence[Task], types: Sequence[EvalType]) -> None:
    """Check that at least one of the types that read problems can use these."""
    asked = [each for each in types if each in TASK_TYPES]
    usable: dict[EvalType, bool] = {
        "meta-mtp": any(task.has_tests for task in tasks),
        "exact-match": any(task.references for task in tasks),
        "self-speculation": bool(tasks),
    }
    if asked and not any(usable[each] for each in asked):
        raise DataError(
            f"dataset {source!r} has no usable rows with {' or '.join(_NEEDS[each] for each in asked)}",
            remedy="take it out of eval.datasets, or use mbpp, humaneval, contest or microcode rows, "
            "or rows with prompt and tests",
        )
