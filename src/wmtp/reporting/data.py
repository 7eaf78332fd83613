"""What a report is made of: plain data, so that it can be written without a model or a tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """pass@k of one benchmark; values and the bounds of the 95% interval are fractions from 0 to 1."""

    benchmark: str
    value: float
    k: int = 1
    low: float | None = None
    high: float | None = None
    num_problems: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenView:
    """A text with the weight of each token.

    Args:
        title: what the text is.
        tokens: decoded pieces; joined they are the text.
        weights: one weight a token, None where the token has none (a prompt, a document's first token).
        ce: per token, the cross entropy (nats) of each head that predicts it; None where a head does not.
    """

    title: str
    tokens: Sequence[str]
    weights: Sequence[float | None]
    ce: Sequence[Sequence[float | None]] = ()

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.tokens) or len(self.ce) not in (0, len(self.tokens)):
            raise ValueError(
                f"token view {self.title!r} has {len(self.tokens)} tokens, {len(self.weights)} weights and "
                f"{len(self.ce)} entries of ce"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramSample:
    """A generated program and its verdict (`passed`, `failed`, `error`, `timeout`, ...)."""

    prompt: str
    completion: str
    status: str
    title: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRef:
    """One program of a problem in an evaluation's details.

    Args:
        line: its line in the file of generations, from 1.
        temperature: at which it was sampled.
        sample: its number among the problem's samples at that temperature.
        kind: `passed`, or why not.
        href: where it can be seen, relative to the report.
    """

    line: int
    temperature: float
    sample: int
    kind: str
    href: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemVerdicts:
    """All programs of one problem; `href` is where they can be seen, relative to the report."""

    task_id: str
    generations: Sequence[GenerationRef]
    href: str

    @property
    def num_passed(self) -> int:
        """How many of its programs passed."""
        return sum(each.kind == "passed" for each in self.generations)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureScores:
    """pass@k of a benchmark at one sampling temperature, by k."""

    temperature: float
    num_samples: int
    scores: Mapping[int, Score]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkDetail:
    """What stands behind the scores of one benchmark.

    Args:
        benchmark: its name.
        temperatures: in the order asked for; the first is the fixed one.
        problems: in the order of the dataset.
        file: the generations as data, relative to the report.
        isolation: what stood between the programs and the machine.
    """

    benchmark: str
    temperatures: Sequence[TemperatureScores]
    problems: Sequence[ProblemVerdicts]
    file: str = ""
    isolation: str = "bubblewrap"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    """A table of its own section; the first cell of a row names it.

    Args:
        title: of the section.
        caption: what the numbers are.
        header: one name a column.
        rows: texts, one a column.
        metrics: names of the metrics it shows, which then need no other place.
    """

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    metrics: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRun:
    """One run of a report. Everything but the name and the algorithm may be left out.

    Args:
        name: how the run is called in the report; unique among the runs.
        algo: key of the algorithm.
        scores: pass@k per benchmark, most important benchmark first.
        metrics: final metrics by name.
        history: rows of `metrics.jsonl`.
        token_views: texts with weights.
        samples: generated programs.
        settings_yaml: the settings that produced the run, secrets already redacted.
        timings: seconds per phase, in order.
        notes: remarks a reader must know, e.g. why something was not run.
        benchmarks: what stands behind the scores; shown in a report of this run alone.
        tables: further results, likewise.
    """

    name: str
    algo: str
    scores: Sequence[Score] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: Sequence[Mapping[str, float]] = ()
    token_views: Sequence[TokenView] = ()
    samples: Sequence[ProgramSample] = ()
    settings_yaml: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    benchmarks: Sequence[BenchmarkDetail] = ()
    tables: Sequence[ReportTable] = ()
