"""Keeping secrets out of logs and error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from wmtp.settings.base import Section
from wmtp.settings.config import Config
from wmtp.settings.fields import format_value, list_fields
from wmtp.settings.source import Document, KeyPath, dotted

HIDDEN = "**********"
"""What stands in the place of a secret."""

_MAX_SHOWN = 80
_SECRET_NAME = re.compile(r"keys?$|key_?id|secret|token$|passw|credential", re.IGNORECASE)
_DEFAULT = re.compile(r":-[^}]*\}")
# Up to the last @ before the path: a password may have one that is not encoded.
_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
_QUERY_SECRET = re.compile(
    r"([?&;][^=&;\s]*(?:key|secret|token|passw|sig|credential)[^=&;\s]*=)[^&;\s]+", re.IGNORECASE
)


def redact_text(text: str) -> str:
    """Hide user names, passwords and signed queries in the addresses inside `text`."""
    return _QUERY_SECRET.sub(rf"\1{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", text))


def redacted_dump(model: Section) -> dict[str, Any]:
    """Return the settings as plain data for a log, a report or tracking: keys as in YAML, secrets hidden."""
    dump = _redact(model.model_dump(mode="json"))
    if not isinstance(dump, dict):
        raise TypeError(f"a section dumps to a mapping, not to {type(dump)}")
    return dump


def _redact(value: Any) -> Any:
    """Hide secrets in the addresses inside nested plain data."""
    if isinstance(value, dict):
        return {key: _redact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def show_value(document: Document, path: KeyPath, value: Any) -> str:
    """Return `value` for an error message: one short line, no secret, nothing of the environment."""
    template = document.origin_of(path).template
    if template is not None:
        return _shorten(redact_text(_DEFAULT.sub(":-...}", template)))
    if isinstance(value, dict):
        return "a section"
    if value is not None and may_be_secret(path):
        return HIDDEN
    if isinstance(value, list):
        is_plain = not any(
            isinstance(item, list | dict) or document.origin_of((*path, index)).template
            for index, item in enumerate(value)
        )
        return _shorten(redact_text(format_value(value))) if is_plain else f"a list of {len(value)}"
    return _shorten(redact_text(repr(value) if isinstance(value, str) else format_value(value)))


def may_be_secret(path: KeyPath) -> bool:
    """Say whether a value at `path` could be a secret: by name, or because it stands where secrets do.

    A mistyped key still holds what its author meant it to hold, so unknown keys beside secrets count too.
    """
    key = dotted(path)
    fields = list_fields(Config)
    secrets = [doc.key for doc in fields.values() if doc.is_secret]
    if key in fields:
        return any(secret == key or secret.startswith(f"{key}.") for secret in secrets)
    in_secret_section = any(key.rpartition(".")[0] == secret.rpartition(".")[0] for secret in secrets)
    return in_secret_section or _has_secret_name(str(part) for part in path)


def _has_secret_name(names: Iterable[str]) -> bool:
    """Say whether a name sounds like a secret's."""
    return any(_SECRET_NAME.search(name) for name in names)


def _shorten(text: str) -> str:
    """Cut a long text."""
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
