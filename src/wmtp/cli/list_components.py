"""`wmtp list`: the registered components."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def list_components(
    kind: Annotated[str | None, typer.Argument(help="loader, trainer, scorer, ...; default: all.")] = None,
) -> None:
    """Show the registered components: built-in ones and those of installed plug-ins."""
    from wmtp.components.registry import registry

    table = Table("kind", "key", "version", "what it is", box=None, header_style="bold", pad_edge=False)
    for registration in registry.list(kind):
        table.add_row(registration.category, registration.key, registration.version, registration.description)
    Console().print(table)
