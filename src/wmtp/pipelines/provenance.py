"""How a model was made, in words that may be published: no paths of this machine, no secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from wmtp import __version__
from wmtp.settings import Config, Recipe, find_dataset
from wmtp.settings.redaction import redact_text
from wmtp.storage import PathResolver

# Names that say nothing without the folder they are in.
_GENERIC_NAMES = ("final", "export", "model")


def describe_run(config: Config, recipe: Recipe, base_path: str) -> dict[str, Any]:
    """Describe a training run for `wmtp.json` and the model card: JSON values only.

    Returns:
        `wmtp_version`, `algorithm`, `base` (its name), `base_model` (its hub id or None), `data` (names),
        `datasets` (hub ids among them), `steps` (planned) and `recipe` (what differs from the defaults).
    """
    sources = recipe.data.train.sources
    places = [find_dataset(config, source) for source in sources]
    named = [
        source if source in type(config.paths.datasets).model_fields else public_name(source)
        for source in sources
    ]
    excerpt = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return {
        "wmtp_version": __version__,
        "algorithm": recipe.train.algo,
        "base": public_name(base_path),
        "base_model": hub_id(base_path),
        "data": named,
        "datasets": [found for found in map(hub_id, places) if found is not None],
        "steps": recipe.train.max_steps,
        "recipe": _published(excerpt),
    }


def public_name(path: str) -> str:
    """Name a model or data set without saying where it lies: hub ids whole, else the folder or file name."""
    kind, resolved = PathResolver().resolve(path)
    if kind in ("hub", "builtin", "models", "runs"):
        return path
    place = PurePath(resolved)
    is_step = place.name.startswith("step-")
    if is_step or place.name in _GENERIC_NAMES:
        return f"{place.parent.name}-{place.name}" if is_step else place.parent.name
    return place.name


def hub_id(path: str) -> str | None:
    """The repository on the hub that a path names, None for any other place."""
    kind, resolved = PathResolver().resolve(path)
    return resolved.partition(":")[0] if kind == "hub" else None


def _published(value: Any) -> Any:
    """Settings with every path replaced by a name."""
    if isinstance(value, Mapping):
        return {key: _published(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_published(item) for item in value]
    if isinstance(value, str) and (os.sep in value or value.startswith("~")):
        return redact_text(public_name(value))
    return value
