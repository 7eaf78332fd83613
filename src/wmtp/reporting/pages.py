"""The templates of all HTML pages, with the same rules for each."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from wmtp.reporting.text import format_percent, visible


def page_template(name: str) -> Template:
    """A template of `wmtp.reporting`; what it is given is escaped, and a name it lacks is an error."""
    environment = Environment(
        loader=PackageLoader("wmtp.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = format_percent
    environment.filters["visible"] = visible
    return environment.get_template(name)
