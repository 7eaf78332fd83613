"""The trained built-in models, made by the training pipeline itself on first use."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wmtp.components.loader import MICRO_BASE, MICRO_LLAMA, MICRO_REFERENCE
from wmtp.pipelines.environment import run_paths
from wmtp.settings import Config, Recipe, load_recipe

if TYPE_CHECKING:
    from wmtp.pipelines.outputs import RunOptions

logger = logging.getLogger(__name__)

_TRAINED: Final = (MICRO_BASE, MICRO_REFERENCE)


def builtin_recipe(path: str) -> Recipe:
    """The recipe that makes a trained built-in model."""
    file = resources.files("wmtp.pipelines") / "recipes" / f"{path.removeprefix('builtin:')}.yaml"
    with resources.as_file(file) as recipe_path:
        return load_recipe(recipe_path)


def prepare_builtin_model(path: str, config: Config, *, dry_run: bool, options: RunOptions) -> str:
    """Replace the name of a trained built-in model by the folder it is in; train it where it is not there
    yet.

    It goes to `<paths.output>/models/<name>/final`, like any run. A dry run writes nothing, so there an
    untrained model of the same shape takes its place.
    """
    if path not in _TRAINED:
        return path
    name = path.removeprefix("builtin:")
    paths = run_paths(config, name)
    if (paths.export / "wmtp.json").is_file():
        return str(paths.export)
    if dry_run:
        logger.info("%s is not trained yet; the dry run uses %s in its place", path, MICRO_LLAMA)
        return MICRO_LLAMA
    # Late, because the training pipeline is what calls this.
    from wmtp.pipelines.training import run_training_pipeline

    logger.info("training %s, once, into %s", path, paths.export)
    recipe = builtin_recipe(path)
    resume = str(paths.checkpoints) if any(paths.checkpoints.glob("step-*")) else None
    run_training_pipeline(config, recipe, resume_checkpoint=resume, options=options.nested(name))
    return str(paths.export)


def shipped_settings(name: str) -> Path:
    """A file of `configs/`: in the package where it is installed, beside it in a checkout."""
    packaged = Path(str(resources.files("wmtp"))) / "configs" / name
    return packaged if packaged.is_file() else Path(__file__).parents[3] / "configs" / name
