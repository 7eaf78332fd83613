"""The same report as Markdown, for a terminal, a pull request or a diff."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from wmtp.reporting.curves import Section
from wmtp.reporting.data import BenchmarkDetail, ProgramSample, ReportRun, TokenView
from wmtp.reporting.details import (
    detail_caption,
    kind_counts,
    passed_text,
    shows_every_program,
    single_run_details,
    temperature_table,
    verdict_text,
)
from wmtp.reporting.summary import (
    ScoreTable,
    headline,
    interval_text,
    metric_table,
    score_tables,
    timing_table,
)
from wmtp.reporting.text import format_percent, visible
from wmtp.reporting.tokens import heaviest_tokens, tokens_as_lines


def render_markdown(
    title: str,
    runs: Sequence[ReportRun],
    pictures: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    curves: Mapping[str, tuple[str, str]],
) -> str:
    """Render the report; `pictures` are `(alt text, file)` of the bars and then of each of `sections`,
    `curves` those over temperature, by benchmark.
    """
    top = headline(runs)
    lines = [f"# {_escape(title)}", "", f"**{_escape(top.conclusion)}** {_escape(top.detail)}".rstrip(), ""]
    notes = [
        f"- {_escape(run.name)}: {_escape(note)}" if len(runs) > 1 else f"- {_escape(note)}"
        for run in runs
        for note in run.notes
    ]
    if notes:
        lines += ["## To know first", "", *notes, ""]
    tables = score_tables(runs)
    for table, picture in zip(tables, pictures, strict=False):
        lines += [*_scores(table), _image(picture), ""]
    details, extra_tables = single_run_details(runs)
    for detail in details:
        lines += _detail(detail, curves.get(detail.benchmark))
    for extra in extra_tables:
        rows = [[_escape(cell) for cell in row] for row in extra.rows]
        header = [_escape(name) for name in extra.header]
        lines += [f"## {_escape(extra.title)}", "", _escape(extra.caption), "", *_table(header, rows), ""]
    views = [(run, view) for run in runs for view in run.token_views]
    if views:
        lines += [
            "## Which tokens counted",
            "",
            "Under each line its weights: the higher the bar, the heavier.",
            "",
        ]
        for run, view in views:
            lines += _view(run, view)
    for section, picture in zip(sections, pictures[len(tables) :], strict=True):
        lines += [f"## {section.title}", "", section.caption, "", _image(picture), ""]
    samples = [(run, sample) for run in runs for sample in run.samples]
    if samples:
        lines += ["## Generated programs", ""]
        for run, sample in samples:
            lines += _sample(run, sample)
    lines += _times_metrics_settings(runs)
    return "\n".join(lines).rstrip() + "\n"


def _scores(table: ScoreTable) -> list[str]:
    header = ["Run", *(f"pass@{k}" for k in table.ks), "95% interval", "Problems"]
    rows = []
    for row in table.rows:
        name = _escape(row.run.name)
        values = [format_percent(row.by_k[k].value) if k in row.by_k else "" for k in table.ks]
        problems = "" if row.main.num_problems is None else str(row.main.num_problems)
        rows.append([f"**{name}**" if row.is_best else name, *values, interval_text(row.main), problems])
    return [f"## Programs that pass: {_escape(table.benchmark)}", "", *_table(header, rows), ""]


def _detail(detail: BenchmarkDetail, curve: tuple[str, str] | None) -> list[str]:
    table = temperature_table(detail)
    kinds = [[_escape(kind), str(count), format_percent(share)] for kind, count, share in kind_counts(detail)]
    problems = []
    for problem in detail.problems:
        refs = [f"[{number}]({each.href})" for number, each in enumerate(problem.generations, 1)]
        programs = " ".join(refs) if shows_every_program(detail) else f"[all]({problem.href})"
        problems.append([_escape(problem.task_id), passed_text(problem), verdict_text(problem), programs])
    data = ["", f"As data, with tokens, seeds and messages: [{detail.file}]({detail.file})."]
    return [
        f"## In detail: {_escape(detail.benchmark)}",
        "",
        detail_caption(detail),
        "",
        *_table(table.header, table.rows),
        "",
        *([] if curve is None else [_image(curve), ""]),
        *_table(["Verdict", "Programs", "Share"], kinds),
        "",
        *_table(["Problem", "Passed", "Verdicts", "Programs"], problems),
        *(data if detail.file else []),
        "",
    ]


def _view(run: ReportRun, view: TokenView) -> list[str]:
    heaviest = ", ".join(f"{_code(text)} {weight:.2f}" for text, weight in heaviest_tokens(view))
    heading = f"### {_escape(view.title)} ({_escape(run.name)})"
    return [heading, "", *_fence("\n".join(tokens_as_lines(view)), "text"), "", f"Heaviest: {heaviest}", ""]


def _sample(run: ReportRun, sample: ProgramSample) -> list[str]:
    heading = f"### {_escape(sample.title or run.name)} ({_escape(run.name)}): {_escape(sample.status)}"
    detail = [_escape(sample.detail), ""] if sample.detail else []
    return [heading, "", *_fence(visible(sample.prompt + sample.completion), "python"), "", *detail]


def _times_metrics_settings(runs: Sequence[ReportRun]) -> list[str]:
    names = [_escape(run.name) for run in runs]
    lines: list[str] = []
    parts = (
        ("Time", "Phase", timing_table(runs)),
        ("All metrics", "Metric", metric_table(runs)),
    )
    for title, kind, table in parts:
        if table:
            rows = [[_escape(name), *cells] for name, cells in table]
            lines += [f"## {title}", "", *_table([kind, *names], rows), ""]
    for run in runs:
        if run.settings_yaml:
            lines += [
                f"## Settings of {_escape(run.name)}",
                "",
                *_fence(visible(run.settings_yaml), "yaml"),
                "",
            ]
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def _image(picture: tuple[str, str]) -> str:
    alt, file = picture
    return f"![{_escape(alt)}]({file})"


def _fence(text: str, language: str) -> list[str]:
    # A fence longer than any in the text, so that a hostile program cannot end it.
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *text.rstrip("\n").split("\n"), fence]


def _code(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks} {text} {ticks}" if longest or not text.strip() else f"{ticks}{text}{ticks}"


def _escape(text: str) -> str:
    one_line = " ".join(visible(text).split())
    return re.sub(r"([\\`*_\[\]<>#|~$&])", r"\\\1", one_line)
