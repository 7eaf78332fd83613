"""`--set a.b=c`: values from the command line, put over those of the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from wmtp.settings.errors import Problem
from wmtp.settings.source import Document, KeyPath, Origin, dotted, parse_value
from wmtp.settings.suggestions import SCHEMAS, nearest_keys, owner_of


def apply_overrides(
    overrides: Iterable[str], documents: Mapping[str, Document], environment: Mapping[str, str]
) -> list[Problem]:
    """Put each `a.b=c` into the document that owns its top-level key; the value is read as YAML.

    Args:
        overrides: as given on the command line; later ones win.
        documents: by the names of `SCHEMAS`; changed in place.
        environment: for `${NAME}` in the values.

    Returns:
        What is wrong with the overrides themselves. Wrong values are found when the documents are checked.
    """
    problems = [_apply(override, documents, environment) for override in overrides]
    return [problem for problem in problems if problem is not None]


def _apply(
    override: str, documents: Mapping[str, Document], environment: Mapping[str, str]
) -> Problem | None:
    """Apply one override, or say what is wrong with it."""
    key, equals, text = (part.strip() for part in override.partition("="))
    path: KeyPath = tuple(key.split("."))
    if not equals or not all(path):
        rule = "is not of the form section.key=value"
        return Problem(
            "--set", None, key if equals else "", "", rule, "write for example --set train.max_steps=100"
        )
    label = f"--set {dotted(path)}"
    owner = owner_of(key)
    if owner is None:
        near = nearest_keys(key, next(iter(SCHEMAS.values())))
        tops = ", ".join(name for schema in SCHEMAS.values() for name in schema.model_fields)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"a key begins with one of: {tops}"
        return Problem(label, None, "", "", "is not a known key", remedy)
    document = documents.get(owner)
    if document is None:
        given = next(iter(documents))
        return Problem(
            label, None, "", "", f"belongs to the {owner}, and only the {given} is read", "remove it"
        )
    section = _section_for(document, path, label)
    if section is None:
        return Problem(
            label, None, "", "", "goes below a key that is not a section", "set that key as a whole"
        )
    _replace(document, section, path, label, text, environment)
    return None


def _section_for(document: Document, path: KeyPath, label: str) -> dict[str, Any] | None:
    """Return the section that holds `path`, made where absent; None where a value or a list is in the way."""
    section: dict[str, Any] = document.data
    for index, part in enumerate(path[:-1]):
        if section.get(str(part)) is None:
            section[str(part)] = {}
            document.origins.setdefault(path[: index + 1], Origin(label, None))
        below = section[str(part)]
        if not isinstance(below, dict):
            return None
        section = below
    return section


def _replace(
    document: Document,
    section: dict[str, Any],
    path: KeyPath,
    label: str,
    text: str,
    environment: Mapping[str, str],
) -> None:
    """Read `text` as the value at `path` and forget what the file said about it."""
    for known in (document.origins, document.unreadable):
        for old in [each for each in known if each[: len(path)] == path]:
            del known[old]
    scratch = Document(label)
    is_readable, value = parse_value(text, scratch, path, environment, has_lines=False)
    document.origins.update(scratch.origins)
    document.origins.setdefault(path, Origin(label, None))
    document.unreadable.update(scratch.unreadable)
    section.pop(str(path[-1]), None)
    if is_readable:
        section[str(path[-1])] = value
