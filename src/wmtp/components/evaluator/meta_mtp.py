"""pass@k of generated programs: generate, execute, count."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from wmtp.components.base import Component
from wmtp.components.evaluator.base import (
    DatasetResult,
    EvaluationResult,
    EvaluatorContext,
    ProblemResult,
    TemperatureResult,
)
from wmtp.components.registry import evaluator_registry
from wmtp.decoding import Generation, generate
from wmtp.evaluation import Task, assemble_program, bootstrap_mean_interval, pass_at_k
from wmtp.exceptions import SandboxUnavailableError, UserInputError
from wmtp.execution import ProgramJob, ProgramResult, check_sandbox, run_programs
from wmtp.settings.recipe_eval import EvalSettings
from wmtp.storage.atomic import write_bytes_atomic


@dataclass(frozen=True, slots=True)
class _Sample:
    """One program: what was asked, with which draws, what came back."""

    task: Task
    temperature: float
    sample: int
    generation: Generation


@evaluator_registry.register("meta-mtp", version="1.0.0")
class MetaMtpEvaluator(Component[EvaluatorContext, EvaluationResult]):
    """pass@k of generated and executed programs, with intervals, at one or several temperatures."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings
        self._temperatures = list(dict.fromkeys(settings.temperatures))

    def run(self, context: EvaluatorContext) -> EvaluationResult:
        """Evaluate every dataset of `context.tasks`.

        Metrics, for every k up to the number of samples: `{dataset}_pass_at_{k}` at the first temperature,
        with `_ci_low` and `_ci_high`; with several temperatures also `_best` and `_best_temperature`. Greedy
        samples are
        all alike: temperature 0 generates one a problem, and has pass@1 only.

        Raises:
            UserInputError: there are no tasks.
            SandboxUnavailableError: no sandbox works and `unsafe_execution` is off. Raised before any
                generation.
        """
        if not context.tasks or not all(context.tasks.values()):
            raise UserInputError(
                f"no tasks to evaluate on: { ({name: len(tasks) for name, tasks in context.tasks.items()}) }",
                remedy="name datasets with tests in eval.datasets",
            )
        if not context.unsafe_execution:
            _require_sandbox()
        notes: list[str] = []
        metrics: dict[str, float] = {}
        datasets: dict[str, DatasetResult] = {}
        for name, tasks in context.tasks.items():
            result = self._evaluate_dataset(context, name, tasks)
            datasets[name] = result
            metrics.update(self._metrics(result))
            notes.extend(self._notes(result))
        return EvaluationResult(type="meta-mtp", metrics=metrics, datasets=datasets, notes=notes)

    def _evaluate_dataset(self, context: EvaluatorContext, name: str, tasks: Sequence[Task]) -> DatasetResult:
        settings = self.settings
        samples = [
            sample
            for temperature in self._temperatures
            for sample in self._generate(context, name, tasks, temperature)
        ]
        jobs = [
            ProgramJob(
                source=assemble_program(sample.task, sample.generation.text),
                tests=sample.task.tests,
                setup=sample.task.setup,
                timeout_s=settings.timeout_s,
                memory_mib=settings.memory_mib,
            )
            for sample in samples
        ]
        num_done = 0

        def report(index: int, verdict: ProgramResult) -> None:
            nonlocal num_done
            num_done += 1
            context.on_progress(f"{name}: run programs", num_done, len(jobs))

        verdicts = run_programs(
            jobs, num_workers=settings.num_workers, on_done=report, unsafe=context.unsafe_execution
        )
        path = None
        if context.output_dir is not None:
            path = context.output_dir / f"{name}.generations.jsonl"
            self._save(path, name, samples, verdicts)
        return DatasetResult(
            name=name,
            temperatures=[
                self._summarise(temperature, samples, verdicts) for temperature in self._temperatures
            ],
            isolation=verdicts[0].isolation,
            generations=path,
        )

    def _generate(
        self, context: EvaluatorContext, name: str, tasks: Sequence[Task], temperature: float
    ) -> list[_Sample]:
        """Generate a dataset's samples at one temperature: each task's samples in a row, tasks in order."""
        settings = self.settings
        num_samples = _samples_at(settings, temperature)
        prompts = [context.tokenizer.encode_prompt(task.prompt) for task in tasks]
        model = context.model.causal_lm
        generations: dict[tuple[int, int], Generation] = {}
        # Usually one group: a dataset's tasks share their stop strings.
        for stop in dict.fromkeys(task.stop for task in tasks):
            slots = [(i, s) for i, task in enumerate(tasks) if task.stop == stop for s in range(num_samples)]

            def report(index: int, generation: Generation, slots: Sequence[tuple[int, int]] = slots) -> None:
                generations[slots[index]] = generation
                done, total = len(generations), len(tasks) * num_samples
                context.on_progress(f"{name}: generate at temperature {temperature:g}", done, total)

            with context.autocast():
                generate(
                    model,
                    [prompts[i] for i, _ in slots],
                    tokenizer=context.tokenizer.tokenizer,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=temperature,
                    top_k=settings.top_k,
                    top_p=settings.top_p,
                    seed=settings.seed,
                    keys=[(problem_key(name, tasks[i].task_id), s) for i, s in slots],
                    stop=stop,
                    batch_size=settings.batch_size,
                    context_length=context_length(model.config),
                    on_done=report,
                )
        return [
            _Sample(task, temperature, s, generations[i, s])
            for i, task in enumerate(tasks)
            for s in range(num_samples)
        ]

    def _summarise(
        self, temperature: float, samples: Sequence[_Sample], verdicts: Sequence[ProgramResult]
    ) -> TemperatureResult:
        num_samples = _samples_at(self.settings, temperature)
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
        return TemperatureResult(
            temperature=temperature,
            num_samples=num_samples,
            pass_at={
                k: bootstrap_mean_interval(
                    [pass_at_k(problem.num_samples, problem.num_correct, k) for problem in problems],
                    seed=self.settings.seed,
                )
                for k in self.settings.k
                if k <= num_samples
            },
            statuses=dict(sum((Counter(problem.statuses) for problem in problems), Counter())),
            problems=problems,
        )

    def _metrics(self, result: DatasetResult) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for k in self.settings.k:
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
        num_unverified = sum(each.statuses.get("unverified", 0) for each in result.temperatures)
        if num_unverified:
            notes.append(
                f"{result.name}: {num_unverified} program(s) passed tests that only run beside the program "
                "itself (`unverified`); they count as not passed."
            )
        return notes

    def _save(
        self, path: Path, name: str, samples: Sequence[_Sample], verdicts: Sequence[ProgramResult]
    ) -> None:
        """Write one line a program: enough to generate it again, run it again, and see why it failed."""
        settings = self.settings
        lines = [
            json.dumps(
                {
                    "task_id": sample.task.task_id,
                    "temperature": sample.temperature,
                    "top_k": settings.top_k,
                    "top_p": settings.top_p,
                    "max_new_tokens": settings.max_new_tokens,
                    "seed": settings.seed,
                    "problem_key": problem_key(name, sample.task.task_id),
                    "sample": sample.sample,
                    "prompt": sample.task.prompt,
                    "completion": sample.generation.text,
                    "token_ids": sample.generation.token_ids,
                    "finish_reason": sample.generation.finish_reason,
                    "passed": verdict.passed,
                    "status": verdict.status,
                    "message": verdict.message,
                    "asserts_passed": verdict.asserts_passed,
                    "asserts_total": verdict.asserts_total,
                    "wall_s": round(verdict.wall_s, 4),
                    "isolation": verdict.isolation,
                },
                ensure_ascii=False,
            )
            for sample, verdict in zip(samples, verdicts, strict=True)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Generated text may hold lone surrogates (bytes that are no character).
        write_bytes_atomic(path, "".join(line + "\n" for line in lines).encode(errors="backslashreplace"))


def problem_key(dataset: str, task_id: str) -> int:
    """Return the 64-bit key of a problem's draws.

    A hash of its name, so that a subset of a dataset draws what the whole would.
    """
    digest = hashlib.blake2b(f"{dataset}\0{task_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def context_length(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model was built for; None where its configuration names no limit."""
    text_config = config.get_text_config(decoder=True)
    name = text_config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    length = text_config.to_dict().get(name)
    return None if length is None else int(length)


def _samples_at(settings: EvalSettings, temperature: float) -> int:
    return settings.num_samples if temperature > 0 else 1


def _require_sandbox() -> None:
    status = check_sandbox()
    if not status.available:
        raise SandboxUnavailableError(
            f"generated programs cannot be run: {status.reason}", remedy=status.remedy
        )
