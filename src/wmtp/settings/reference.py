"""The reference page of every setting, made from the schemas so that it cannot drift from them."""

from __future__ import annotations

from collections.abc import Iterator

from wmtp.settings.base import Section
from wmtp.settings.config import Config
from wmtp.settings.fields import FieldDoc, format_value, list_fields
from wmtp.settings.recipe import Recipe

_INTRODUCTION = """\
# Settings

Two YAML files: the **config** says where a run happens, the **recipe** says what is run. This page is
made from the schemas by `wmtp.settings.render_reference`; `wmtp schema` prints the same as JSON schema.

- `${NAME}` and `${NAME:-default}` in a value are taken from the environment; write `$${` for a plain `${`.
- `--set section.key=value` on the command line wins over the files; the value is read as YAML.
- A key that is not listed here is an error, and all errors of both files are reported at once.
- Numbers are finite. Text is never taken for a number: `1e-3` is a number, `"1e-3"` is text.
- YAML follows version 1.2: only `true` and `false` are booleans.
"""


def render_reference() -> str:
    """Return the Markdown page: a table for each section, with key, type, default, constraint and meaning."""
    parts = [_INTRODUCTION]
    for title, schema in (("Config", Config), ("Recipe", Recipe)):
        parts.append(f"## {title}\n\n{schema.__doc__}\n")
        parts.extend(_render_sections(schema))
    return "\n".join(parts)


def _render_sections(schema: type[Section]) -> Iterator[str]:
    """Yield a heading and a table for each section that holds values."""
    fields = list_fields(schema)
    for section in (doc for doc in fields.values() if doc.section is not None):
        rows = [
            doc
            for doc in fields.values()
            if doc.section is None and doc.key.rpartition(".")[0] == section.key
        ]
        if rows:
            note = " Null unless given." if section.kind.endswith("or null") else ""
            yield f"### `{section.key}`\n\n{section.description}{note}\n"
            yield "| key | type | default | constraint | meaning |\n|---|---|---|---|---|"
            yield "\n".join(_render_row(doc) for doc in rows) + "\n"


def _render_row(doc: FieldDoc) -> str:
    """Return one row of a table."""
    default = "**required**" if doc.is_required else f"`{format_value(doc.default)}`"
    cells = (f"`{doc.key}`", doc.kind, default, doc.constraint, doc.description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
