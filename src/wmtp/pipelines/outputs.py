"""What pipelines are asked for and what they return."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wmtp.components.evaluator import EvaluationResult
from wmtp.components.pretrainer import CriticQuality
from wmtp.reporting import ReportRun


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What only the command line may say of a run.

    Attributes:
        run_name: name of the run's folders; None makes one from algorithm, data and time.
        tags: of the MLflow run.
        unsafe_execution: run generated programs without a sandbox.
        trust_remote_code: let models run code that comes with them.
    """

    run_name: str | None = None
    tags: tuple[str, ...] = ()
    unsafe_execution: bool = False
    trust_remote_code: bool = False

    def run_tags(self) -> dict[str, str]:
        """Tags of the tracked run: the user's own, and what the command line allowed beyond the settings."""
        allowed = {"unsafe_execution": self.unsafe_execution, "trust_remote_code": self.trust_remote_code}
        return dict.fromkeys([*self.tags, *(name for name, given in allowed.items() if given)], "true")

    def nested(self, run_name: str) -> RunOptions:
        """The options of a run that this one needs first."""
        return replace(self, run_name=run_name, tags=())


@dataclass(frozen=True, slots=True)
class EvaluationOutputs:
    """What an evaluation measured.

    Attributes:
        metrics: by metric name.
        results: one a type and dataset, with per-problem verdicts.
        skipped: what could not be run, with reason and remedy.
        folder: where generations and verdicts are; None for a dry run.
        run_name: name of the report's folder, where the evaluation is a run of its own.
        report: the HTML report, likewise.
        dry_run: what would be measured, where it was one.
    """

    metrics: dict[str, float]
    results: list[EvaluationResult] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    folder: Path | None = None
    run_name: str | None = None
    report: Path | None = None
    dry_run: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RunOutputs:
    """How a training run ended and what it left.

    Attributes:
        run_name: name of its folders.
        metrics: last training metrics and all evaluation metrics, by name.
        step: finished updates.
        stop_reason: the signal that ended it early; None otherwise.
        checkpoint: newest `step-N` folder, a path or an `s3://` address.
        export: the trained model as a Hugging Face checkpoint.
        report: the HTML report.
        mlflow_run_id: id of its MLflow run.
        critic: how good the value head is at the end.
        report_run: what the report was made of, for comparisons.
        evaluation: what was measured after training.
        dry_run: shapes and memory, where it was one.
    """

    run_name: str
    metrics: dict[str, float]
    step: int = 0
    stop_reason: str | None = None
    checkpoint: str | None = None
    export: Path | None = None
    report: Path | None = None
    mlflow_run_id: str | None = None
    critic: CriticQuality | None = None
    report_run: ReportRun | None = None
    evaluation: EvaluationOutputs | None = None
    dry_run: dict[str, Any] | None = None
