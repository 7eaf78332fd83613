"""JSON schema of both files, for editors and for `wmtp schema`."""

from __future__ import annotations

from typing import Any, Literal

from wmtp.settings.base import Section
from wmtp.settings.config import Config
from wmtp.settings.recipe import Recipe

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REFERENCE = {"type": "string", "pattern": r"\$\{.+\}", "description": "Substituted from the environment."}
_SUBSTITUTED = frozenset({"integer", "number", "boolean", "null"})


def json_schema(kind: Literal["config", "recipe"] | None = None) -> dict[str, Any]:
    """Return the JSON schema of a config or a recipe; without `kind`, both by name.

    Numbers and choices also take text with `${NAME}`, because files hold that before substitution.
    """
    schemas: dict[str, type[Section]] = {"config": Config, "recipe": Recipe}
    if kind is None:
        return {name: _schema_of(model) for name, model in schemas.items()}
    return _schema_of(schemas[kind])


def _schema_of(model: type[Section]) -> dict[str, Any]:
    """Return the schema of one file, as it is written."""
    schema = model.model_json_schema(mode="validation")
    for section in (schema, *schema.get("$defs", {}).values()):
        section["properties"] = {key: _with_reference(value) for key, value in section["properties"].items()}
    return {"$schema": _DIALECT, **schema}


def _with_reference(field: dict[str, Any]) -> dict[str, Any]:
    """Let a field that is not plain text take `${NAME}` too; sections and lists stay as they are."""
    arms = field.get("anyOf", [field])
    is_scalar = all(arm.get("type") in _SUBSTITUTED or "enum" in arm or "const" in arm for arm in arms)
    if not is_scalar:
        return field
    own = {
        key: value for key, value in field.items() if key in ("title", "description", "default", "examples")
    }
    rules = [{key: value for key, value in arm.items() if key not in own} for arm in arms]
    return {**own, "anyOf": [*rules, _REFERENCE]}
