"""`wmtp quickstart`: the main job on real data, in minutes, with no account and no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wmtp.cli.options import UnsafeOption


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for models, reports and tracking.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Seed of data order and initialisation.")] = 0,
    unsafe_execution: UnsafeOption = False,
) -> None:
    """Train baseline, critic and rho1 on MicroCode, run what they write, and report; takes minutes."""
    from wmtp.cli.summary import print_quickstart
    from wmtp.pipelines import RunOptions, run_quickstart

    print_quickstart(run_quickstart(output, seed=seed, options=RunOptions(unsafe_execution=unsafe_execution)))
