"""Writing a report: `report.html`, `report.md` and the pictures of the latter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wmtp.reporting.curves import Section, curve_sections
from wmtp.reporting.data import ReportRun
from wmtp.reporting.details import single_run_details, temperature_panel
from wmtp.reporting.summary import score_tables
from wmtp.reporting.text import format_percent


@dataclass(frozen=True, slots=True)
class ReportPaths:
    """The files of a report; `report.html` needs no other file, `report.md` shows `pictures`."""

    html: Path
    markdown: Path
    pictures: list[Path]


def write_report(folder: str | os.PathLike[str], title: str, runs: Sequence[ReportRun]) -> ReportPaths:
    """Write the report of one run, or the comparison of several, into `folder`; older files of it are
    replaced.

    Raises:
        ValueError: no runs, or two of the same name.
    """
    # Imported here: drawing takes half a second to import, and most users of this package do not draw.
    from wmtp.reporting.charts import picture_names, score_png, section_png
    from wmtp.reporting.html import render_html
    from wmtp.reporting.markdown import render_markdown

    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise ValueError(f"a report needs runs of different names, got {names}")
    folder = Path(folder)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)

    pictures: list[tuple[str, Path]] = []
    for index, table in enumerate(score_tables(runs)):
        path = figures / f"pass_rate_{index + 1}.png"
        labels = picture_names([row.run.name for row in table.rows])
        places = [names.index(row.run.name) for row in table.rows]
        path.write_bytes(score_png(table, labels, places))
        values = ", ".join(f"{row.run.name} {format_percent(row.main.value)}" for row in table.rows)
        pictures.append((f"pass@{table.ks[0]} on {table.benchmark}: {values}", path))
    curves: dict[str, tuple[str, str]] = {}
    for index, detail in enumerate(single_run_details(runs)[0]):
        panel = temperature_panel(detail)
        if panel is not None:
            legend = [(line.label, line.color) for line in panel.series]
            path = figures / f"temperature_{index + 1}.png"
            path.write_bytes(
                section_png(Section(panel.title, "", [panel], legend), [label for label, _ in legend])
            )
            curves[detail.benchmark] = (panel.alt, path.relative_to(folder).as_posix())
    sections = curve_sections(runs)
    for section in sections:
        path = figures / f"{section.title.lower().replace(' ', '_')}.png"
        path.write_bytes(section_png(section, picture_names([label for label, _ in section.legend])))
        pictures.append((f"{section.title}: {', '.join(panel.title for panel in section.panels)}", path))

    paths = ReportPaths(folder / "report.html", folder / "report.md", [path for _, path in pictures])
    paths.html.write_text(render_html(title, runs), encoding="utf-8")
    linked = [(alt, path.relative_to(folder).as_posix()) for alt, path in pictures]
    paths.markdown.write_text(render_markdown(title, runs, linked, sections, curves), encoding="utf-8")
    return paths
