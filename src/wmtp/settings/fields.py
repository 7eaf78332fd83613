"""A flat table of every field of a schema, for error messages and the reference page."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from wmtp.settings.base import Section

_BOUNDS = {
    "exclusiveMinimum": "> {}",
    "minimum": ">= {}",
    "exclusiveMaximum": "< {}",
    "maximum": "<= {}",
}
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """What is known of a field: dotted key, kind and constraint in words, default, one line of documentation.

    `section` is the class of a section and None for a value; `default` is None as well where `is_required`.
    """

    key: str
    kind: str
    constraint: str
    default: Any
    is_required: bool
    is_secret: bool
    description: str
    examples: tuple[Any, ...]
    section: type[Section] | None


@cache
def list_fields(model: type[Section]) -> dict[str, FieldDoc]:
    """Return the fields of `model` by dotted key, in the order of the schema."""
    return {doc.key: doc for doc in _walk(model, "")}


def _walk(model: type[Section], prefix: str) -> Iterator[FieldDoc]:
    """Yield the fields of `model` and of its sections."""
    schema = model.model_json_schema()
    for name, info in model.model_fields.items():
        alias = info.alias or name
        section = _section_of(info.annotation)
        yield _document(f"{prefix}{alias}", info, schema["properties"][alias], section)
        if section is not None:
            yield from _walk(section, f"{prefix}{alias}.")


def _section_of(annotation: Any) -> type[Section] | None:
    """Return the section class of a field, or None where the field is a value."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for arm in get_args(annotation) if (found := _section_of(arm))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _document(key: str, info: FieldInfo, schema: dict[str, Any], section: type[Section] | None) -> FieldDoc:
    """Describe one field."""
    is_optional = type(None) in get_args(info.annotation)
    arms = [arm for arm in schema.get("anyOf", [schema]) if arm.get("type") != "null"]
    kind, constraint = ("section", "") if section is not None else _describe(arms[0])
    has_default = info.default is not PydanticUndefined
    return FieldDoc(
        key=key,
        kind=f"{kind} or null" if is_optional else kind,
        constraint=constraint,
        default=info.default if has_default else None,
        is_required=info.is_required() or (section is not None and _is_required(section)),
        is_secret=info.annotation is SecretStr or SecretStr in get_args(info.annotation),
        description=info.description or "",
        examples=tuple(info.examples or ()),
        section=section,
    )


def _is_required(section: type[Section]) -> bool:
    """Say whether a section holds a field without default."""
    return any(info.is_required() for info in section.model_fields.values())


def _describe(schema: dict[str, Any]) -> tuple[str, str]:
    """Return type and constraint in words."""
    if "enum" in schema or "const" in schema:
        return "choice", " | ".join(str(choice) for choice in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        return _describe_list(schema)
    bounds = [form.format(_number(schema[bound])) for bound, form in _BOUNDS.items() if bound in schema]
    if schema.get("minLength") == 1:
        bounds.append("not empty")
    if "pattern" in schema:
        bounds.append(f"matches {schema['pattern']}")
    return _TYPES[schema["type"]], ", ".join(bounds)


def _describe_list(schema: dict[str, Any]) -> tuple[str, str]:
    """Return type and constraint of a list or a tuple."""
    items = schema["items"] if "items" in schema else schema["prefixItems"][0]
    kind, constraint = _describe(items)
    parts = []
    if "prefixItems" in schema:
        parts.append(f"exactly {len(schema['prefixItems'])}")
    elif schema.get("minItems"):
        parts.append(f"at least {schema['minItems']}")
    if constraint:
        parts.append(f"each {constraint}")
    return f"list of {kind if kind == 'text' else f'{kind}s'}", ", ".join(parts)


def _number(value: float) -> str:
    """Write a bound without a needless fraction."""
    return f"{value:g}" if abs(value) < 1e6 else f"{int(value)}"


def format_value(value: Any) -> str:
    """Write a value as in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_value(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
