"""Pipelines: each reads like its own summary, from settings to results."""

from wmtp.pipelines.evaluation import run_evaluation_pipeline
from wmtp.pipelines.outputs import EvaluationOutputs, RunOptions, RunOutputs
from wmtp.pipelines.quickstart import QuickstartOutputs, run_quickstart
from wmtp.pipelines.training import run_training_pipeline
from wmtp.pipelines.validation import Finding, validate_settings

run_training = run_training_pipeline
run_evaluation = run_evaluation_pipeline

__all__ = [
    "EvaluationOutputs",
    "Finding",
    "QuickstartOutputs",
    "RunOptions",
    "RunOutputs",
    "run_evaluation",
    "run_evaluation_pipeline",
    "run_quickstart",
    "run_training",
    "run_training_pipeline",
    "validate_settings",
]
