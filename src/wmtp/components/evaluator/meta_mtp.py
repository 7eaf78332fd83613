"""pass@k of generated programs: generate, execute, count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from wmtp.components.base import Component
from wmtp.components.evaluator.base import (
    DatasetResult,
    EvaluationResult,
    EvaluatorContext,
    ProblemResult,
    TemperatureResult,
)
from wmtp.components.evaluator.generating import (
    Sample,
    SampleFiles,
    generate_samples,
    sample_record,
    samples_at,
)
from wmtp.components.evaluator.judging import Verdict, judge_samples, require_sandbox
from wmtp.components.registry import evaluator_registry
from wmtp.evaluation import Task, assemble_program, bootstrap_mean_interval, pass_at_k
from wmtp.evaluation.records import write_records
from wmtp.exceptions import UserInputError
from wmtp.settings.recipe_eval import EvalSettings

# CodeContests is reported at 1, 5 and 10 samples.
_CONTEST_K: Final = (1, 5, 10)


@evaluator_registry.register("meta-mtp", version="1.1.0")
class MetaMtpEvaluator(Component[EvaluatorContext, EvaluationResult]):
    """pass@k of generated and executed programs, with intervals, at one or several temperatures."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings
        self._temperatures = list(dict.fromkeys(settings.temperatures))

    def run(self, context: EvaluatorContext) -> EvaluationResult:
        """Evaluate every dataset of `context.tasks` that has tests.

        Metrics, for every k up to the number of samples: `{dataset}_pass_at_{k}` at the first temperature,
        with `_ci_low` and `_ci_high`; with several temperatures also `_best` and `_best_temperature`. Greedy
        samples are all alike: temperature 0 generates one a problem, and has pass@1 only.

        With `context.output_dir` every completion and verdict is recorded as it comes. A run over the same
        problems with the same settings and model goes on from the records of one that was interrupted.

        Raises:
            UserInputError: there are no tasks, or none with tests.
            SandboxUnavailableError: no sandbox works and `unsafe_execution` is off. Raised before any
                generation.
        """
        judged = {
            name: [task for task in tasks if task.has_tests] for name, tasks in context.tasks.items() if tasks
        }
        if not any(judged.values()):
            raise UserInputError(
                f"no tasks to evaluate on: { ({name: len(tasks) for name, tasks in context.tasks.items()}) }",
                remedy="name datasets with tests in eval.datasets",
            )
        require_sandbox(context)
        notes: list[str] = []
        metrics: dict[str, float] = {}
        datasets: dict[str, DatasetResult] = {}
        for name, tasks in judged.items():
            num_without = len(context.tasks[name]) - len(tasks)
            if num_without:
                notes.append(f"{name}: {num_without} problem(s) have no tests that can be run; left out.")
            if tasks:
                result = self._evaluate_dataset(context, name, tasks)
                datasets[name] = result
                metrics.update(self._metrics(result))
                notes.extend(self._notes(result))
        return EvaluationResult(type="meta-mtp", metrics=metrics, datasets=datasets, notes=notes)

    def _evaluate_dataset(self, context: EvaluatorContext, name: str, tasks: Sequence[Task]) -> DatasetResult:
        samples = generate_samples(context, self.settings, name, tasks, self._temperatures)
        verdicts = judge_samples(context, self.settings, name, samples)
        path = None
        if context.output_dir is not None:
            files = SampleFiles(folder=context.output_dir, dataset=name)
            path = files.judged
            write_records(
                path,
                [
                    self._record(sample, verdict, name)
                    for sample, verdict in zip(samples, verdicts, strict=True)
                ],
            )
            files.remove_partial()
        isolations = Counter(verdict.isolation for verdict in verdicts)
        return DatasetResult(
            name=name,
            temperatures=[
                self._summarise(temperature, samples, verdicts) for temperature in self._temperatures
            ],
            # The weakest that any program ran under.
            isolation="process-limits" if "process-limits" in isolations else "bubblewrap",
            generations=path,
        )

    def _record(self, sample: Sample, verdict: Verdict, name: str) -> dict[str, object]:
        """One line a program: enough to generate it again, run it again, and see why it failed."""
        return {
            **sample_record(sample, self.settings, name),
            "program": assemble_program(sample.task, sample.generation.text),
            **{field: getattr(verdict, field) for field in Verdict.__dataclass_fields__},
        }

    def _summarise(
        self, temperature: float, samples: Sequence[Sample], verdicts: Sequence[Verdict]
    ) -> TemperatureResult:
        num_samples = samples_at(self.settings, temperature)
        own = [pair for pair in zip(samples, verdicts, strict=True) if pair[0].temperature == temperature]
        problems = []
        for start in range(0, len(own), num_samples):
            group = own[start : start + num_samples]
            problems.append(
                ProblemResult(
                    task_id=group[0][0].task.task_id,
                    num_samples=num_samples,
                    num_correct=sum(verdict.passed for _, verdict in group),
                    statuses=dict(Counter(verdict.status for _, verdict in group)),
                )
            )
        ks = {*self.settings.k, *(_CONTEST_K if own[0][0].task.benchmark == "contest" else ())}
        return TemperatureResult(
            temperature=temperature,
            num_samples=num_samples,
            pass_at={
                k: bootstrap_mean_interval(
                    [pass_at_k(problem.num_samples, problem.num_correct, k) for problem in problems],
                    seed=self.settings.seed,
                )
                for k in sorted(ks)
                if k <= num_samples
            },
            statuses=dict(sum((Counter(problem.statuses) for problem in problems), Counter())),
            problems=problems,
        )

    def _metrics(self, result: DatasetResult) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for k in sorted({k for each in result.temperatures for k in each.pass_at}):
            name = f"{result.name}_pass_at_{k}"
            fixed = result.temperatures[0].pass_at.get(k)
            if fixed is not None:
                metrics |= {name: fixed.mean, f"{name}_ci_low": fixed.low, f"{name}_ci_high": fixed.high}
            best = result.best(k)
            if best is not None and len(result.temperatures) > 1:
                metrics[f"{name}_best"] = best.pass_at[k].mean
                metrics[f"{name}_best_temperature"] = best.temperature
        return metrics

    def _notes(self, result: DatasetResult) -> list[str]:
        left_out = [k for k in self.settings.k if k not in result.temperatures[0].pass_at]
        notes = []
        if result.isolation != "bubblewrap":
            notes.append(
                f"{result.name}: programs ran without a sandbox (--unsafe-execution): verdicts can be forged."
            )
        if left_out:
            first = result.temperatures[0]
            notes.append(
                f"{result.name}: {', '.join(f'pass@{k}' for k in left_out)} left out at temperature "
                f"{first.temperature:g}, which has {first.num_samples} sample(s) a problem."
            )
        for k, interval in result.temperatures[0].pass_at.items():
            if interval.low == interval.high and interval.mean in (0.0, 1.0):
                num_problems = len(result.temperatures[0].problems)
                # One-sided 95% bound of a share of which no case was seen: 1 - 0.05 ** (1 / n).
                bound = 1 - 0.05 ** (1 / num_problems)
                notes.append(
                    f"{result.name}: {'no' if interval.mean == 0 else 'every'} problem came out solved at "
                    f"pass@{k}, so the bootstrap has nothing to vary and its interval no width; with "
                    f"{num_problems} problems the true share may still be {bound:.1%} away."
                )
        num_unverified = sum(each.statuses.get("unverified", 0) for each in result.temperatures)
        if num_unverified:
            notes.append(
                f"{result.name}: {num_unverified} program(s) passed tests that only run beside the program "
                "itself (`unverified`); they count as not passed."
            )
        return notes
