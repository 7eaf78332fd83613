"""Which curves a report shows, taken from the rows of `metrics.jsonl`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from wmtp.reporting.data import ReportRun
from wmtp.reporting.text import format_number

_MAX_POINTS = 160


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, its place in the palette, its points (steps in optimizer steps), intervals."""

    label: str
    color: int
    steps: list[float]
    values: list[float]
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart; `alt` says in words what it shows. Shares run from 0% to 100%."""

    title: str
    series: list[Series]
    x_label: str = "step"
    is_share: bool = False

    @property
    def alt(self) -> str:
        """A description for those who do not see the picture."""
        ends = ", ".join(
            f"{series.label} from {format_number(series.values[0])} to {format_number(series.values[-1])}"
            for series in self.series
        )
        last = max(series.steps[-1] for series in self.series)
        return f"{self.title} up to {self.x_label} {last:g}: {ends}."


@dataclass(frozen=True, slots=True)
class Section:
    """Panels that belong together, with the names and palette places of lines for a legend, each once."""

    title: str
    caption: str
    panels: list[Panel]
    legend: list[tuple[str, int]]


def curve_sections(runs: Sequence[ReportRun]) -> list[Section]:
    """All sections that have at least one line: losses, weights, critic, selection, validation."""
    sections = [_loss_section(runs), _weight_section(runs), _helper_section(runs)]
    return [section for section in sections if section.panels]


def _loss_section(runs: Sequence[ReportRun]) -> Section:
    heads = _numbers(runs, "train/ce_head_")
    if len(runs) == 1:
        panels = [
            _by_run("Training loss", runs, "train/loss"),
            _by_head("Cross entropy per head, training", runs[0], "train/ce_head_", heads),
            _by_run("Validation loss", runs, "val/loss"),
            _by_head(
                "Cross entropy per head, validation", runs[0], "val/ce_head_", _numbers(runs, "val/ce_head_")
            ),
        ]
        caption = (
            "Cross entropy in nats. Head h predicts the token h places ahead; far heads have the harder task."
        )
    else:
        # Weighted losses of different algorithms do not compare, so the unweighted cross entropy comes first.
        panels = [
            _by_run("Cross entropy, mean of heads", runs, "train/ce_mean"),
            _by_run("Training loss, weighted", runs, "train/loss"),
            *(_by_run(f"Cross entropy, head {head + 1}", runs, f"train/ce_head_{head}") for head in heads),
            _by_run("Validation loss", runs, "val/loss"),
        ]
        caption = (
            "Cross entropy in nats, unweighted unless said otherwise: weighted losses of different "
            "algorithms do not compare. Head h predicts the token h places ahead."
        )
    return _section("Loss curves", caption, panels, runs)


def _weight_section(runs: Sequence[ReportRun]) -> Section:
    weighted = [run for run in runs if _has_spread(run)]
    titles = {
        "std": "Standard deviation",
        "min": "Smallest weight",
        "max": "Largest weight",
        "ess": "Effective sample size",
    }
    panels = [_by_run(title, weighted, f"train/weight_{key}", runs) for key, title in titles.items()]
    caption = (
        "Token weights of each step. Their mean is 1; uniform weights would have a standard deviation of 0."
    )
    return _section("Weight statistics", caption, panels, runs)


def _helper_section(runs: Sequence[ReportRun]) -> Section:
    titles = {
        "critic/auc": "Critic: AUC",
        "critic/explained_variance": "Critic: explained variance",
        "critic/value_mean": "Critic: mean value",
        "critic/strength": "Critic: strength",
        "rho1/excess_mean": "Rho-1: mean excess loss",
        "rho1/selected_ratio": "Rho-1: selected tokens",
    }
    panels = [_by_run(title, runs, name) for name, title in titles.items()]
    caption = (
        "Where the weights come from. AUC: how well the critic tells right from wrong programs (chance: 0.5)."
    )
    return _section("Critic and reference", caption, panels, runs)


def _by_run(
    title: str, runs: Sequence[ReportRun], metric: str, palette: Sequence[ReportRun] | None = None
) -> Panel:
    order = [run.name for run in (runs if palette is None else palette)]
    lines = [_series(run.name, order.index(run.name), run, metric) for run in runs]
    return Panel(title, [line for line in lines if line is not None])


def _by_head(title: str, run: ReportRun, prefix: str, heads: Sequence[int]) -> Panel:
    lines = [_series(f"head {head + 1}", head, run, f"{prefix}{head}") for head in heads]
    return Panel(title, [line for line in lines if line is not None])


def _series(label: str, color: int, run: ReportRun, metric: str) -> Series | None:
    points = [
        (row["step"], row[metric])
        for row in run.history
        if row.get(metric) is not None and math.isfinite(row[metric])
    ]
    if len(points) < 2:
        return None
    steps, values = _thinned(points)
    return Series(label, color, steps, values)


def _thinned(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    # Long runs: the mean of equally many points each, so that the page stays small and noise does not hide
    # the line.
    size = math.ceil(len(points) / _MAX_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return (
        [points_of_bin[-1][0] for points_of_bin in bins],
        [sum(value for _, value in points_of_bin) / len(points_of_bin) for points_of_bin in bins],
    )


def _has_spread(run: ReportRun) -> bool:
    return any(row.get("train/weight_std") or 0.0 for row in run.history)


def _numbers(runs: Sequence[ReportRun], prefix: str) -> list[int]:
    found = re.compile(rf"^{re.escape(prefix)}(\d+)$")
    names = {name for run in runs for row in run.history for name in row}
    return sorted(int(match[1]) for match in map(found.match, names) if match is not None)


def _section(title: str, caption: str, panels: Sequence[Panel], runs: Sequence[ReportRun]) -> Section:
    kept = [panel for panel in panels if panel.series]
    # With one run a line that is alone in its panel needs no name: the panel's title says what it is.
    named = [panel for panel in kept if len(runs) > 1 or len(panel.series) > 1]
    legend = list(dict.fromkeys((line.label, line.color) for panel in named for line in panel.series))
    return Section(title, caption, kept, legend)
