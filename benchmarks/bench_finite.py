"""What the finite gate costs: steps with and without its evidence, in turn, in one process.

    OMP_NUM_THREADS=1 python benchmarks/bench_finite.py

Times are CPU seconds of this process, so that a busy machine changes them little. Without the evidence a step
still has the flag that suppresses its update; what is left out is which rows, heads and parameters it was.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.components.data import BatchPlan, MTPDataCollator, TrainingData
from wmtp.components.optimizer import OptimizerContext
from wmtp.components.trainer import BaseWmtpTrainer, TrainerContext
from wmtp.components.trainer.callbacks import FiniteCallback
from wmtp.components.trainer.evidence import GradientNorms, MicroBatchEvidence
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel
from wmtp.settings import Config, Recipe

VOCABULARY, LENGTH, NUM_STEPS = 4096, 128, 25


class _Vocabulary:
    pad_token_id = 0
    eos_token_id = 1


class _NoTracker:
    run_id = None

    def log_artifact(self, path: Any, folder: str | None = None) -> None:
        """Nothing is logged."""


def build() -> tuple[BaseWmtpTrainer, TrainerContext]:
    """A Llama of six layers, four heads, two micro-batches of 4 x 128 tokens a step."""
    torch.manual_seed(0)
    recipe = Recipe.model_validate(
        {
            "train": {"algo": "baseline-mtp", "max_steps": 1000, "gradient_accumulation_steps": 2},
            "model": {"mtp": {"horizon": 4}},
            "data": {"train": {"sources": ["microcode"], "batch_size": 4, "max_length": LENGTH}},
            "optim": {"lr": 1e-4},
        }
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = MTPModel.from_causal_lm(LlamaForCausalLM(config), horizon=4)
    features = [{"input_ids": torch.randint(2, VOCABULARY, (LENGTH,)).tolist()} for _ in range(64)]
    collator = MTPDataCollator({"tokenizer": _Vocabulary(), "horizon": 4})
    plan = BatchPlan([LENGTH] * 64, batch_size=4, max_length=LENGTH, pack=False)
    modules: dict[str, nn.Module] = {"model": model}
    optimizer = ComponentFactory.create_optimizer(recipe, Config()).run(OptimizerContext(modules, 1000, {}))
    context = TrainerContext(
        modules=modules, optimizer=optimizer, data=TrainingData(features, plan, collator)
    )
    trainer = ComponentFactory.create_trainer(recipe, Config())
    trainer.setup(context)
    return trainer, context


def without_evidence() -> ExitStack:
    """Leave out every reduction that is there for the report alone."""

    def constant(values: Tensor, dim: Any) -> Tensor:
        return torch.ones((), dtype=torch.bool)

    def norms(module: nn.Module, device: torch.device) -> GradientNorms:
        parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return GradientNorms(parameters, torch.zeros(0), total)

    stack = ExitStack()
    stack.enter_context(mock.patch("wmtp.components.trainer.step.all_finite", constant))
    stack.enter_context(mock.patch.object(MicroBatchEvidence, "watch", return_value=None))
    stack.enter_context(mock.patch("wmtp.components.trainer.base.gradient_norms", norms))
    return stack


def main() -> None:
    """Print the median step with and without, and the ratio."""
    trainer, context = build()
    run = trainer.training_run
    batches = [context.data.batch(0), context.data.batch(1)]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with TemporaryDirectory() as folder:
        callback = FiniteCallback(trainer.recipe.train, Path(folder), _NoTracker())  # type: ignore[arg-type]
        callback.on_train_start(run)
        for index in range(2 * NUM_STEPS + 4):
            is_with = index % 2 == 0
            with ExitStack() if is_with else without_evidence():
                began = time.process_time()
                result = trainer.run_step(batches)
                if is_with:
                    callback.on_step_end(run, result)
                if index >= 4:
                    seconds[is_with].append(time.process_time() - began)
    pairs = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    print(f"with {statistics.median(seconds[True]):.4f} s, without {statistics.median(seconds[False]):.4f} s")
    print(f"median of the ratios of neighbouring steps: {statistics.median(pairs):.4f}")


if __name__ == "__main__":
    main()
