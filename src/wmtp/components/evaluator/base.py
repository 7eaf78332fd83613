"""What evaluators are given and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from wmtp.components.data.examples import Batch
from wmtp.components.tokenizer import HfTokenizer
from wmtp.evaluation import MeanInterval, Task
from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel

# (what is being done, how many are done, of how many)
ProgressCallback = Callable[[str, int, int], None]


def ignore_progress(stage: str, num_done: int, num_total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatorContext:
    """What a model is evaluated on; an evaluator reads what its measurement needs.

    Attributes:
        model: the model; left in the mode it came in.
        tokenizer: encodes prompts as training did.
        tasks: programming tasks by dataset name.
        batches: held-out batches from a collator; may be iterated once.
        output_dir: where generations and verdicts are written; None writes nothing.
        fingerprint: stands for the model as it was loaded and its tokenizer; records of an interrupted
            evaluation count only where it is the same. Empty: made where it is needed.
        unsafe_execution: run programs without a sandbox where none works.
        autocast: the run's precision, entered around forwards.
        on_progress: called as work gets done.
    """

    model: MTPModel
    tokenizer: HfTokenizer
    tasks: Mapping[str, list[Task]] = field(default_factory=dict)
    batches: Iterable[Batch] = ()
    output_dir: Path | None = None
    fingerprint: str = ""
    unsafe_execution: bool = False
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    on_progress: ProgressCallback = ignore_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemResult:
    """The verdicts on one problem's samples.

    Attributes:
        task_id: the problem.
        num_samples: programs generated.
        num_correct: how many passed.
        statuses: number of samples by verdict (`passed failed error timeout memory killed unverified`).
    """

    task_id: str
    num_samples: int
    num_correct: int
    statuses: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureResult:
    """A dataset at one sampling temperature.

    Attributes:
        temperature: 0 is greedy.
        num_samples: programs generated for each problem.
        pass_at: k -> mean over problems of the unbiased pass@k, with its 95% bootstrap interval over
            problems.
        statuses: number of samples by verdict, all problems together.
        problems: each problem's verdicts, in the order of the dataset.
    """

    temperature: float
    num_samples: int
    pass_at: dict[int, MeanInterval]
    statuses: dict[str, int]
    problems: list[ProblemResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetResult:
    """pass@k of a dataset.

    Attributes:
        name: the dataset.
        temperatures: in the order asked for; the first is the fixed one.
        isolation: what stood between the programs and this machine.
        generations: the file with every generation, verdict and seed; None when nothing is written.
    """

    name: str
    temperatures: list[TemperatureResult]
    isolation: str
    generations: Path | None = None

    def best(self, k: int) -> TemperatureResult | None:
        """Return the temperature with the highest pass@k (the first of equals); None where none has k."""
        with_k = [result for result in self.temperatures if k in result.pass_at]
        return max(with_k, key=lambda result: result.pass_at[k].mean, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """What one evaluator measured.

    Attributes:
        type: the evaluator's key.
        metrics: by metric name.
        datasets: details by dataset name (pass@k only).
        notes: what a reader of the numbers must know.
    """

    type: str
    metrics: dict[str, float]
    datasets: dict[str, DatasetResult] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def no_targets_error() -> UserInputError:
    """The error of a measurement over batches without a single target."""
    return UserInputError(
        "the held-out batches have no target token, so nothing can be measured",
        remedy="give data.eval.sources with completions, or raise data.eval.max_examples",
    )
