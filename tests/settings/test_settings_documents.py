"""Shipped files, JSON schema and reference page agree with the schemas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wmtp.exceptions import UserInputError
from wmtp.settings import (
    Config,
    ConfigError,
    Recipe,
    find_dataset,
    find_model,
    json_schema,
    load_config,
    load_recipe,
    load_settings,
    render_reference,
    require_available,
    require_model,
)
from wmtp.settings.availability import find_unavailable
from wmtp.settings.fields import list_fields

ROOT = Path(__file__).parents[2]
PAIRS = [
    (folder / config, recipe)
    for folder, config, pattern in (
        (ROOT / "configs", "config.example.yaml", "recipe.*.yaml"),
        (ROOT / "configs", "config.s3.yaml", "recipe.*.7b.yaml"),
        (ROOT / "tests" / "configs", "config.local_test.yaml", "recipe.*.yaml"),
    )
    for recipe in sorted(folder.glob(pattern))
    if recipe.name.endswith(".7b.yaml") == (config == "config.s3.yaml")
]


@pytest.mark.parametrize(("config", "recipe"), PAIRS, ids=lambda path: path.name)
def test_every_shipped_pair_of_files_loads(config: Path, recipe: Path) -> None:
    loaded = load_settings(config, recipe)
    assert loaded == (load_config(config), load_recipe(recipe))


def test_the_shipped_recipes_cover_the_three_algorithms() -> None:
    assert len(PAIRS) >= 7
    for folder in (ROOT / "configs", ROOT / "tests" / "configs"):
        algorithms = {load_recipe(recipe).train.algo for config, recipe in PAIRS if config.parent == folder}
        assert algorithms >= {"baseline-mtp", "critic-wmtp", "rho1-wmtp"}


@pytest.mark.parametrize("recipe", [recipe for _, recipe in PAIRS], ids=lambda path: path.name)
def test_a_recipe_begins_with_the_command_that_runs_it(recipe: Path) -> None:
    command = recipe.read_text().splitlines()[0].removeprefix("# ").split()
    assert command[:3] == ["wmtp", "train", "--config"]
    assert command[4] == "--recipe"
    assert ROOT / command[5] == recipe
    load_settings(ROOT / command[3], ROOT / command[5])


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    assert page == render_reference(), "write the output of wmtp.settings.render_reference() to the page"


@pytest.mark.parametrize("schema", [Config, Recipe])
def test_the_reference_page_names_every_field(schema: type[Config] | type[Recipe]) -> None:
    page = render_reference()
    for doc in list_fields(schema).values():
        assert f"`{doc.key}`" in page or not any(
            other.section is None and other.key.rpartition(".")[0] == doc.key
            for other in list_fields(schema).values()
        )


def resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference of a JSON schema."""
    for arm in [node, *node.get("anyOf", [])]:
        if "$ref" in arm:
            found: dict[str, Any] = schema["$defs"][arm["$ref"].removeprefix("#/$defs/")]
            return found
    return node


@pytest.mark.parametrize(("kind", "model"), [("config", Config), ("recipe", Recipe)])
def test_the_json_schema_describes_every_field_and_refuses_others(kind: Any, model: Any) -> None:
    schema = json_schema(kind)
    assert json.loads(json.dumps(schema)) == schema == json_schema()[kind]
    assert schema["$schema"].startswith("https://json-schema.org/")
    for doc in list_fields(model).values():
        node = schema
        for part in doc.key.split("."):
            node = resolve(schema, node)
            assert node["additionalProperties"] is False
            node = node["properties"][part]
        # Pydantic leaves out a section's description where it is that of its class.
        described = node if "description" in node else resolve(schema, node)
        assert described["description"] == doc.description


def test_the_json_schema_takes_a_reference_where_a_number_or_a_choice_is_wanted() -> None:
    properties = json_schema("recipe")["$defs"]["TrainSettings"]["properties"]
    for key in ("max_steps", "algo", "save_every_steps"):
        assert any("\\$\\{" in arm.get("pattern", "") for arm in properties[key]["anyOf"])
    assert properties["scorer"]["anyOf"][0]["type"] == "string"


def test_nothing_in_the_settings_imports_torch() -> None:
    code = "import sys, wmtp.settings; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_default_is_unavailable_and_the_table_names_only_fields() -> None:
    from wmtp.settings.availability import _TABLE

    recipe = Recipe.model_validate(
        {"train": {"algo": "baseline-mtp", "max_steps": 1}, "data": {"train": {"sources": ["x"]}}}
    )
    for model in (Config(), recipe):
        assert list(find_unavailable(model.model_dump())) == []
        require_available(model)
    known = {**list_fields(Config), **list_fields(Recipe)}
    assert [row.key for row in _TABLE if row.key not in known] == []


def test_settings_built_in_code_are_refused_where_not_available() -> None:
    config = Config.model_validate({"devices": {"strategy": "ddp"}, "paths": {"output": "gs://b/o"}})
    with pytest.raises(ConfigError) as caught:
        require_available(config)
    assert [(p.key, p.value) for p in caught.value.problems] == [
        ("devices.strategy", "ddp"),
        ("paths.output", "gs://b/o"),
    ]


def test_the_recipes_model_wins_over_the_configs() -> None:
    data = {"train": {"algo": "baseline-mtp", "max_steps": 1}, "data": {"train": {"sources": ["x"]}}}
    config = Config.model_validate({"paths": {"models": {"base": "a", "ref": "b"}}})
    recipe = Recipe.model_validate({**data, "model": {"base_id": "c"}})
    base, reference = require_model(config, recipe, "base"), require_model(config, recipe, "ref")
    assert (base.path, base.key) == ("c", "model.base_id")
    assert (reference.path, reference.key) == ("b", "paths.models.ref")
    assert find_model(config, recipe, "rm") is None
    with pytest.raises(UserInputError, match=r"paths\.models\.rm is not set"):
        require_model(config, recipe, "rm")


def test_a_source_is_a_name_or_a_path() -> None:
    config = Config.model_validate({"paths": {"datasets": {"mbpp": "data/mbpp.jsonl"}}})
    assert find_dataset(config, "mbpp") == "data/mbpp.jsonl"
    assert find_dataset(config, "microcode") == "builtin:microcode"
    for path in ("rows.jsonl", "org/name", "s3://b/k", "builtin:microcode"):
        assert find_dataset(config, path) == path
    for name in ("contest", "mbp"):
        with pytest.raises(UserInputError):
            find_dataset(config, name)
