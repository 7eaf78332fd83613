"""Evaluators: pass@k of generated programs, exact match, perplexity and token accuracy per head."""

from wmtp.components.evaluator.base import (
    DatasetResult,
    EvaluationResult,
    EvaluatorContext,
    ProblemResult,
    ProgressCallback,
    TemperatureResult,
)
from wmtp.components.evaluator.exact_match import ExactMatchEvaluator
from wmtp.components.evaluator.fingerprint import model_fingerprint, tokenizer_fingerprint
from wmtp.components.evaluator.losses import (
    PerplexityEvaluator,
    TokenAccuracyEvaluator,
    measure_accuracy,
    measure_losses,
    measure_validation,
)
from wmtp.components.evaluator.meta_mtp import MetaMtpEvaluator
from wmtp.components.evaluator.self_speculation import SelfSpeculationEvaluator

__all__ = [
    "DatasetResult",
    "EvaluationResult",
    "EvaluatorContext",
    "ExactMatchEvaluator",
    "MetaMtpEvaluator",
    "PerplexityEvaluator",
    "ProblemResult",
    "ProgressCallback",
    "SelfSpeculationEvaluator",
    "TemperatureResult",
    "TokenAccuracyEvaluator",
    "measure_accuracy",
    "measure_losses",
    "measure_validation",
    "model_fingerprint",
    "tokenizer_fingerprint",
]
