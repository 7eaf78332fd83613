"""Exact match: how often the greedy completion is the reference."""

from __future__ import annotations

from collections.abc import Sequence

from wmtp.components.base import Component
from wmtp.components.evaluator.base import EvaluationResult, EvaluatorContext
from wmtp.components.evaluator.generating import (
    Sample,
    SampleFiles,
    generate_samples,
    sample_record,
)
from wmtp.components.registry import evaluator_registry
from wmtp.evaluation import Task, assemble_program, bootstrap_mean_interval, unix_lines
from wmtp.evaluation.records import write_records
from wmtp.exceptions import UserInputError
from wmtp.settings.recipe_eval import EvalSettings


@evaluator_registry.register("exact-match", version="1.0.0")
class ExactMatchEvaluator(Component[EvaluatorContext, EvaluationResult]):
    """Share of problems whose greedy completion equals a reference; nothing is run."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings

    def run(self, context: EvaluatorContext) -> EvaluationResult:
        """Evaluate every dataset of `context.tasks` that has references.

        Metrics: `{dataset}_exact_match`, with `_ci_low` and `_ci_high` (95%, bootstrap over problems). One
        completion a problem is generated at temperature 0; see `is_match` for what counts as equal.

        Raises:
            UserInputError: no task has a reference.
        """
        asked = {
            name: [task for task in tasks if task.references]
            for name, tasks in context.tasks.items()
            if tasks
        }
        if not any(asked.values()):
            raise UserInputError(
                "no problem has a reference, so exact match cannot be measured",
                remedy="name datasets with completions in eval.datasets",
            )
        metrics: dict[str, float] = {}
        notes = []
        for name, tasks in asked.items():
            num_without = len(context.tasks[name]) - len(tasks)
            if num_without:
                notes.append(f"{name}: {num_without} problem(s) have no reference to match; left out.")
            if tasks:
                metrics.update(self._evaluate_dataset(context, name, tasks))
        return EvaluationResult(type="exact-match", metrics=metrics, notes=notes)

    def _evaluate_dataset(
        self, context: EvaluatorContext, name: str, tasks: Sequence[Task]
    ) -> dict[str, float]:
        samples = generate_samples(context, self.settings, name, tasks, [0.0])
        matches = [is_match(sample.task, sample.generation.text) for sample in samples]
        if context.output_dir is not None:
            files = SampleFiles(folder=context.output_dir, dataset=name)
            write_records(
                files.matched,
                [
                    self._record(sample, matched, name)
                    for sample, matched in zip(samples, matches, strict=True)
                ],
            )
        interval = bootstrap_mean_interval([float(match) for match in matches], seed=self.settings.seed)
        return {
            f"{name}_exact_match": interval.mean,
            f"{name}_exact_match_ci_low": interval.low,
            f"{name}_exact_match_ci_high": interval.high,
        }

    def _record(self, sample: Sample, matched: bool, name: str) -> dict[str, object]:
        references = sample.task.references
        return {**sample_record(sample, self.settings, name), "references": references, "matched": matched}


def is_match(task: Task, completion: str) -> bool:
    """Whether what a model wrote is one of the task's references.

    Both are made programs as for a run (stop strings, fences, markers; texts only cut at stop strings). Line
    ends, blanks at ends of lines, and blank lines at both ends do not count; everything else does.
    """
    written = _normal(assemble_program(task, completion))
    return any(written == _normal(assemble_program(task, reference)) for reference in task.references)


def _normal(text: str) -> str:
    return "\n".join(line.rstrip() for line in unix_lines(text).split("\n")).strip("\n")
