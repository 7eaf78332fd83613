"""Writing a config file in the order of the schema, with comments."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from wmtp.exceptions import UserInputError
from wmtp.pipelines.migrate_layout import OldFile
from wmtp.settings import Config
from wmtp.settings.fields import list_fields
from wmtp.storage import write_bytes_atomic

# Old section -> the section that its comment goes to.
_SECTIONS = {"storage": "s3", "s3_auth": "s3"}


@dataclass(frozen=True, slots=True)
class NewValue:
    """A value of the new file.

    Attributes:
        key: dotted.
        written: as it is written, with quotes where it has them.
        above: comment lines above it.
        beside: comment at the end of its line.
    """

    key: str
    written: str
    above: tuple[str, ...] = ()
    beside: str = ""


def write_config(
    old: OldFile,
    values: Mapping[str, NewValue],
    *,
    disabled: Mapping[str, str],
    dropped: Sequence[str],
) -> str:
    """Return the text of the new file.

    Args:
        old: the old file, for its comments.
        values: by dotted key.
        disabled: keys that are written as comments, with the reason.
        dropped: lines about old keys without a successor, for the end of the file.
    """
    lines = [*old.header, f"# Made from {old.path.name} by `wmtp migrate`."]
    comments = {_SECTIONS.get(name, name): text for name, text in old.section_comments.items()}
    open_sections: list[str] = []
    active = {key.rpartition(".")[0] for key in values if key not in disabled}
    for key in list_fields(Config):
        if key not in values:
            continue
        value = values[key]
        sections = key.split(".")[:-1]
        shared = 0
        while shared < min(len(sections), len(open_sections)) and sections[shared] == open_sections[shared]:
            shared += 1
        for depth in range(shared, len(sections)):
            name = ".".join(sections[: depth + 1])
            lines += [""] if depth == 0 else []
            lines += [f"{'  ' * depth}{comment}" for comment in comments.get(name, ())]
            is_empty = not any(section == name or section.startswith(f"{name}.") for section in active)
            # A section of comments alone is no section to YAML but null, which stands for its defaults.
            about = "   # nothing of it is in use" if is_empty else ""
            lines.append(f"{'  ' * depth}{sections[depth]}:{about}")
        open_sections = sections
        lines += _lines_of(value, "  " * len(sections), disabled.get(key))
    if dropped:
        lines += ["", "# Keys of the older file that have no successor here:"]
        lines += [f"#   {line}" for line in dropped]
    return "\n".join(lines) + "\n"


def _lines_of(value: NewValue, indent: str, reason: str | None) -> list[str]:
    name = value.key.rpartition(".")[2]
    lines = [f"{indent}{comment}" for comment in value.above]
    if reason is not None:
        return [*lines, f"{indent}# {name}: {value.written}   # {reason}"]
    beside = f"  {value.beside}" if value.beside else ""
    return [*lines, f"{indent}{name}: {value.written}{beside}"]


@dataclass(frozen=True, slots=True)
class SavedConfig:
    """Where a migrated config was written, and the copy of what was there before, if anything."""

    path: Path
    backup: Path | None


def place_of(source: Path, output: Path | None, *, force: bool) -> Path:
    """Where the new file goes: beside the old one, unless `output` says otherwise.

    Raises:
        UserInputError: a file is there and `force` was not given, or a folder.
    """
    path = source.with_name(f"{source.stem}.new{source.suffix}") if output is None else output
    if path.is_dir():
        raise UserInputError(f"{path} is a folder", remedy="give the name of a file with --output")
    if path.exists() and not force:
        raise UserInputError(
            f"{path} exists already, and nothing was written",
            remedy="choose another place with --output, or replace it with --force, which keeps a copy",
        )
    return path


def save_config(text: str, path: Path, *, source: Path) -> SavedConfig:
    """Write the new file with the permissions of the old one, `source`.

    What is at the place is copied to `<name>.bak-<time>` first.

    Raises:
        UserInputError: it cannot be written.
    """
    backup = None
    try:
        mode = stat.S_IMODE(source.stat().st_mode)
        if path.exists():
            stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S-%f")
            backup = path.with_name(f"{path.name}.bak-{stamp}")
            shutil.copy2(path, backup)
        write_bytes_atomic(path, text.encode())
        path.chmod(mode)
    except OSError as error:
        raise UserInputError(
            f"{path} cannot be written: {error.strerror}", remedy="choose another place with --output"
        ) from error
    return SavedConfig(path, backup)
