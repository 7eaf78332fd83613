"""The page: one self-contained HTML file without scripts, readable on a phone, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from wmtp.reporting.charts import NUM_COLORS, SVG_DASHES, panel_svg
from wmtp.reporting.curves import Section, curve_sections
from wmtp.reporting.data import BenchmarkDetail, ProblemVerdicts, ProgramSample, ReportRun, TokenView
from wmtp.reporting.details import (
    detail_caption,
    kind_counts,
    passed_text,
    shows_every_program,
    single_run_details,
    temperature_panel,
    temperature_table,
    verdict_text,
)
from wmtp.reporting.pages import page_template
from wmtp.reporting.summary import (
    ScoreTable,
    finding_table,
    headline,
    interval_text,
    metric_table,
    score_tables,
    timing_table,
)
from wmtp.reporting.tokens import heaviest_tokens, shaded_tokens


@dataclass(frozen=True, slots=True)
class _Picture:
    title: str
    alt: str
    svg: Markup


def render_html(title: str, runs: Sequence[ReportRun]) -> str:
    """Render the whole page; every text is escaped, what a run lacks is left out."""
    return page_template("report.html.j2").render(
        title=title,
        runs=runs,
        headline=headline(runs),
        tables=[_table(table, runs) for table in score_tables(runs)],
        details=[_detail(detail) for detail in single_run_details(runs)[0]],
        extra_tables=single_run_details(runs)[1],
        sections=[_section(section) for section in curve_sections(runs)],
        views=[_view(run, view) for run in runs for view in run.token_views],
        samples=[(run, sample, _verdict(sample)) for run in runs for sample in run.samples],
        metrics=metric_table(runs),
        findings=finding_table(runs),
        timings=timing_table(runs),
        has_notes=any(run.notes for run in runs),
        dashes=SVG_DASHES,
        has_settings=any(run.settings_yaml for run in runs),
    )


def _table(table: ScoreTable, runs: Sequence[ReportRun]) -> dict[str, object]:
    order = [run.name for run in runs]
    rows = [
        {
            "row": row,
            "color": order.index(row.run.name) % NUM_COLORS + 1,
            "interval": interval_text(row.main),
            "others": [row.by_k.get(k) for k in table.ks[1:]],
        }
        for row in table.rows
    ]
    return {"benchmark": table.benchmark, "ks": table.ks, "rows": rows}


def _detail(detail: BenchmarkDetail) -> dict[str, object]:
    panel = temperature_panel(detail)
    return {
        "name": detail.benchmark,
        "caption": detail_caption(detail),
        "temperatures": temperature_table(detail),
        "curve": None if panel is None else _Picture(panel.title, panel.alt, Markup(panel_svg(panel))),
        "legend": []
        if panel is None
        else [(line.label, line.color % NUM_COLORS + 1) for line in panel.series],
        "kinds": kind_counts(detail),
        "problems": [_problem(problem, detail) for problem in detail.problems],
        "file": detail.file,
    }


def _problem(problem: ProblemVerdicts, detail: BenchmarkDetail) -> dict[str, object]:
    refs = [
        {
            "href": each.href,
            "label": number,
            "verdict": "good" if each.kind == "passed" else "bad",
            "title": f"sample {each.sample + 1} at temperature {each.temperature:g}: {each.kind}",
        }
        for number, each in enumerate(problem.generations, 1)
    ]
    return {
        "task_id": problem.task_id,
        "href": problem.href,
        "share": problem.num_passed / max(1, len(problem.generations)),
        "passed": passed_text(problem),
        "verdicts": verdict_text(problem),
        "title": f"{problem.task_id}: {passed_text(problem)} passed",
        "refs": refs if shows_every_program(detail) else [],
    }


def _section(section: Section) -> dict[str, object]:
    # Only pictures drawn here are put into the page as they are; their texts are numbers and fixed words.
    pictures = [_Picture(panel.title, panel.alt, Markup(panel_svg(panel))) for panel in section.panels]
    legend = [(label, color % NUM_COLORS + 1) for label, color in section.legend]
    return {"title": section.title, "caption": section.caption, "pictures": pictures, "legend": legend}


def _view(run: ReportRun, view: TokenView) -> dict[str, object]:
    return {"run": run, "title": view.title, "tokens": shaded_tokens(view), "heaviest": heaviest_tokens(view)}


def _verdict(sample: ProgramSample) -> str:
    return "good" if sample.status == "passed" else "bad"
