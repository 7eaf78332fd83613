"""The `wmtp` command: its commands, and how every failure becomes one message and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from wmtp.cli import (
    doctor,
    evaluate,
    export,
    generate,
    list_components,
    migrate,
    quickstart,
    schema,
    train,
    validate,
)
from wmtp.exceptions import WmtpError, disk_error

# OpenMP's threads by default wait for each other in a busy loop. On a machine with anything else to do that
# makes two threads up to twenty times slower than one; sleeping costs little. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Of a hub that cannot be reached its library would tell at every attempt, twice; one error says it.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")

app = typer.Typer(
    name="wmtp",
    help="Weighted multi-token prediction: train and evaluate models that predict several tokens at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart")(quickstart.quickstart)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("generate")(generate.generate)
app.command("validate")(validate.validate)
app.command("doctor")(doctor.doctor)
app.command("migrate")(migrate.migrate)
app.command("schema")(schema.schema)
app.command("list")(list_components.list_components)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    run_app(app, arguments)


def run_command(command: Callable[..., None]) -> None:
    """Run one command by itself, as `python -m wmtp.cli.train` does."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(command)
    run_app(single, None)


def run_app(application: typer.Typer, arguments: Sequence[str] | None) -> None:
    """Run a Typer application.

    Exit codes: 0 done, 2 bad input, 3 diverged, 4 interrupted and saved, 1 anything else.
    """
    console = Console(stderr=True)
    configure_logging(console)
    try:
        application(args=arguments)
    except WmtpError as error:
        show_error(console, error)
        sys.exit(error.exit_code)
    except OSError as error:
        known = disk_error(error)
        if known is None:
            show_bug(console)
        else:
            show_error(console, known)
        sys.exit(1)
    except Exception:
        show_bug(console)
        sys.exit(1)


def show_bug(console: Console) -> None:
    """Print the traceback of an error that nobody expected."""
    console.print(Text(traceback.format_exc()), soft_wrap=True)
    console.print("this is a bug in WMTP: please report it with the lines above", style="red")


def show_error(console: Console, error: WmtpError) -> None:
    """Print one message and its remedy, no traceback."""
    console.print(Text("error: ", style="bold red") + Text(error.message), soft_wrap=True)
    if error.remedy is not None:
        console.print(Text("remedy: ", style="bold green") + Text(error.remedy), soft_wrap=True)


def configure_logging(console: Console) -> None:
    """Log this package's messages from INFO and everybody else's from WARNING, to standard error."""
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("wmtp").setLevel(logging.INFO)
    # It warns of kernels it did not find whenever it is imported, which peft does for every adapter.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, *_args, **_kwargs: str(message)


if __name__ == "__main__":
    main()
