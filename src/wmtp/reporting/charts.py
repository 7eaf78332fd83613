"""Drawing: panels of curves and the bars of pass@k, as SVG that follows the page's colours or as PNG.

Only ASCII goes into a picture: matplotlib's font lacks many scripts. On the page the names of the lines stand
in a legend of HTML, in a PNG a name that is not ASCII is replaced by its number.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from wmtp.reporting.curves import Panel, Section
from wmtp.reporting.summary import ScoreTable

NUM_COLORS = 6
# (offset, lengths drawn and left out): lines differ by more than their colour. The first is solid.
_DASHES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0, (1, 0)),
    (0, (4.5, 1.4)),
    (0, (1.6, 0.9)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (3, 1)),
    (0, (8, 2)),
)
# The same dashes for the legend of the page, in units of its SVG.
SVG_DASHES = tuple(" ".join(str(2 * part) for part in lengths) for _, lengths in _DASHES)
_PALETTE = ("#3f6fb5", "#d9731a", "#2b8a6e", "#a2559c", "#9a7d1f", "#5c6470")
_TICK_STEPS = [1, 2, 2.5, 5, 10]
_INK, _GRID = "#4a505a", "#d9dce1"
# Placeholders in SVG, replaced by the page's CSS variables, so that pictures follow light and dark.
_SVG_PALETTE = tuple(f"#0000{index + 1:02x}" for index in range(NUM_COLORS))
_SVG_INK, _SVG_GRID = "#0001f0", "#0001f1"


@dataclass(frozen=True, slots=True)
class _Colors:
    ink: str
    grid: str
    palette: tuple[str, ...]


_FOR_PNG = _Colors(_INK, _GRID, _PALETTE)
_FOR_SVG = _Colors(_SVG_INK, _SVG_GRID, _SVG_PALETTE)


def panel_svg(panel: Panel) -> str:
    """Draw one panel as an `<svg>` element without size, text as text, colours as CSS variables."""
    figure = Figure(figsize=(3.7, 2.2), layout="constrained")
    _draw_panel(figure.subplots(), panel, _FOR_SVG)
    return _svg(figure, panel.title)


def section_png(section: Section, legend: Sequence[str]) -> bytes:
    """Draw all panels of a section into one PNG with a legend; `legend` gives each line's name."""
    columns = min(3, len(section.panels))
    rows = -(-len(section.panels) // columns)
    figure = Figure(figsize=(3.7 * columns, 2.4 * rows + 0.4), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, section.panels, strict=False):
        _draw_panel(axis, panel, _FOR_PNG)
        axis.set_title(panel.title, fontsize=9, color=_INK, loc="left", parse_math=False)
    for axis in axes[len(section.panels) :]:
        axis.set_axis_off()
    handles = [
        mpl.lines.Line2D([], [], color=_PALETTE[color % NUM_COLORS], linestyle=_DASHES[color % NUM_COLORS])
        for _, color in section.legend
    ]
    if not handles:
        return _png(figure)
    box = figure.legend(handles, [*legend], loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    for text in box.get_texts():
        text.set_parse_math(False)
    return _png(figure)


def score_png(table: ScoreTable, names: Sequence[str], places: Sequence[int]) -> bytes:
    """Draw pass@k of one benchmark as bars with 95% intervals, with each row's name and palette place."""
    figure = Figure(figsize=(7.4, 0.6 * len(table.rows) + 0.9), dpi=130, layout="constrained")
    axis = figure.subplots()
    positions = range(len(table.rows))
    values = [row.main.value for row in table.rows]
    colors = [_PALETTE[place % NUM_COLORS] for place in places]
    axis.barh(positions, values, color=colors, height=0.55)
    for position, row in zip(positions, table.rows, strict=True):
        if row.main.low is not None and row.main.high is not None:
            axis.plot([row.main.low, row.main.high], [position, position], color="#22252b", linewidth=1.4)
    axis.set_yticks(positions, list(names), parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axis.set_xlabel(f"pass@{table.rows[0].main.k}")
    _clean(axis, _FOR_PNG, grid_axis="x")
    return _png(figure)


def picture_names(names: Sequence[str]) -> list[str]:
    """Names that can be drawn: a name that is not printable ASCII becomes `run 2` by its place."""
    return [
        name if name.isascii() and name.isprintable() else f"run {index + 1}"
        for index, name in enumerate(names)
    ]


def _draw_panel(axis: Axes, panel: Panel, colors: _Colors) -> None:
    for series in panel.series:
        place = series.color % NUM_COLORS
        axis.plot(
            series.steps, series.values, color=colors.palette[place], linestyle=_DASHES[place], linewidth=1.7
        )
        if series.lows:
            # One outline, not `fill_between`, whose SVG refers to ids that the page does without.
            outline = ([*series.steps, *series.steps[::-1]], [*series.lows, *series.highs[::-1]])
            axis.fill(*outline, color=colors.palette[place], alpha=0.15, linewidth=0)
    axis.set_xlabel(panel.x_label, fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=panel.x_label == "step", steps=_TICK_STEPS))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS))
    if panel.is_share:
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _clean(axis, colors, grid_axis="y")


def _clean(axis: Axes, colors: _Colors, *, grid_axis: Literal["x", "y"]) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(colors.grid)
    axis.tick_params(colors=colors.ink, labelsize=8, length=0)
    axis.xaxis.label.set_color(colors.ink)
    axis.grid(axis=grid_axis, color=colors.grid, linewidth=0.7)
    axis.set_axisbelow(True)


def _svg(figure: Figure, salt: str) -> str:
    buffer = io.StringIO()
    # The salt makes the ids of a drawing its own on the page, and the same each time it is drawn.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', text)
    if view_box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    body = text[text.index("<defs>") : text.rindex("</svg>")]
    # What would reach beyond the picture goes: its style sheet, its fonts, ids that every picture has.
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    body = re.sub(r' id="(?!p[0-9a-f]{10}")[^"]*"', "", body)
    body = body.replace(_SVG_INK, "var(--muted)").replace(_SVG_GRID, "var(--line)")
    for index, placeholder in enumerate(_SVG_PALETTE):
        body = body.replace(placeholder, f"var(--series-{index + 1})")
    return f"<svg {view_box[0]}>{body.strip()}</svg>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
