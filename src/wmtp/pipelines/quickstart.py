"""The quickstart: the whole job on MicroCode, from nothing to a report that compares the algorithms."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from wmtp.components.loader import MICRO_BASE, MICRO_REFERENCE
from wmtp.pipelines.builtin_models import prepare_builtin_model, shipped_settings
from wmtp.pipelines.environment import run_paths
from wmtp.pipelines.outputs import RunOptions, RunOutputs
from wmtp.pipelines.training import run_training_pipeline
from wmtp.reporting import write_report
from wmtp.settings import load_config, load_recipe
from wmtp.tracking import PhaseDisplay

ALGORITHMS: Final = ("baseline", "critic", "rho1")


@dataclass(frozen=True, slots=True)
class QuickstartOutputs:
    """What the quickstart left.

    Attributes:
        runs: outputs by algorithm.
        report: the HTML report that compares them.
        seconds: wall-clock time of the whole.
    """

    runs: dict[str, RunOutputs]
    report: Path
    seconds: float


def run_quickstart(output: Path, *, seed: int = 0, options: RunOptions | None = None) -> QuickstartOutputs:
    """Train the built-in base and reference where absent, then every algorithm, and compare.

    Args:
        output: folder for models, reports and tracking; a second quickstart there reuses base and reference.
        seed: of the three runs.
        options: what only the command line may say.
    """
    options = options or RunOptions()
    began = time.perf_counter()
    config = load_config(
        shipped_settings("config.example.yaml"), overrides=[f"paths.output={output.absolute()}"]
    )
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    display = PhaseDisplay(total=3 + len(ALGORITHMS))
    with display.phase("base model: a small Llama learns MicroCode"):
        prepare_builtin_model(MICRO_BASE, config, dry_run=False, options=options)
    with display.phase("reference model: the same, on data without wrong solutions"):
        prepare_builtin_model(MICRO_REFERENCE, config, dry_run=False, options=options)
    runs: dict[str, RunOutputs] = {}
    for algorithm in ALGORITHMS:
        with display.phase(f"{algorithm}: train, generate, execute"):
            recipe = load_recipe(
                shipped_settings(f"recipe.{algorithm}.yaml"), overrides=[f"train.seed={seed}"]
            )
            run_options = options.nested(f"quickstart-{stamp}-{algorithm}")
            runs[algorithm] = run_training_pipeline(config, recipe, options=run_options)
            display.status(f"pass@1 {_pass_at_1(runs[algorithm])}")
    paths = run_paths(config, f"quickstart-{stamp}")
    with display.phase("report"):
        report_runs = [
            replace(run.report_run, name=algorithm)
            for algorithm, run in runs.items()
            if run.report_run is not None
        ]
        files = write_report(
            paths.report,
            title="WMTP quickstart: three algorithms on MicroCode",
            runs=report_runs,
        )
    return QuickstartOutputs(runs, files.html, time.perf_counter() - began)


def _pass_at_1(outputs: RunOutputs) -> str:
    value = outputs.metrics.get("microcode_pass_at_1")
    return "not run" if value is None else f"{value:.2f}"
