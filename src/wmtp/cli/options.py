"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="Where it runs (YAML).", show_default=False)
]
RecipeOption = Annotated[Path, typer.Option("--recipe", "-r", help="What is run (YAML).", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Override one setting, such as optim.lr=1e-4; may be repeated.", metavar="KEY=VALUE"
    ),
]
RunNameOption = Annotated[
    str | None, typer.Option(help="Name of the run's folders; default: algorithm, data, time.")
]
TagsOption = Annotated[str | None, typer.Option(help="Tags of the MLflow run, separated by commas.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Build everything, run one batch, write nothing.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print the settings in force.")]
UnsafeOption = Annotated[
    bool,
    typer.Option(
        "--unsafe-execution", help="Run generated programs without a sandbox, with process limits alone."
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let models run code that comes with them.")
]


def split_tags(tags: str | None) -> tuple[str, ...]:
    """`a,b` as a tuple, blanks removed."""
    return tuple(tag.strip() for tag in (tags or "").split(",") if tag.strip())
