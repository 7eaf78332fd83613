"""Whatever a file holds, loading gives settings or a `ConfigError`, and nothing else."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.settings import Config, ConfigError, Problem, Recipe, load_settings
from wmtp.settings.fields import list_fields

KEYS = sorted({part for model in (Config, Recipe) for key in list_fields(model) for part in key.split(".")})
DOTTED = sorted([*list_fields(Config), *list_fields(Recipe)])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["microcode", "baseline-mtp", "cosine", "${HOME}", "${NO_SUCH_VARIABLE}", "${", "s3://a/b"]
    ),
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), inner, max_size=5)
    ),
    max_leaves=20,
)


def check(config: bytes, recipe: bytes, overrides: list[str]) -> None:
    """Load both files; an error must be complete, settings must be settings."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("config.yaml", "recipe.yaml")]
        for path, content in zip(paths, (config, recipe), strict=True):
            path.write_bytes(content)
        problems: tuple[Problem, ...] = ()
        try:
            config_model, recipe_model = load_settings(*paths, overrides)
        except ConfigError as error:
            problems = error.problems or (pytest.fail("an error without problems"),)
        else:
            assert isinstance(config_model, Config)
            assert math.isfinite(recipe_model.optim.lr)
    for problem in problems:
        assert problem.rule
        assert problem.remedy
        assert problem.line is None or problem.line >= 1
        assert len(str(problem).splitlines()) == 2, str(problem)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab:-[]{}#&*!|>'\"%@`,? \n\t$0.~<"), max_size=60))
def test_any_text_gives_settings_or_a_config_error(text: str) -> None:
    check(text.encode(), text.encode(), [text, f"train.seed={text}"])


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=40))
def test_any_bytes_give_settings_or_a_config_error(content: bytes) -> None:
    check(content, content, [])


@settings(max_examples=60, deadline=None)
@given(config=trees, recipe=trees)
def test_any_tree_gives_settings_or_a_config_error(config: Any, recipe: Any) -> None:
    check(yaml.safe_dump(config).encode(), yaml.safe_dump(recipe).encode(), [])


@settings(max_examples=100, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(DOTTED), trees), min_size=1, max_size=4))
def test_any_value_at_any_key_gives_settings_or_a_config_error(changes: list[tuple[str, Any]]) -> None:
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in changes]
    check(
        b"paths: {models: {base: a, ref: b}}",
        b"train: {algo: rho1-wmtp, max_steps: 9}\ndata: {train: {sources: [microcode]}}",
        overrides,
    )
