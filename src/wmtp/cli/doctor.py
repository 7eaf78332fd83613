"""`wmtp doctor`: machine, GPU, S3, MLflow, sandbox: what works and what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wmtp.cli.options import SetOption

if TYPE_CHECKING:
    from wmtp.pipelines.doctor_check import Check

_STYLES = {"works": "green", "warning": "yellow", "broken": "bold red"}


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="Where runs happen (YAML); default: every default.", show_default=False
        ),
    ] = None,
    overrides: SetOption = None,
    write_probe: Annotated[
        bool,
        typer.Option(
            "--write-probe", help="Write to s3.bucket too, and delete that, where no results go there."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at machine, GPU, packages, output folder, S3, MLflow, hub and sandbox: what works and what to do.

    Exit code 0 when nothing is broken, 1 otherwise; nothing that is looked at is changed.
    """
    from wmtp.exceptions import UserInputError
    from wmtp.settings import Config, load_config

    if config is None and overrides:
        raise UserInputError("--set changes a config, and none was given", remedy="add --config")
    settings = Config() if config is None else load_config(config, overrides=overrides or [])
    try:
        from wmtp.pipelines.doctor import run_doctor, worst
    except ImportError as error:
        _print_broken_install(error, as_json=as_json)
        raise typer.Exit(1) from error

    checks = run_doctor(settings, write_probe=write_probe)
    if as_json:
        found = list(checks)
        report = {"status": worst(found), "checks": [asdict(check) for check in found]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        found = print_checks(Console(), checks)
    if worst(found) == "broken":
        raise typer.Exit(1)


def print_checks(console: Console, checks: Iterator[Check]) -> list[Check]:
    """Print the lines, as a table on a terminal, else one after the other; return them."""
    if not console.is_terminal:
        found = []
        for check in checks:
            console.print(
                Text(f"{check.status:<8} {check.group}: {check.subject}: {check.detail}"), soft_wrap=True
            )
            if check.remedy and check.status != "works":
                console.print(Text(f"{'':<8} do: {check.remedy}"), soft_wrap=True)
            found.append(check)
    else:
        found = []
        with Console(stderr=True).status("looking ...") as status:
            for check in checks:
                status.update(f"looked at {check.group}: {check.subject}")
                found.append(check)
        console.print(_table(found))
    counts = {status: sum(check.status == status for check in found) for status in ("broken", "warning")}
    text = f"{counts['broken']} broken, {counts['warning']} to look at, {len(found)} looked at"
    console.print(Text(text, style=_STYLES["broken" if counts["broken"] else "works"]))
    return found


def _table(checks: list[Check]) -> Table:
    table = Table("", "", "status", "what was found", box=None, header_style="bold", pad_edge=False)
    group = ""
    for check in checks:
        detail = Text(check.detail)
        if check.remedy and check.status != "works":
            detail += Text(f"\ndo: {check.remedy}", style="bold")
        name = check.group if check.group != group else ""
        group = check.group
        status = Text(check.status, style=_STYLES[check.status])
        table.add_row(Text(name, style="bold"), Text(check.subject), status, detail)
    return table


def _print_broken_install(error: ImportError, *, as_json: bool) -> None:
    """The one line there is where the packages cannot even be imported."""
    line = {
        "group": "packages",
        "subject": "required",
        "status": "broken",
        "detail": f"they cannot be imported: {error}",
        "remedy": "install again: make setup, or pip install wmtp",
    }
    if as_json:
        sys.stdout.write(json.dumps({"status": "broken", "checks": [line]}, indent=2) + "\n")
    else:
        Console().print(Text(f"broken   packages: {line['detail']}\n         do: {line['remedy']}"))
