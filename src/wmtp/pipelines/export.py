"""Writes the trained model as a plain Hugging Face checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from wmtp import __version__
from wmtp.pipelines.environment import RunPaths
from wmtp.settings import Recipe
from wmtp.storage import publish_directory

if TYPE_CHECKING:
    from wmtp.pipelines.training import RunParts


def export_model(recipe: Recipe, parts: RunParts, paths: RunPaths, metrics: dict[str, float]) -> None:
    """Publish `models/<run>/final`: model, heads, tokenizer, and how it was made.

    The folder appears whole or not at all; an older one of the same run is replaced.
    """
    metadata = {
        "wmtp_version": __version__,
        "algorithm": recipe.train.algo,
        "base": parts.base_path,
        "data": recipe.data.train.sources,
        "steps": recipe.train.max_steps,
        "metrics": json.loads(json.dumps(metrics)),
    }
    with publish_directory(paths.export, replace=True) as staging:
        parts.model.save_pretrained(staging, tokenizer=parts.tokenizer.tokenizer, metadata=metadata)
