"""Files of settings for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = "paths: {models: {base: some/model, ref: other/model}}\n"
RECIPE = "train: {algo: baseline-mtp, max_steps: 100}\ndata: {train: {sources: [microcode]}}\n"

Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Return a function that writes a file of settings and returns its path."""

    def write_file(text: str | bytes, name: str = "settings.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write_file


@pytest.fixture
def config_file(write: Writer) -> Path:
    """Return a config that is right."""
    return write(CONFIG, "config.yaml")


@pytest.fixture
def recipe_file(write: Writer) -> Path:
    """Return a recipe that is right."""
    return write(RECIPE, "recipe.yaml")
