"""Checking a document against its schema so that every problem is found in one go.

Pydantic stops at the rules over several fields while a single field is wrong. So wrong values are taken out
and the rest is checked again; what depends on a value that was taken out is not judged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from wmtp.settings.availability import find_unavailable
from wmtp.settings.base import RULE_ERROR_TYPE, Section, Violation
from wmtp.settings.errors import Problem
from wmtp.settings.fields import FieldDoc, format_value, list_fields
from wmtp.settings.redaction import show_value
from wmtp.settings.source import Document, KeyPath, dotted
from wmtp.settings.suggestions import explain_unknown_key, nearest_choice

SectionT = TypeVar("SectionT", bound=Section)

_KINDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "list_type": "must be a list: [a, b]",
    "tuple_type": "must be a list: [a, b]",
    "model_type": "must be a section: keys with values, one a line",
    "dict_type": "must be a section: keys with values, one a line",
    "model_attributes_type": "must be a section: keys with values, one a line",
    "finite_number": "must be finite, not NaN or infinity",
    "string_too_short": "must not be empty",
    "missing": "lacks an entry",
}
_BOUNDS = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be one of {expected}",
}


@dataclass(slots=True)
class Checked(Generic[SectionT]):
    """A document after its check.

    `model` is None where anything is wrong; `data` is what remains without wrong values, `failed` their keys.
    """

    document: Document
    schema: type[SectionT]
    model: SectionT | None = None
    data: dict[str, Any] = field(default_factory=dict)
    failed: set[KeyPath] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def value_at(self, key: str) -> Any:
        """Return the value of a dotted key, its default where it is not given."""
        value: Any = self.data
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return list_fields(self.schema)[key].default
            value = value[part]
        return value

    def has_failed(self, keys: Iterable[str]) -> bool:
        """Say whether one of the dotted keys, or a section around it, was found wrong."""
        paths = [tuple(key.split(".")) for key in keys]
        return any(path[: len(failed)] == failed for path in paths for failed in self.failed)

    def report(self, violation: Violation) -> None:
        """Add a rule that does not hold, unless it was judged on a value that is wrong by itself."""
        if self.has_failed((violation.key, *violation.involves)):
            return
        path = tuple(violation.key.split("."))
        value = self.value_at(violation.key)
        shown = "" if value is None else show_value(self.document, path, value)
        self.add(path, violation.rule, violation.remedy, shown)

    def add(self, path: KeyPath, rule: str, remedy: str, value: str = "") -> None:
        """Add a problem at `path`."""
        origin = self.document.origin_of(path)
        self.problems.append(Problem(origin.file, origin.line, dotted(path), value, rule, remedy))


def check(document: Document, schema: type[SectionT]) -> Checked[SectionT]:
    """Check `document` against `schema`, including what is not available yet."""
    checked = Checked(document, schema, data=copy.deepcopy(document.data))
    checked.problems.extend(document.unreadable.values())
    checked.failed.update(_value_path(path) for path in document.unreadable)
    for path in document.unreadable:
        is_value = bool(path) and not isinstance(path[-1], int)
        section = list_fields(schema).get(dotted(path[:-1]))
        is_in_section = len(path) == 1 or (section is not None and section.section is not None)
        if is_value and is_in_section and dotted(path) not in list_fields(schema):
            checked.add(path, *explain_unknown_key(dotted(path), schema))
    model = _validate_what_is_right(checked)
    for violation in find_unavailable(checked.data):
        checked.report(violation)
    checked.model = None if checked.problems else model
    return checked


def _validate_what_is_right(checked: Checked[SectionT]) -> SectionT | None:
    """Take wrong values out until what is left passes, or only rules over several fields fail."""
    while True:
        before = copy.deepcopy(checked.data)
        try:
            return checked.schema.model_validate(checked.data)
        except ValidationError as error:
            details = error.errors(include_url=False)
            if details[0]["type"] == RULE_ERROR_TYPE:
                for violation in details[0]["ctx"]["violations"]:
                    checked.report(violation)
                return None
            for detail in details:
                _handle(detail, checked)
            if checked.data == before:
                raise


def _handle(detail: ErrorDetails, checked: Checked[SectionT]) -> None:
    """Report one of pydantic's errors and change the data so that it does not come again."""
    path = detail["loc"]
    key = _value_path(path)
    doc = list_fields(checked.schema).get(dotted(key))
    if detail["type"] == "missing" and key == path:
        _fill_missing(path, doc, checked)
        return
    text = checked.document.origin_of(path).text
    if detail["type"] == "string_type" and text is not None:
        # A substituted `123` reads as a number; this field wants it as text.
        _assign(checked.data, path, text)
        return
    value = _value_in(checked.document.data, path)
    if detail["type"] == "extra_forbidden":
        rule, remedy = explain_unknown_key(dotted(path), checked.schema)
    else:
        rule, remedy = _explain(detail, doc, value)
    checked.add(path, rule, remedy, show_value(checked.document, path, value))
    checked.failed.add(key)
    _remove(checked.data, key)


def _fill_missing(path: KeyPath, doc: FieldDoc | None, checked: Checked[SectionT]) -> None:
    """Put an example in the place of a required value, after reporting that it is missing."""
    if doc is None:
        raise KeyError(dotted(path))
    if doc.section is not None:
        _assign(checked.data, path, {})
        return
    example = doc.examples[0]
    if not checked.has_failed([doc.key]):
        checked.add(
            path, "is required", f"add it, such as {doc.key}: {format_value(example)}; {_wanted(doc)}"
        )
    checked.failed.add(path)
    _assign(checked.data, path, example)


def _explain(detail: ErrorDetails, doc: FieldDoc | None, value: Any) -> tuple[str, str]:
    """Return rule and remedy of an error about a known field."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _KINDS:
        rule = _KINDS[kind]
    elif kind in _BOUNDS:
        rule = _BOUNDS[kind].format(**context).replace("'", "")
    else:
        rule = f"cannot be used: {detail['msg'].lower()}"
    if doc is None:
        return rule, "correct it"
    if doc.section is not None:
        return rule, f"give its keys, or remove it: {doc.description[:1].lower()}{doc.description[1:]}"
    remedy = _wanted(doc)
    if kind == "literal_error":
        near = nearest_choice(value, doc.constraint.removeprefix("each ").split(" | "))
        remedy = f"did you mean {near}?" if near else remedy
    return rule, remedy


def _wanted(doc: FieldDoc) -> str:
    """Say what a field takes."""
    constraint = f" ({doc.constraint})" if doc.constraint else ""
    default = "" if doc.is_required else f", default {format_value(doc.default)}"
    return f"expected {doc.kind}{constraint}{default}"


def _value_path(path: KeyPath) -> KeyPath:
    """Return the path of the field that holds `path`: up to the first list index."""
    length = next((index for index, part in enumerate(path) if isinstance(part, int)), len(path))
    return path[:length]


def _value_in(data: Any, path: KeyPath) -> Any:
    """Return the value at `path`, or None where there is none."""
    for part in path:
        is_present = (
            part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        )
        if not is_present:
            return None
        data = data[part]
    return data


def _assign(data: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set the value at `path`; the sections and lists around it exist or are made."""
    target: Any = data
    for part in path[:-1]:
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[part]
    target[path[-1]] = value


def _remove(data: dict[str, Any], path: KeyPath) -> None:
    """Remove the value at `path`."""
    section = _value_in(data, path[:-1])
    section.pop(path[-1], None)
