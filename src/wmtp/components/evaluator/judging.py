"""Verdicts on generated programs; what an interrupted evaluation has judged is not judged again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wmtp.components.evaluator.base import EvaluatorContext
from wmtp.components.evaluator.generating import Sample, SampleFiles
from wmtp.evaluation import Task, assemble_program
from wmtp.evaluation.records import RecordFile, key_of
from wmtp.exceptions import SandboxUnavailableError
from wmtp.execution import ProgramJob, ProgramResult, check_sandbox, run_programs
from wmtp.settings.recipe_eval import EvalSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of running one program against its tests; the fields are those of `ProgramResult`.

    `verdict_key` stands for the program, its tests and its limits.
    """

    verdict_key: str
    passed: bool
    status: str
    message: str
    asserts_passed: int
    asserts_total: int
    wall_s: float
    isolation: str


def judge_samples(
    context: EvaluatorContext, settings: EvalSettings, dataset: str, samples: Sequence[Sample]
) -> list[Verdict]:
    """Run every sample's program against its tests; one verdict a sample, in their order.

    Equal programs of one problem are run once.

    Raises:
        SandboxUnavailableError: no sandbox works and `context.unsafe_execution` is off.
    """
    jobs = [program_job(sample.task, sample.generation.text, settings) for sample in samples]
    keys = [_key(job) for job in jobs]
    files = None
    if context.output_dir is not None:
        files = SampleFiles(folder=context.output_dir, dataset=dataset)
    known = {} if files is None else _known_verdicts(files, set(keys), unsafe=context.unsafe_execution)
    if known:
        logger.info("%s: verdicts on %d programs are there already", dataset, len(known))
    todo = {key: job for key, job in zip(keys, jobs, strict=True) if key not in known}
    if todo:
        _run(context, settings, dataset, todo, known, files)
    return [known[key] for key in keys]


def program_job(task: Task, completion: str, settings: EvalSettings) -> ProgramJob:
    """What is run to judge a completion; a problem's own limits go before those of the settings."""
    return ProgramJob(
        source=assemble_program(task, completion),
        tests=task.tests or None,
        setup=task.setup,
        cases=task.cases or None,
        timeout_s=settings.timeout_s if task.timeout_s is None else task.timeout_s,
        memory_mib=settings.memory_mib if task.memory_mib is None else task.memory_mib,
    )


def require_sandbox(context: EvaluatorContext) -> None:
    """Check that programs may be run.

    Raises:
        SandboxUnavailableError: no sandbox works and `context.unsafe_execution` is off.
    """
    status = check_sandbox()
    if not status.available and not context.unsafe_execution:
        raise SandboxUnavailableError(
            f"generated programs cannot be run: {status.reason}", remedy=status.remedy
        )


def _run(
    context: EvaluatorContext,
    settings: EvalSettings,
    dataset: str,
    todo: Mapping[str, ProgramJob],
    known: dict[str, Verdict],
    files: SampleFiles | None,
) -> None:
    keys = list(todo)
    file = None if files is None else RecordFile(files.verdicts)
    num_done = 0

    def record(index: int, result: ProgramResult) -> None:
        nonlocal num_done
        verdict = _verdict(keys[index], result)
        known[keys[index]] = verdict
        if file is not None:
            file.append(asdict(verdict))
        num_done += 1
        context.on_progress(f"{dataset}: run programs", num_done, len(keys))

    try:
        run_programs(
            list(todo.values()),
            num_workers=settings.num_workers,
            on_done=record,
            unsafe=context.unsafe_execution,
        )
    finally:
        if file is not None:
            file.close()


def _key(job: ProgramJob) -> str:
    cases = None if job.cases is None else [list(case) for case in job.cases]
    return key_of(job.source, job.tests, job.setup, cases, job.timeout_s, job.memory_mib)


def _known_verdicts(files: SampleFiles, wanted: set[str], *, unsafe: bool) -> dict[str, Verdict]:
    """Recorded verdicts; those reached without a sandbox count only where that is allowed now too."""
    known = {}
    for record in files.read(with_verdicts=True):
        if record.get("verdict_key") in wanted and (unsafe or record["isolation"] == "bubblewrap"):
            fields: dict[str, Any] = {name: record[name] for name in Verdict.__dataclass_fields__}
            known[record["verdict_key"]] = Verdict(**fields)
    return known


def _verdict(key: str, result: ProgramResult) -> Verdict:
    return Verdict(
        verdict_key=key,
        passed=result.passed,
        status=result.status,
        message=result.message,
        asserts_passed=result.asserts_passed,
        asserts_total=result.asserts_total,
        wall_s=round(result.wall_s, 4),
        isolation=result.isolation,
    )
