"""Evaluators: pass@k of generated programs, perplexity and token accuracy per head."""

from wmtp.components.evaluator.base import (
    DatasetResult,
    EvaluationResult,
    EvaluatorContext,
    ProblemResult,
    ProgressCallback,
    TemperatureResult,
)
from wmtp.components.evaluator.losses import (
    PerplexityEvaluator,
    TokenAccuracyEvaluator,
    measure_accuracy,
    measure_losses,
)
from wmtp.components.evaluator.meta_mtp import MetaMtpEvaluator

__all__ = [
    "DatasetResult",
    "EvaluationResult",
    "EvaluatorContext",
    "MetaMtpEvaluator",
    "PerplexityEvaluator",
    "ProblemResult",
    "ProgressCallback",
    "TemperatureResult",
    "TokenAccuracyEvaluator",
    "measure_accuracy",
    "measure_losses",
]
