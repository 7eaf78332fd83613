"""What an unknown key probably means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from wmtp.settings.base import Section
from wmtp.settings.config import Config
from wmtp.settings.fields import list_fields
from wmtp.settings.recipe import Recipe

SCHEMAS: dict[str, type[Section]] = {"config": Config, "recipe": Recipe}
"""The two files by name."""

_OLD_KEYS = {"storage": "", "paths.cache": "; there is no cache folder any more"}
_MAX_SUGGESTIONS = 3


def owner_of(key: str) -> str | None:
    """Return the file (config or recipe) that owns a dotted key by its first part, or None."""
    top = key.split(".")[0]
    return next((name for name, schema in SCHEMAS.items() if top in list_fields(schema)), None)


def explain_unknown_key(key: str, schema: type[Section]) -> tuple[str, str]:
    """Return rule and remedy for a dotted key that `schema` does not have."""
    if key in _OLD_KEYS:
        return f"is a key of the older layout{_OLD_KEYS[key]}", "run `wmtp migrate`"
    owner = owner_of(key)
    if owner is not None and schema is not SCHEMAS[owner]:
        return f"belongs in the {owner}", f"move it to the {owner} file"
    fields = list_fields(schema)
    if key in fields:
        nested = "".join(f"{part}: {{" for part in key.split("."))[:-3] + ": ..." + "}" * key.count(".")
        return "is a dotted key, which only --set takes", f"nest it: {nested}"
    suggestions = nearest_keys(key, schema)
    if suggestions:
        return "is not a known key", f"did you mean {' or '.join(suggestions)}?"
    section = key.rpartition(".")[0]
    siblings = [name.rpartition(".")[2] for name in fields if name.rpartition(".")[0] == section]
    where = f"{section} has" if section else "the file has"
    return "is not a known key", f"remove it; {where}: {', '.join(siblings)}"


def nearest_keys(key: str, schema: type[Section]) -> list[str]:
    """Return the known keys that `key` most likely stands for, best first.

    A similar name in the same section comes first, then the same or a similar name in any other.
    """
    section, _, name = key.rpartition(".")
    own = [known for known in list_fields(schema) if known.rpartition(".")[0] == section]
    others = [known for each in (schema, *SCHEMAS.values()) for known in list_fields(each)]
    by_name = {known.rpartition(".")[2]: known for known in own}
    similar = difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)
    if similar:
        return [by_name[similar[0]]]
    near = difflib.get_close_matches(name, {known.rpartition(".")[2] for known in others}, n=1, cutoff=0.8)
    matches = _unique(known for known in others if near and known.rpartition(".")[2] == near[0])
    return matches[:_MAX_SUGGESTIONS]


def nearest_choice(value: object, choices: Iterable[str]) -> str | None:
    """Return the choice that `value` most likely stands for."""
    near = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    return near[0] if near else None


def _unique(keys: Iterable[str]) -> list[str]:
    """Return the keys once each, in their order."""
    return list(dict.fromkeys(keys))
