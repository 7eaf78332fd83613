"""Problems in the settings, collected and raised together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wmtp.exceptions import UserInputError


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in the settings.

    `file` is the file as the user named it or `--set <key>`; `line` counts from 1 and is None for an override
    or an unreadable file; `value` is what was found, as text without secrets, empty where nothing was.
    """

    file: str
    line: int | None
    key: str
    value: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        subject = place if not self.key or place == f"--set {self.key}" else f"{place}: {self.key}"
        found = f" (found {self.value})" if self.value else ""
        return f"{_one_line(f'{subject}: {self.rule}{found}')}\n    remedy: {_one_line(self.remedy)}"


def _one_line(text: str) -> str:
    """Write out line breaks and control characters, which could also drive a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class ConfigError(UserInputError):
    """Settings that cannot be used; `problems` holds every one that was found, in the order of the files."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        count = len(self.problems)
        heading = "1 problem in the settings" if count == 1 else f"{count} problems in the settings"
        super().__init__("\n".join([heading, *(f"  {problem}" for problem in self.problems)]))
