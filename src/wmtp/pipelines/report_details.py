"""From the results of evaluators to what a report shows behind the scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from wmtp.components.evaluator import DatasetResult, EvaluationResult
from wmtp.evaluation.failures import failure_kind
from wmtp.evaluation.records import Record, read_records
from wmtp.reporting import (
    BenchmarkDetail,
    GeneratedProgram,
    GenerationRef,
    ProblemVerdicts,
    ReportTable,
    Score,
    TemperatureScores,
    format_number,
    format_percent,
    write_generation_pages,
)

_HEAD_METRIC = re.compile(r"^(.*)_head_(\d+)$")
_COLUMNS: Final = {
    "val/ce": "Cross entropy",
    "perplexity": "Perplexity",
    "token_accuracy": "Accuracy",
    "acceptance_proxy": "Acceptance (proxy)",
}
# So few numbers over all heads need no table.
_MAX_IN_CAPTION: Final = 2
_TITLES: Final = {
    "perplexity": (
        "Perplexity per head",
        "On held-out text, exact means over all targets. Cross entropy in nats; head h predicts the token h "
        "places ahead.",
    ),
    "token-accuracy": (
        "Accuracy per head",
        "How often the most likely token is the target, and how often heads 2 to h all agree with what "
        "head 1 would write, which is what self-speculation accepts.",
    ),
    "self-speculation": (
        "Self-speculation",
        "Decoding with the model's own heads as drafts, against plain decoding of the same model.",
    ),
    "exact-match": (
        "Exact match",
        "Share of problems whose greedy completion is a reference solution, blanks at ends of lines aside.",
    ),
}


def benchmark_scores(dataset: DatasetResult) -> list[TemperatureScores]:
    """pass@k of a dataset at every temperature."""
    return [
        TemperatureScores(
            temperature=result.temperature,
            num_samples=result.num_samples,
            scores={
                k: Score(
                    benchmark=dataset.name,
                    value=interval.mean,
                    k=k,
                    low=interval.low,
                    high=interval.high,
                    num_problems=len(result.problems),
                )
                for k, interval in result.pass_at.items()
            },
        )
        for result in dataset.temperatures
    ]


def benchmark_details(results: Sequence[EvaluationResult], report_folder: Path) -> list[BenchmarkDetail]:
    """What stands behind every benchmark's scores; writes the pages that show its programs."""
    return [
        _detail(dataset, dataset.generations, report_folder)
        for result in results
        for dataset in result.datasets.values()
        if dataset.generations is not None
    ]


def result_tables(results: Sequence[EvaluationResult]) -> list[ReportTable]:
    """Tables of the measurements that are no pass@k: per head where the metrics are, plain otherwise."""
    tables = []
    for result in results:
        if result.type != "meta-mtp" and result.metrics:
            title, caption = _TITLES.get(result.type, (result.type, "Measured at the end."))
            tables += _tables(title, caption, result.metrics)
    return tables


def _detail(dataset: DatasetResult, file: Path, report_folder: Path) -> BenchmarkDetail:
    programs: dict[str, list[GeneratedProgram]] = {}
    refs: dict[str, list[tuple[int, Record, str]]] = {}
    for line, record in enumerate(read_records(file), 1):
        kind = failure_kind(record["status"], record["message"])
        programs.setdefault(record["task_id"], []).append(_program(line, record, kind))
        refs.setdefault(record["task_id"], []).append((line, record, kind))
    folder = file.parent
    base = folder.relative_to(report_folder).as_posix()
    problem_places, line_places = write_generation_pages(folder, dataset.name, file.name, programs)
    problems = [
        ProblemVerdicts(
            task_id=task_id,
            href=f"{base}/{problem_places[task_id]}",
            generations=[
                GenerationRef(
                    line=line,
                    temperature=record["temperature"],
                    sample=record["sample"],
                    kind=kind,
                    href=f"{base}/{line_places[line]}",
                )
                for line, record, kind in found
            ],
        )
        for task_id, found in refs.items()
    ]
    return BenchmarkDetail(
        benchmark=dataset.name,
        temperatures=benchmark_scores(dataset),
        problems=problems,
        file=f"{base}/{file.name}",
        isolation=dataset.isolation,
    )


def _program(line: int, record: Record, kind: str) -> GeneratedProgram:
    facts = (
        f"line {line}, seed {record['seed']}, {len(record['token_ids'])} tokens, ended by "
        f"{record['finish_reason']}, {record['wall_s']:.2f} s"
    )
    return GeneratedProgram(
        line=line,
        task_id=record["task_id"],
        prompt=record["prompt"],
        program=record["program"],
        completion=record["completion"],
        title=f"Sample {record['sample'] + 1} at temperature {record['temperature']:g}",
        facts=facts,
        kind=kind,
        message=record["message"],
    )


def _tables(title: str, caption: str, metrics: Mapping[str, float]) -> list[ReportTable]:
    by_head: dict[int, dict[str, float]] = {}
    plain: dict[str, float] = {}
    for name, value in metrics.items():
        match = _HEAD_METRIC.match(name)
        if match is None:
            plain[name] = value
        else:
            by_head.setdefault(int(match[2]), {})[match[1]] = value
    # The intervals stand beside their values.
    shown = [name for name in plain if not name.endswith(("_ci_low", "_ci_high"))]
    tables = []
    if by_head and len(shown) <= _MAX_IN_CAPTION:
        facts = "; ".join(f"{_words(name).lower()} {_cell(name, plain[name])}" for name in shown)
        caption = f"{caption} Over all heads: {facts}." if facts else caption
    elif shown:
        has_intervals = any(f"{name}_ci_low" in plain for name in shown)
        rows = [_plain_row(name, plain, has_interval=has_intervals) for name in shown]
        header = ["", "Value", *(["95% interval"] if has_intervals else [])]
        tables.append(
            ReportTable(title=title, caption=caption, header=header, rows=rows, metrics=list(metrics))
        )
        title, caption = f"{title}: per head", "The same measurement, head by head."
    if by_head:
        columns = list(dict.fromkeys(name for values in by_head.values() for name in values))
        rows = [
            [f"Head {head + 1}", *(_cell(name, values.get(name)) for name in columns)]
            for head, values in sorted(by_head.items())
        ]
        header = ["", *(_COLUMNS.get(name, _words(name)) for name in columns)]
        tables.append(
            ReportTable(title=title, caption=caption, header=header, rows=rows, metrics=list(metrics))
        )
    return tables


def _plain_row(name: str, metrics: Mapping[str, float], *, has_interval: bool) -> list[str]:
    row = [_words(name), _cell(name, metrics[name])]
    if has_interval:
        low, high = metrics.get(f"{name}_ci_low"), metrics.get(f"{name}_ci_high")
        row.append("" if low is None or high is None else f"{format_percent(low)} to {format_percent(high)}")
    return row


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    is_share = name.endswith(("accuracy", "acceptance", "acceptance_proxy", "exact_match"))
    return format_percent(value) if is_share else format_number(value)


def _words(name: str) -> str:
    text = name.rpartition("/")[2].replace("_", " ")
    return text[:1].upper() + text[1:]
