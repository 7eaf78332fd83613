"""YAML text to plain data, with the place every value came from.

Scalars follow the core schema of YAML 1.2: `1e-3` is a number, `no` and `12:30` are text. PyYAML's own rules
are those of YAML 1.1, where they are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from wmtp.settings.environment import SubstitutionError, substitute
from wmtp.settings.errors import Problem

KeyPath = tuple[str | int, ...]
"""Keys from the top of the file down to a value; numbers index lists."""

MAX_NODES = 10_000
"""Values in one file; a few nested aliases can stand for billions."""

_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {
    f"{_TAG}null": re.compile(r"~|null|Null|NULL|"),
    f"{_TAG}bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    f"{_TAG}int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    f"{_TAG}float": re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from.

    `template` is the scalar as written, kept where the environment was substituted in it: errors show it and
    not the value. `text` is the substituted text, for fields that want text where it reads as a number.
    """

    file: str
    line: int | None
    template: str | None = None
    text: str | None = None


@dataclass(slots=True)
class Document:
    """A file of settings as plain data.

    `unreadable` holds the values that could not be read; they are absent from `data`.
    """

    file: str
    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    unreadable: dict[KeyPath, Problem] = field(default_factory=dict)

    def origin_of(self, path: KeyPath) -> Origin:
        """Return the place of `path`, or of the nearest section around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return Origin(self.file, 1)


def dotted(path: KeyPath) -> str:
    """Return `path` as it is written on the command line: `data.train.sources[0]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part.isprintable() and part else repr(part)
            text += f".{name}" if text else name
    return text


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's parser with the scalars of YAML 1.2."""


_CoreLoader.yaml_implicit_resolvers = {
    None: [(tag, re.compile(f"(?:{pattern.pattern})\\Z")) for tag, pattern in _SCALAR_TAGS.items()]
}


def _resolve_tag(text: str) -> str:
    """Return the tag of an unquoted scalar."""
    return next((tag for tag, pattern in _SCALAR_TAGS.items() if pattern.fullmatch(text)), f"{_TAG}str")


def _construct(tag: str, text: str) -> str | int | float | bool | None:
    """Return the value of a scalar; ValueError where `text` does not fit `tag`."""
    if tag == f"{_TAG}str":
        return text
    if tag not in _SCALAR_TAGS or not _SCALAR_TAGS[tag].fullmatch(text):
        raise ValueError(tag)
    kind = tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _explain_tag(tag: str) -> tuple[str, str]:
    """Return rule and remedy of a value that does not fit its tag."""
    if tag not in _SCALAR_TAGS:
        # Not named: a password that begins with ! looks like a tag.
        return "has a tag that is not plain data", "remove the tag; put text that begins with ! in quotes"
    return f"cannot be read as {tag.removeprefix(_TAG)}", "remove the tag, or shorten the number"


class _Reader:
    """Turns nodes into data, collecting origins and problems on the way."""

    def __init__(self, document: Document, environment: Mapping[str, str], *, has_lines: bool) -> None:
        self.document = document
        self.environment = environment
        self.has_lines = has_lines
        self.num_nodes = 0
        self.open_nodes: set[int] = set()

    def read(self, node: yaml.Node, path: KeyPath, line: int) -> tuple[bool, Any]:
        """Return whether the value could be read, and the value; `line` counts from 1."""
        self.num_nodes += 1
        shown_line = line if self.has_lines else None
        self.document.origins[path] = Origin(self.document.file, shown_line)
        if self.num_nodes > MAX_NODES or id(node) in self.open_nodes:
            rule = "contains itself" if id(node) in self.open_nodes else f"makes over {MAX_NODES} values"
            return self.fail(path, line, rule, "write the values out instead of using aliases")
        if isinstance(node, yaml.ScalarNode):
            return self.read_scalar(node, path, line)
        is_mapping = isinstance(node, yaml.MappingNode)
        if node.tag != f"{_TAG}{'map' if is_mapping else 'seq'}":
            return self.fail(path, line, *_explain_tag(node.tag))
        self.open_nodes.add(id(node))
        result = self.read_mapping(node, path) if is_mapping else self.read_list(node, path)
        self.open_nodes.discard(id(node))
        return result

    def read_mapping(self, node: yaml.Node, path: KeyPath) -> tuple[bool, dict[str, Any]]:
        """Read a section; a key that is not text or comes twice is a problem."""
        value: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != f"{_TAG}str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or section"
                rule = f"has the key {shown}, which is not text"
                self.fail(self.beside(path), line, rule, "put it in quotes, or rename it", key=path)
                continue
            key = key_node.value
            if key in lines:
                rule = f"is given twice, first on line {lines[key]}" if self.has_lines else "is given twice"
                self.fail(self.beside((*path, key)), line, rule, "keep one", key=(*path, key))
                continue
            lines[key] = line
            is_readable, item = self.read(value_node, (*path, key), line)
            if is_readable:
                value[key] = item
        return True, value

    def read_list(self, node: yaml.Node, path: KeyPath) -> tuple[bool, list[Any]]:
        """Read a list; without each of its items it cannot be used."""
        items = [
            self.read(item, (*path, index), item.start_mark.line + 1) for index, item in enumerate(node.value)
        ]
        return all(is_readable for is_readable, _ in items), [item for _, item in items]

    def read_scalar(self, node: yaml.ScalarNode, path: KeyPath, line: int) -> tuple[bool, Any]:
        """Read a scalar, after the environment has been substituted in it."""
        text, tag, raw = node.value, node.tag, node.value
        if "${" in raw:
            try:
                text = substitute(raw, self.environment)
            except SubstitutionError as error:
                return self.fail(path, line, error.rule, error.remedy)
            tag = _resolve_tag(text) if tag == f"{_TAG}str" else tag
            shown_line = line if self.has_lines else None
            self.document.origins[path] = Origin(self.document.file, shown_line, template=raw, text=text)
        try:
            return True, _construct(tag, text)
        except ValueError:
            return self.fail(path, line, *_explain_tag(tag))

    def beside(self, path: KeyPath) -> KeyPath:
        """Return a path of its own for a problem about `path` that has no value."""
        return (*path, -1 - len(self.document.unreadable))

    def fail(
        self, path: KeyPath, line: int, rule: str, remedy: str, *, key: KeyPath | None = None
    ) -> tuple[bool, Any]:
        """Record a problem at `path`, reported under `key` where that differs."""
        shown_line = line if self.has_lines else None
        name = dotted(path if key is None else key)
        self.document.unreadable[path] = Problem(self.document.file, shown_line, name, "", rule, remedy)
        return False, None


def parse_value(
    text: str, document: Document, path: KeyPath, environment: Mapping[str, str], *, has_lines: bool
) -> tuple[bool, Any]:
    """Read YAML text as the value at `path`; origins and problems go to `document`.

    Returns:
        Whether there is a value, and the value.
    """
    reader = _Reader(document, environment, has_lines=has_lines)
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        # Only the description is used, without names: PyYAML's excerpt of the line could show a secret.
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        problem = error.problem or error.context or ""
        if any(word in problem for word in ("alias", "anchor", "tag")):
            problem = problem.split("'")[0].strip()
        return reader.fail(path, line, f"is not valid YAML: {problem}", _syntax_remedy(text, line))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return reader.fail(path, line, f"is not valid YAML: {error.reason}", "remove that character")
    except RecursionError:
        return reader.fail(path, 1, "is nested too deeply", "write it flatter")
    if node is None:
        return True, None
    try:
        return reader.read(node, path, node.start_mark.line + 1)
    except RecursionError:
        return reader.fail(path, 1, "is nested too deeply", "write it flatter")


def _syntax_remedy(text: str, line: int) -> str:
    """Return what usually cures a syntax error on that line."""
    lines = text.splitlines()
    culprit = lines[line - 1] if line <= len(lines) else ""
    if "${" in culprit:
        return 'inside { } or [ ] put the reference in quotes: "${NAME}"'
    if "\t" in culprit:
        return "indent with spaces, not tabs"
    return "check indentation and colons here and one line before; quote text that begins with * & ! % @"
