"""The conclusion of a report and its tables, from the runs' plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wmtp.reporting.data import ReportRun, Score
from wmtp.reporting.text import format_duration, format_number, format_percent

BASELINE_ALGO = "baseline-mtp"


@dataclass(frozen=True, slots=True)
class Headline:
    """The one sentence to take away, and what qualifies it."""

    conclusion: str
    detail: str


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One run's line in a benchmark's table; scores by k, `main` is the one that is drawn."""

    run: ReportRun
    main: Score
    by_k: dict[int, Score]
    is_best: bool


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """pass@k of all runs on one benchmark."""

    benchmark: str
    ks: list[int]
    rows: list[ScoreRow]


def score_tables(runs: Sequence[ReportRun]) -> list[ScoreTable]:
    """Build one table a benchmark, in order of first appearance; runs without a score are left out."""
    benchmarks = list(dict.fromkeys(score.benchmark for run in runs for score in run.scores))
    return [_score_table(benchmark, runs) for benchmark in benchmarks]


def headline(runs: Sequence[ReportRun]) -> Headline:
    """Say what came out: who solves most on the first benchmark, and whether that could be chance."""
    tables = score_tables(runs)
    if not tables:
        return _headline_without_scores(runs)
    table = tables[0]
    rows = sorted(table.rows, key=lambda row: -row.main.value)
    best = rows[0]
    solves = f"{format_percent(best.main.value)} of {table.benchmark}"
    if len(rows) == 1:
        return Headline(f"{best.run.name} solves {solves}.", _describe(best.main))
    baseline = next((row for row in rows if row.run.algo == BASELINE_ALGO), None)
    if rows[1].main.value == best.main.value:
        tied = [row.run.name for row in rows if row.main.value == best.main.value]
        names = ", ".join(tied[:-1]) + f" and {tied[-1]}"
        return Headline(f"{names} solve equally many: {solves}.", _describe(best.main))
    if baseline is None or baseline is best:
        other, remark = rows[1], "No weighting did better here. " if baseline is best else ""
    else:
        other, remark = baseline, ""
    against = f"{format_percent(other.main.value)} for {other.run.name}"
    conclusion = f"{best.run.name} solves most: {solves}, against {against}."
    return Headline(conclusion, remark + _compare(best, other))


def metric_table(runs: Sequence[ReportRun]) -> list[tuple[str, list[str]]]:
    """All final metrics, one line a name with a cell a run; empty where a run has none."""
    names = sorted({name for run in runs for name in run.metrics})
    return [
        (name, [format_number(run.metrics[name]) if name in run.metrics else "" for run in runs])
        for name in names
    ]


def finding_table(runs: Sequence[ReportRun]) -> list[tuple[str, list[str]]]:
    """The final metrics that are results of their own: all but the curves' last values, pass@k, and what a
    table of its own shows.
    """
    tables = runs[0].tables if len(runs) == 1 else ()
    shown = {name for table in tables for name in table.metrics}
    return [
        (name, cells)
        for name, cells in metric_table(runs)
        if not name.startswith(("train/", "val/")) and "_pass_at_" not in name and name not in shown
    ]


def timing_table(runs: Sequence[ReportRun]) -> list[tuple[str, list[str]]]:
    """Time per phase, phases in order of first appearance, with the total last where there are several."""
    phases = list(dict.fromkeys(phase for run in runs for phase in run.timings))
    rows = [
        (phase, [format_duration(run.timings[phase]) if phase in run.timings else "" for run in runs])
        for phase in phases
    ]
    if len(phases) > 1:
        totals = [format_duration(sum(run.timings.values())) if run.timings else "" for run in runs]
        rows.append(("Total", totals))
    return rows


def interval_text(score: Score) -> str:
    """The 95% interval as `79.1% to 88.9%`, empty where it is not known."""
    if score.low is None or score.high is None:
        return ""
    return f"{format_percent(score.low)} to {format_percent(score.high)}"


def _score_table(benchmark: str, runs: Sequence[ReportRun]) -> ScoreTable:
    by_run = []
    for run in runs:
        by_k = {score.k: score for score in run.scores if score.benchmark == benchmark}
        if by_k:
            by_run.append((run, by_k))
    main_k = min(k for _, by_k in by_run for k in by_k)
    drawn = [(run, by_k) for run, by_k in by_run if main_k in by_k]
    best = max(by_k[main_k].value for _, by_k in drawn)
    rows = [
        ScoreRow(run, by_k[main_k], by_k, is_best=len(drawn) > 1 and by_k[main_k].value == best)
        for run, by_k in drawn
    ]
    return ScoreTable(benchmark, sorted({k for _, by_k in drawn for k in by_k}), rows)


def _headline_without_scores(runs: Sequence[ReportRun]) -> Headline:
    notes = " ".join(note for run in runs for note in run.notes)
    losses = []
    for run in runs:
        values = [row["train/loss"] for row in run.history if "train/loss" in row]
        if values:
            losses.append(f"{run.name} {format_number(values[-1])}")
    if losses:
        return Headline(
            "No generated programs were run.", f"Last training loss: {', '.join(losses)}. {notes}".strip()
        )
    return Headline("Nothing was measured.", notes)


def _describe(score: Score) -> str:
    parts = [f"pass@{score.k} {score.value:.3f}"]
    interval = interval_text(score)
    if interval:
        parts.append(f"95% interval {interval}")
    if score.num_problems is not None:
        parts.append(f"{score.num_problems} problems")
    return ", ".join(parts) + "."


def _compare(best: ScoreRow, other: ScoreRow) -> str:
    problems = (
        "" if best.main.num_problems is None else f"pass@{best.main.k} on {best.main.num_problems} problems. "
    )
    if best.main.low is None or other.main.high is None:
        return problems.rstrip()
    intervals = f"Their 95% intervals, {interval_text(best.main)} and {interval_text(other.main)},"
    if best.main.low > other.main.high:
        return f"{problems}{intervals} do not overlap."
    return f"{problems}{intervals} overlap, so the difference may be chance."
