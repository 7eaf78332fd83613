"""The line in a terminal while many programs run. Not imported by the supervisor, which has no packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wmtp.execution.results import ProgramResult


@contextmanager
def show_progress(
    title: str, total: int, *, console: Console | None = None
) -> Iterator[Callable[[ProgramResult], None]]:
    """Draw a bar with the number of programs that are done and that passed; call the value for each result.

    Nothing is written where the console, by default standard error, is no terminal.
    """
    console = console or Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}", markup=False, style="bold"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[num_passed]} passed"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = progress.add_task(title, total=total, num_passed=0)
    num_passed = 0

    def count(result: ProgramResult) -> None:
        nonlocal num_passed
        num_passed += result.passed
        progress.update(task, advance=1, num_passed=num_passed)

    with progress:
        yield count
