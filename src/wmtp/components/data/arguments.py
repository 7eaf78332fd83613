"""Component settings given as a mapping, checked like the dataclass they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from wmtp.exceptions import UserInputError

SettingsT = TypeVar("SettingsT")


def settings_of(settings_class: type[SettingsT], given: SettingsT | Mapping[str, Any] | None) -> SettingsT:
    """Take settings as they are, or make them from a mapping, whose keys must be field names.

    Args:
        settings_class: a dataclass of which every field has a default.
        given: an instance of it, a mapping, or None for all defaults.

    Raises:
        UserInputError: a key is no field (the known ones are listed), or `given` is something else.
    """
    if isinstance(given, settings_class):
        return given
    values = {} if given is None else given
    if not isinstance(values, Mapping):
        raise UserInputError(
            f"{settings_class.__name__} cannot be made from {type(given).__name__}",
            remedy="pass a mapping, or an instance of it",
        )
    known = [field.name for field in fields(settings_class)]  # type: ignore[arg-type]  # a dataclass
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserInputError(
            f"{settings_class.__name__} has no field {', '.join(unknown)}",
            remedy=f"known ones: {', '.join(known)}",
        )
    return settings_class(**values)
