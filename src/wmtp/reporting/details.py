"""What stands behind the scores of a benchmark: by temperature, by kind of failure, problem by problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from wmtp.reporting.curves import Panel, Series
from wmtp.reporting.data import BenchmarkDetail, ProblemVerdicts, ReportRun, ReportTable
from wmtp.reporting.summary import interval_text
from wmtp.reporting.text import format_percent

# Links to single programs in the page of the report; beyond it problems link to theirs.
MAX_LINKS = 6000


def temperature_table(detail: BenchmarkDetail) -> ReportTable:
    """pass@k with its interval at every temperature; of several the fixed and the best are marked."""
    ks = sorted({k for each in detail.temperatures for k in each.scores})
    best = {
        k: max(
            (each for each in detail.temperatures if k in each.scores), key=lambda each: each.scores[k].value
        ).temperature
        for k in ks
    }
    is_grid = len(detail.temperatures) > 1
    rows = []
    for number, each in enumerate(detail.temperatures):
        name = f"{each.temperature:g}" + (" (greedy)" if each.temperature == 0 else "")
        if is_grid and number == 0:
            name += ", fixed"
        cells = []
        for k in ks:
            score = each.scores.get(k)
            mark = " best" if is_grid and score is not None and best[k] == each.temperature else ""
            cells.append("" if score is None else f"{format_percent(score.value)}{mark}")
            cells.append("" if score is None else interval_text(score))
        rows.append([name, str(each.num_samples), *cells])
    columns = [column for k in ks for column in (f"pass@{k}", "95% interval")]
    return ReportTable(
        title="By temperature", caption="", header=["Temperature", "Samples", *columns], rows=rows
    )


def temperature_panel(detail: BenchmarkDetail) -> Panel | None:
    """pass@k over temperature with its interval, one line a k; None for a single temperature."""
    lines = []
    ordered = sorted(detail.temperatures, key=lambda each: each.temperature)
    for color, k in enumerate(sorted({k for each in ordered for k in each.scores})):
        points = [(each.temperature, each.scores[k]) for each in ordered if k in each.scores]
        if len(points) > 1:
            has_interval = all(score.low is not None and score.high is not None for _, score in points)
            lines.append(
                Series(
                    f"pass@{k}",
                    color,
                    [temperature for temperature, _ in points],
                    [score.value for _, score in points],
                    [score.low or 0.0 for _, score in points] if has_interval else [],
                    [score.high or 0.0 for _, score in points] if has_interval else [],
                )
            )
    if not lines:
        return None
    title = f"{' and '.join(line.label for line in lines)} by temperature"
    return Panel(title, lines, x_label="temperature", is_share=True)


def kind_counts(detail: BenchmarkDetail) -> list[tuple[str, int, float]]:
    """(kind, programs, share) of all verdicts: passed first, then the most frequent failures."""
    counts = Counter(each.kind for problem in detail.problems for each in problem.generations)
    total = max(1, counts.total())
    ordered = sorted(counts.items(), key=lambda item: (item[0] != "passed", -item[1], item[0]))
    return [(kind, count, count / total) for kind, count in ordered]


def verdict_text(problem: ProblemVerdicts) -> str:
    """How often each verdict was reached, such as `2 passed, 1 timeout`."""
    counts = Counter(each.kind for each in problem.generations)
    ordered = sorted(counts.items(), key=lambda item: (item[0] != "passed", -item[1], item[0]))
    return ", ".join(f"{count} {kind}" for kind, count in ordered)


def passed_text(problem: ProblemVerdicts) -> str:
    """Such as `2 of 3`."""
    return f"{problem.num_passed} of {len(problem.generations)}"


def detail_caption(detail: BenchmarkDetail) -> str:
    """How many problems and programs there are, and under what they ran."""
    num_programs = sum(len(problem.generations) for problem in detail.problems)
    return f"{len(detail.problems)} problems, {num_programs} programs, run under {detail.isolation}."


def shows_every_program(detail: BenchmarkDetail) -> bool:
    """Whether the report itself links to every program."""
    return sum(len(problem.generations) for problem in detail.problems) <= MAX_LINKS


def single_run_details(runs: Sequence[ReportRun]) -> tuple[Sequence[BenchmarkDetail], Sequence[ReportTable]]:
    """Details and tables of a report of one run; a comparison has none, its links would lead elsewhere."""
    return (runs[0].benchmarks, runs[0].tables) if len(runs) == 1 else ((), ())
