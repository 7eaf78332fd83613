"""Values that the schemas know and this version cannot do yet: the one place that says so.

A line goes when its feature arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from wmtp.settings.base import Section, Violation
from wmtp.settings.errors import ConfigError, Problem
from wmtp.settings.fields import format_value

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class _Unavailable:
    """A key with the values that are not available, and what to use in their place."""

    key: str
    is_unavailable: Callable[[Any], bool]
    instead: str


def _among(*values: str) -> Callable[[Any], bool]:
    """Match these values, and lists that hold one of them."""
    return lambda value: any(item in values for item in (value if isinstance(value, list) else [value]))


def _is_remote(value: Any) -> bool:
    """Match paths on a remote store."""
    return isinstance(value, str) and "://" in value and not value.startswith("file://")


def _is_set(value: Any) -> bool:
    """Match anything but null."""
    return value is not None


def _is_remote_and_not_s3(value: Any) -> bool:
    """Match paths on a remote store that models are not read from."""
    return _is_remote(value) and not str(value).lower().startswith("s3://")


_MODEL_PATH = "use a local directory, a hub id or an s3:// address"

_TABLE = (
    _Unavailable("launcher.target", _among("vessl", "slurm", "skypilot"), "use local"),
    _Unavailable(
        "launcher.resources.gpus",
        lambda value: isinstance(value, int) and value > 1,
        "use 1 (or 0 for CPU only)",
    ),
    _Unavailable("devices.compile", lambda value: value is True, "use false"),
    _Unavailable("devices.strategy", _among("ddp", "fsdp2"), "use auto or single"),
    _Unavailable("launcher.resources.gpu_type", _is_set, "remove it; runs use what this machine has"),
    _Unavailable("paths.models.base", _is_remote_and_not_s3, _MODEL_PATH),
    _Unavailable("paths.models.ref", _is_remote_and_not_s3, _MODEL_PATH),
    _Unavailable("paths.models.rm", _is_remote_and_not_s3, _MODEL_PATH),
    _Unavailable("paths.output", _is_remote_and_not_s3, "use a local directory or an s3:// address"),
    _Unavailable("model.base_id", _is_remote_and_not_s3, _MODEL_PATH),
    _Unavailable("model.ref_id", _is_remote_and_not_s3, _MODEL_PATH),
    _Unavailable("model.rm_id", _is_remote_and_not_s3, _MODEL_PATH),
    _Unavailable("rho1.reference", _among("precomputed"), "use online"),
    _Unavailable(
        "critic.value_head",
        _is_remote_and_not_s3,
        "use a local path, an s3:// address, models:/name/version, or null to train one",
    ),
)


def find_unavailable(data: Mapping[str, Any]) -> Iterator[Violation]:
    """Yield what `data`, a config or a recipe as plain data, asks for and this version cannot do yet."""
    for row in _TABLE:
        value = _look_up(data, row.key)
        if value is not _ABSENT and row.is_unavailable(value):
            yield Violation(row.key, "is known, but not available in this version yet", row.instead)


def require_available(model: Section) -> None:
    """Raise `ConfigError` where a model built without the loader asks for what is not available yet."""
    data = model.model_dump()
    problems = [
        Problem(
            type(model).__name__.lower(),
            None,
            violation.key,
            "a section" if isinstance(value := _look_up(data, violation.key), dict) else format_value(value),
            violation.rule,
            violation.remedy,
        )
        for violation in find_unavailable(data)
    ]
    if problems:
        raise ConfigError(problems)


def _look_up(data: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key, or `_ABSENT`."""
    value: Any = data
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value
