"""Reading config and recipe: files, environment and `--set` to checked settings, or every problem at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import yaml

from wmtp.settings.base import Section, Violation
from wmtp.settings.checking import Checked, check
from wmtp.settings.config import Config
from wmtp.settings.errors import ConfigError, Problem
from wmtp.settings.overrides import apply_overrides
from wmtp.settings.recipe import Recipe
from wmtp.settings.redaction import redacted_dump
from wmtp.settings.resolution import DATASET_NAMES, ModelRole, explain_missing_model, explain_source
from wmtp.settings.source import Document, parse_value

SectionT = TypeVar("SectionT", bound=Section)

_MAX_FILE_BYTES = 2**20


def load_config(path: str | Path, verbose: bool = False, *, overrides: Iterable[str] = ()) -> Config:
    """Read a config file.

    Args:
        path: the YAML file.
        verbose: write the resolved settings to standard error, secrets hidden.
        overrides: `a.b=c` with keys of the config, as after `--set`.

    Raises:
        ConfigError: with every problem of the file and the overrides.
    """
    return _load_one(path, "config", Config, overrides, verbose)


def load_recipe(path: str | Path, verbose: bool = False, *, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file; arguments and errors are those of `load_config`, with keys of the recipe."""
    return _load_one(path, "recipe", Recipe, overrides, verbose)


def load_settings(
    config_path: str | Path, recipe_path: str | Path, overrides: Iterable[str] = ()
) -> tuple[Config, Recipe]:
    """Read both files and check them together; each override goes to the file that owns its top-level key.

    Raises:
        ConfigError: with every problem of both files, of the overrides, and of the two files taken together.
    """
    documents, problems = _read({"config": config_path, "recipe": recipe_path}, overrides)
    config = check(documents["config"], Config)
    recipe = check(documents["recipe"], Recipe)
    for checked, violation in _find_joint_violations(config, recipe):
        checked.report(violation)
    problems += [*config.problems, *recipe.problems]
    if problems or config.model is None or recipe.model is None:
        raise ConfigError(_sorted(problems, [str(config_path), str(recipe_path)]))
    return config.model, recipe.model


def _load_one(
    path: str | Path, name: str, schema: type[SectionT], overrides: Iterable[str], verbose: bool
) -> SectionT:
    """Read and check one file."""
    documents, problems = _read({name: path}, overrides)
    checked = check(documents[name], schema)
    problems += checked.problems
    if problems or checked.model is None:
        raise ConfigError(_sorted(problems, [str(path)]))
    if verbose:
        text = yaml.safe_dump(redacted_dump(checked.model), sort_keys=False, allow_unicode=True)
        sys.stderr.write(f"# {name}: {path}\n{text}")
    return checked.model


def _read(
    paths: dict[str, str | Path], overrides: Iterable[str]
) -> tuple[dict[str, Document], list[Problem]]:
    """Read files and overrides to plain data; also return what is wrong with the overrides themselves."""
    documents = {name: _read_file(path) for name, path in paths.items()}
    return documents, apply_overrides(overrides, documents, os.environ)


def _read_file(path: str | Path) -> Document:
    """Read a file to plain data; what is wrong with the file as a whole is a problem at its top."""
    document = Document(str(path))
    fault, text = _read_text(Path(path))
    if fault is None:
        is_readable, data = parse_value(text, document, (), os.environ, has_lines=True)
        if not is_readable:
            return document
        if isinstance(data, dict):
            document.data = data
            return document
        is_empty = data is None
        fault = (
            ("is empty", "write at least one section; `wmtp schema` shows the keys")
            if is_empty
            else ("must hold sections at its top, not a list or a value", "begin with a key, such as train:")
        )
        line = None if is_empty else 1
    else:
        line = None
    document.unreadable[()] = Problem(str(path), line, "", "", *fault)
    return document


def _read_text(path: Path) -> tuple[tuple[str, str] | None, str]:
    """Return what is wrong with a file (rule and remedy), or None and its text."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return ("does not exist", f"check the path; the working directory is {Path.cwd()}"), ""
    except IsADirectoryError:
        return ("is a directory", "name the YAML file inside it"), ""
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return (f"cannot be read: {reason.lower()}", "check the path and its permissions"), ""
    if len(content) > _MAX_FILE_BYTES:
        return ("is larger than 1 MiB, which no settings file is", "check the path"), ""
    try:
        return None, content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return ("is not UTF-8 text", "save it as UTF-8"), ""


def _find_joint_violations(
    config: Checked[Config], recipe: Checked[Recipe]
) -> Iterator[tuple[Checked[Config] | Checked[Recipe], Violation]]:
    """Check the rules that need both files: models and datasets that the recipe uses and the config names."""
    algorithm, reward_source = recipe.value_at("train.algo"), recipe.value_at("critic.reward.source")
    roles: list[tuple[ModelRole, bool]] = [
        ("base", True),
        ("ref", algorithm == "rho1-wmtp"),
        ("rm", algorithm == "critic-wmtp" and reward_source == "reward_model"),
    ]
    for role, is_needed in roles:
        config_key, recipe_key = f"paths.models.{role}", f"model.{role}_id"
        is_unknown = recipe.has_failed([recipe_key, "train.algo"]) or config.has_failed([config_key])
        is_set = recipe.value_at(recipe_key) is not None or config.value_at(config_key) is not None
        if is_needed and not is_set and not is_unknown:
            rule, remedy = explain_missing_model(role)
            yield config, Violation(config_key, rule, remedy)
    paths = {name: config.value_at(f"paths.datasets.{name}") for name in DATASET_NAMES}
    for key in ("data.train.sources", "data.eval.sources", "eval.datasets"):
        for source in [] if recipe.has_failed([key]) else recipe.value_at(key):
            fault = explain_source(source, paths)
            if fault is not None and not config.has_failed([f"paths.datasets.{source}"]):
                yield recipe, Violation(key, f"cannot use {source}: {fault[0]}", fault[1])


def _sorted(problems: list[Problem], files: list[str]) -> list[Problem]:
    """Order problems by file and line, those of overrides last."""

    def place(problem: Problem) -> tuple[int, int]:
        order = files.index(problem.file) if problem.file in files else len(files)
        return order, problem.line or 0

    return sorted(problems, key=place)
