"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere.

Everything goes to standard error, so that standard output holds results only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from wmtp.reporting.text import format_duration

_LOSS, _SPEED, _MEMORY = "train/loss", "train/tokens_per_second", "train/memory_peak_gib"


class _Display:
    """A context in which progress is drawn, where there is a terminal to draw on."""

    _progress: Progress | None

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


class ProgressDisplay(_Display):
    """Progress of a training run: step, loss, tokens/s, time left, memory.

    In a terminal one line is redrawn in place. Elsewhere (a file, a pipe, CI) each update that brings metrics
    prints one plain line, and nothing else is shown.

    Args:
        total_steps: optimizer steps of the whole run.
        title: what is being trained.
        start_step: steps done before (after a resume).
        console: where to draw; default: standard error.
    """

    def __init__(
        self, total_steps: int, *, title: str = "train", start_step: int = 0, console: Console | None = None
    ) -> None:
        self._total_steps = total_steps
        self._title = title
        self._start_step = start_step
        self._console = console or Console(stderr=True)
        self._started = time.monotonic()
        self._facts = ""
        self._progress = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False, style="bold"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}", markup=False),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task(title, total=total_steps, completed=start_step, facts="")

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        return super().__enter__()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that `step` optimizer steps are done; with `metrics` also what they say.

        Shown are `train/loss`, `train/tokens_per_second` and `train/memory_peak_gib`, those that are there.
        """
        if metrics is not None:
            self._facts = self._describe(step, metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, facts=self._facts)
        elif metrics is not None:
            line = f"{self._title}  step {step}/{self._total_steps}  {self._facts}"
            self._console.print(Text(line), soft_wrap=True)

    def _describe(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = []
        if _LOSS in metrics:
            parts.append(f"loss {metrics[_LOSS]:.4f}")
        if _SPEED in metrics:
            parts.append(f"{metrics[_SPEED]:,.0f} tokens/s")
        num_done = step - self._start_step
        if num_done > 0:
            left_s = (time.monotonic() - self._started) / num_done * (self._total_steps - step)
            parts.append(f"{format_duration(left_s)} left")
        if _MEMORY in metrics:
            parts.append(f"{metrics[_MEMORY]:.2f} GiB")
        return "  ".join(parts)


class StageDisplay(_Display):
    """Progress of work that counts what is done, stage by stage, such as programs generated and run.

    In a terminal one line is redrawn in place. Elsewhere a stage prints one plain line when it is done.

    Args:
        console: where to draw; default: standard error.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._stage = ""
        self._started = time.monotonic()
        self._progress = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False, style="bold"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )

    def update(self, stage: str, num_done: int, num_total: int) -> None:
        """Show that so many of so many are done; a new name begins a new stage."""
        if stage != self._stage:
            self._stage, self._started = stage, time.monotonic()
            if self._progress is not None:
                self._task = self._progress.add_task(stage, total=num_total)
        if self._progress is not None:
            self._progress.update(self._task, completed=num_done)
        elif num_done == num_total:
            seconds = format_duration(time.monotonic() - self._started)
            self._console.print(Text(f"{stage}: {num_total} done in {seconds}"), soft_wrap=True)


class PhaseDisplay:
    """Says which phase of a longer job runs, how long each took, and keeps the times for a report.

    `timings` maps a phase's title to its seconds, in order; a phase that failed is not in it.

    Args:
        total: number of phases, shown as `1/total`; None shows no numbers.
        console: where to print; default: standard error.
    """

    def __init__(self, *, total: int | None = None, console: Console | None = None) -> None:
        self.timings: dict[str, float] = {}
        self._total = total
        self._number = 0
        self._console = console or Console(stderr=True)

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Announce a phase, run the block, print the time it took."""
        self._number += 1
        number = f"[{self._number}/{self._total}] " if self._total is not None else ""
        self._console.print(Text(f"{number}{title}", style="bold"), soft_wrap=True)
        started = time.monotonic()
        try:
            yield
        except BaseException:
            self._console.print(Text(f"{number}{title}: stopped", style="red"), soft_wrap=True)
            raise
        self.timings[title] = time.monotonic() - started
        self.status(f"done in {format_duration(self.timings[title])}")

    def status(self, message: str) -> None:
        """Print one indented line about the phase that runs."""
        self._console.print(Text(f"      {message}", style="dim"), soft_wrap=True)
