"""What commands print at their end: results on standard output, for people and for pipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wmtp.settings import Config, Recipe, redacted_dump

if TYPE_CHECKING:
    from wmtp.pipelines import EvaluationOutputs, Finding, QuickstartOutputs, RunOutputs

_RESULT_KEYS = ("pass_at", "exact_match", "perplexity_head", "token_accuracy", "critic/auc", "val/loss")


def print_settings(config: Config, recipe: Recipe) -> None:
    """The settings in force, defaults included, secrets hidden, to standard error."""
    text = yaml.safe_dump({**redacted_dump(config), **redacted_dump(recipe)}, sort_keys=False)
    Console(stderr=True).print(Text(text), style="dim")


def print_dry_run(facts: Mapping[str, Any]) -> None:
    """Shapes and memory of a dry run."""
    console = Console()
    console.print("dry run: everything was built, one step ran, nothing was written", style="bold")
    _print_facts(console, facts)


def print_training(outputs: RunOutputs) -> None:
    """Results and places of a training run."""
    console = Console()
    console.print(Text(f"run {outputs.run_name}: {outputs.step} steps", style="bold"))
    _print_metrics(console, outputs.metrics)
    _print_facts(
        console, {"checkpoint": outputs.checkpoint, "model": outputs.export, "report": outputs.report}
    )
    if outputs.evaluation is not None:
        _print_skipped(console, outputs.evaluation.skipped)


def print_evaluation(outputs: EvaluationOutputs) -> None:
    """Results of an evaluation, or what one would measure."""
    console = Console()
    if outputs.dry_run is not None:
        title = "dry run: everything was loaded, nothing was generated, run or written"
        console.print(title, style="bold")
        _print_facts(console, outputs.dry_run)
        return
    if outputs.run_name is not None:
        console.print(Text(f"evaluation {outputs.run_name}", style="bold"))
    _print_facts(console, {name: f"{value:.4f}" for name, value in outputs.metrics.items()})
    _print_facts(console, {"report": outputs.report, "generations": outputs.folder})
    _print_skipped(console, outputs.skipped)


def print_validation(findings: list[Finding]) -> None:
    """What a run would use."""
    console = Console()
    for finding in findings:
        mark = Text("ok       ", style="green") if finding.is_ok else Text("note     ", style="yellow")
        console.print(mark + Text(f"{finding.subject}: {finding.detail}"), soft_wrap=True)


def print_quickstart(outputs: QuickstartOutputs) -> None:
    """pass@1 per algorithm, and where the report is."""
    console = Console()
    table = Table("algorithm", "pass@1", "95% interval", box=None, header_style="bold", pad_edge=False)
    for name, run in outputs.runs.items():
        metrics = run.metrics
        if "microcode_pass_at_1" in metrics:
            low, high = metrics["microcode_pass_at_1_ci_low"], metrics["microcode_pass_at_1_ci_high"]
            table.add_row(name, f"{metrics['microcode_pass_at_1']:.3f}", f"{low:.3f} to {high:.3f}")
        else:
            table.add_row(name, "not run", "")
    console.print(table)
    _print_facts(console, {"report": outputs.report, "seconds": round(outputs.seconds, 1)})


def _print_metrics(console: Console, metrics: Mapping[str, float]) -> None:
    chosen = {
        name: f"{value:.4f}" for name, value in metrics.items() if any(key in name for key in _RESULT_KEYS)
    }
    _print_facts(console, chosen)


def _print_facts(console: Console, facts: Mapping[str, Any]) -> None:
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        if value is not None:
            console.print(Text(f"  {name:<{width}}  {value}"), soft_wrap=True)


def _print_skipped(console: Console, skipped: list[str]) -> None:
    for message in skipped:
        console.print(Text(message, style="yellow"), soft_wrap=True)
