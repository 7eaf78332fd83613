"""`${NAME}` and `${NAME:-default}` in scalars of the settings."""

from __future__ import annotations

import re
from collections.abc import Mapping

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<body>[^}]*)\}|\$\{")
_BODY = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>.*))?", re.DOTALL)


class SubstitutionError(ValueError):
    """A reference that has no value or no form; carries a rule and a remedy."""

    def __init__(self, rule: str, remedy: str) -> None:
        super().__init__(rule)
        self.rule = rule
        self.remedy = remedy


def substitute(text: str, environment: Mapping[str, str]) -> str:
    """Replace the references in `text`; `$${` stands for a plain `${`.

    As in a shell, `:-default` also holds where the variable is set but empty. Values stay as they are.

    Raises:
        SubstitutionError: a variable without value and default, or a reference that cannot be read.
    """

    def replace(match: re.Match[str]) -> str:
        if match.group() == "$${":
            return "${"
        body = match.group("body")
        parsed = _BODY.fullmatch(body) if body is not None else None
        if parsed is None or "${" in (body or ""):
            raise SubstitutionError(
                f"has a reference that cannot be read: ${{{(body or '').split(':-')[0]}...",
                "write ${NAME} or ${NAME:-default}, not nested; write $${ for a plain ${",
            )
        name, default = parsed.group("name"), parsed.group("default")
        value = environment.get(name)
        if default is not None:
            return value or default
        if value is None:
            raise SubstitutionError(
                f"needs the environment variable {name}, which is not set",
                f"set {name}, or give a default: ${{{name}:-default}}",
            )
        return value

    return _REFERENCE.sub(replace, text)
