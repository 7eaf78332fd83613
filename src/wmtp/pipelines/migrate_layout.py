"""A config file of the older layout as text: every value as it was written, with its comments.

Values are kept as text, because what is written anew must read the same: `${NAME}` stays `${NAME}`, and
quoted text stays text. PyYAML gives the positions; comments, which it drops, are taken from the lines around.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from wmtp.exceptions import UserInputError

_MAX_FILE_BYTES = 2**20
_COMMENT_LINE = re.compile(r"\s*#")
_TRAILING_COMMENT = re.compile(r"\s+(#.*)")
# YAML 1.1, which the older program read, takes these for true and false; YAML 1.2 for text.
_OLD_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


@dataclass(frozen=True, slots=True)
class OldValue:
    """A value of the older file.

    Attributes:
        key: dotted.
        text: the scalar without quotes; a list as one line of YAML.
        written: as it is written in the new file, with quotes where it had them.
        line: counted from 1.
        above: comment lines directly above it, without indentation.
        beside: comment at the end of its line, "" where there is none.
    """

    key: str
    text: str
    written: str
    line: int
    above: tuple[str, ...] = ()
    beside: str = ""

    @property
    def is_null(self) -> bool:
        """Whether nothing is set."""
        return not self.text or self.written.lower() in ("~", "null")


@dataclass(frozen=True, slots=True)
class OldFile:
    """A file of the older layout: values by dotted key, the comment at its top, and those above sections."""

    path: Path
    values: dict[str, OldValue]
    header: tuple[str, ...] = ()
    section_comments: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def text(self, key: str) -> str | None:
        """The value of a key as text; None where it is absent or null."""
        value = self.values.get(key)
        return None if value is None or value.is_null else value.text

    def has_section(self, name: str) -> bool:
        """Whether any value lies under a dotted key."""
        return any(key.startswith(f"{name}.") for key in self.values)


def read_old_file(path: Path) -> OldFile:
    """Read a YAML file without substituting anything in it.

    Raises:
        UserInputError: it is missing, no text, no YAML, or has no sections.
    """
    text = _read_text(path)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UserInputError(
                f"{path} holds no sections at its top", remedy="give a config file, such as config.local.yaml"
            )
        reader = _Reader(loader, text.splitlines())
        values = {value.key: value for value in reader.walk(node, "")}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f":{mark.line + 1}"
        # Without PyYAML's excerpt of the line, which could show a secret.
        raise UserInputError(
            f"{path}{where} is not valid YAML: {error.problem or error.context}",
            remedy='check that line; inside { } or [ ] a reference needs quotes: "${NAME}"',
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserInputError(f"{path} is not valid YAML", remedy="save it again as UTF-8 text") from error
    return OldFile(path, values, reader.header, reader.sections)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise UserInputError(
            f"{path} does not exist", remedy=f"check the path; the working directory is {Path.cwd()}"
        ) from error
    except OSError as error:
        raise UserInputError(
            f"{path} cannot be read: {error.strerror}", remedy="give the YAML file itself"
        ) from error
    if len(content) > _MAX_FILE_BYTES:
        raise UserInputError(f"{path} is larger than 1 MiB, which no config is", remedy="check the path")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserInputError(f"{path} is not UTF-8 text", remedy="save it as UTF-8") from error


class _Reader:
    """Walks the sections of a file; `sections` collects the comments above them."""

    def __init__(self, loader: yaml.SafeLoader, lines: list[str]) -> None:
        self._loader = loader
        self._lines = lines
        self._header_end = _header_end(lines)
        self.sections: dict[str, tuple[str, ...]] = {}

    @property
    def header(self) -> tuple[str, ...]:
        """The comment at the top, which is about the file."""
        return tuple(line.strip() for line in self._lines[: self._header_end] if line.strip())

    def walk(self, node: yaml.MappingNode, prefix: str) -> Iterator[OldValue]:
        """Yield the values of a section and of those in it."""
        self._loader.flatten_mapping(node)
        for key_node, value_node in node.value:
            key, line = f"{prefix}{key_node.value}", key_node.start_mark.line
            begins_line = not self._lines[line][: key_node.start_mark.column].strip()
            above = self._comments_above(line) if begins_line else ()
            if isinstance(value_node, yaml.MappingNode) and value_node.value:
                self.sections[key] = above
                yield from self.walk(value_node, f"{key}.")
            else:
                text, written = _scalar(value_node)
                yield OldValue(key, text, written, line + 1, above, self._comment_beside(value_node))

    def _comments_above(self, line: int) -> tuple[str, ...]:
        begin = line
        while begin > self._header_end and _COMMENT_LINE.match(self._lines[begin - 1]):
            begin -= 1
        return tuple(comment.strip() for comment in self._lines[begin:line])

    def _comment_beside(self, node: yaml.Node) -> str:
        end = node.end_mark
        if end.line != node.start_mark.line or end.line >= len(self._lines):
            return ""
        found = _TRAILING_COMMENT.fullmatch(self._lines[end.line][end.column :])
        return "" if found is None else found[1].strip()


def _header_end(lines: list[str]) -> int:
    """The line after the first block of comments of a file that begins with one."""
    end = 0
    while end < len(lines) and not lines[end].strip():
        end += 1
    begin = end
    while end < len(lines) and _COMMENT_LINE.match(lines[end]):
        end += 1
    return end if end > begin else 0


def _scalar(node: yaml.Node) -> tuple[str, str]:
    """Return a value as text, and as it is written."""
    if not isinstance(node, yaml.ScalarNode):
        return (shown := _flow(node)), shown
    if node.style is None:
        is_boolean = node.tag.endswith(":bool")
        plain = str(_OLD_BOOLEANS.get(node.value.lower(), node.value) if is_boolean else node.value)
        return node.value, plain if "\n" not in plain else quoted(plain)
    return node.value, quoted(node.value)


def quoted(text: str) -> str:
    """Write text in double quotes."""
    dumped = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=2**20)
    return dumped.strip()


def _flow(node: yaml.Node) -> str:
    plain = _plain(node)
    return str(yaml.safe_dump(plain, default_flow_style=True, width=2**20, allow_unicode=True)).strip()


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return yaml.SafeLoader("").construct_object(node)
