"""A tiny real model, tiny real data and a way to run a trainer on them in float64 or fp32."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.components.data import BatchPlan, MTPDataCollator, TrainingData
from wmtp.components.optimizer import OptimizerContext
from wmtp.components.scorer import ScorerSetup
from wmtp.components.trainer import BaseWmtpTrainer, TrainerContext
from wmtp.components.trainer.callbacks import Callback
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel, ValueHead
from wmtp.settings import Config, Recipe

VOCABULARY = 48


class FakeVocabulary:
    """All a collator asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 1


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Three layers; initialised wide enough that logits differ from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def tiny_features(count: int = 24, *, with_rewards: bool = False) -> list[dict[str, Any]]:
    """Documents of unequal length, each with a masked prompt of unequal length."""
    generator = torch.Generator().manual_seed(7)
    features = []
    for index in range(count):
        length = int(torch.randint(4, 15, (), generator=generator))
        prompt = int(torch.randint(0, length - 2, (), generator=generator))
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        feature: dict[str, Any] = {
            "input_ids": ids,
            "labels": [-100] * prompt + ids[prompt:],
            "row_id": f"row-{index}",
        }
        if with_rewards and index % 3:
            feature["reward"] = float(index % 2)
        features.append(feature)
    return features


def make_recipe(**sections: dict[str, Any]) -> Recipe:
    """A recipe with small defaults; `sections` are merged over them."""
    document: dict[str, dict[str, Any]] = {
        "train": {"algo": "baseline-mtp", "max_steps": 4, "log_every_steps": 1},
        "model": {"mtp": {"horizon": 3}},
        "data": {
            "train": {"sources": ["microcode"], "batch_size": 4, "max_length": 32, "pack_sequences": False}
        },
        "optim": {"lr": 1e-2, "warmup_steps": 1},
    }
    for name, values in sections.items():
        merged = document.setdefault(name, {})
        for key, value in values.items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key] = {**merged[key], **value}
            else:
                merged[key] = value
    return Recipe.model_validate(document)


@dataclass
class Built:
    """A trainer ready to run."""

    trainer: BaseWmtpTrainer
    context: TrainerContext
    recipe: Recipe
    losses: list[float] = field(default_factory=list)


class MemoryTracker:
    """A tracker that keeps what it is given."""

    run_id = "memory"

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.artifacts: list[str] = []

    def log_params(self, params: Any) -> None:
        """Nothing asks for them."""

    def log_metrics(self, metrics: Any, step: int) -> None:
        """Keep a row."""
        self.rows.append((step, dict(metrics)))

    def log_artifact(self, path: Any, folder: str | None = None) -> None:
        """Keep its name."""
        self.artifacts.append(str(path))

    def set_tags(self, tags: Any) -> None:
        """Nothing asks for them."""

    def finish(self, status: Any = "finished") -> None:
        """Nothing to close."""


class _LossRecorder(Callback):
    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def on_step_end(self, run: Any, result: Any) -> None:
        self.losses.append(float(result.loss))


def build_trainer(
    recipe: Recipe,
    *,
    dtype: torch.dtype = torch.float64,
    features: Sequence[dict[str, Any]] | None = None,
    callbacks: Sequence[Callback] = (),
    perturb_heads: bool = True,
    precision: torch.dtype = torch.float32,
) -> Built:
    """Build a trainer from a recipe; the same recipe always gives the same trainer."""
    mtp = recipe.model.mtp
    model = MTPModel.from_causal_lm(
        tiny_llama().to(dtype),
        horizon=mtp.horizon,
        head=mtp.head,
        adapter=mtp.adapter,
        offsets=mtp.offsets,
    )
    if perturb_heads:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.extra_heads.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    features = list(features or tiny_features(with_rewards=recipe.train.algo == "critic-wmtp"))
    train = recipe.data.train
    collator = MTPDataCollator(
        {"tokenizer": FakeVocabulary(), "horizon": model.horizon, "offsets": model.offsets}
    )
    plan = BatchPlan(
        [len(feature["input_ids"]) for feature in features],
        batch_size=train.batch_size,
        max_length=train.max_length,
        seed=recipe.train.seed,
        pack=train.pack_sequences,
        shuffle=train.shuffle,
    )
    modules: dict[str, torch.nn.Module] = {"model": model}
    reference = value_head = None
    if recipe.train.algo == "rho1-wmtp":
        reference = MTPModel.from_causal_lm(tiny_llama(seed=5).to(dtype), horizon=1)
    if recipe.train.algo == "critic-wmtp":
        torch.manual_seed(3)
        value_head = ValueHead.from_model(model, form="mlp")
        with torch.no_grad():
            for parameter in value_head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        if recipe.critic.value_loss_coef > 0:
            modules["value_head"] = value_head
    scorer = ComponentFactory.create_scorer(recipe)
    if scorer is not None:
        scorer.prepare(
            ScorerSetup(model=model, reference=reference, value_head=value_head, seed=recipe.train.seed)
        )
    optimizer = ComponentFactory.create_optimizer(recipe, Config()).run(
        OptimizerContext(modules, recipe.train.max_steps, {})
    )
    losses: list[float] = []
    context = TrainerContext(
        modules=modules,
        optimizer=optimizer,
        data=TrainingData(features, plan, collator),
        scorer=scorer,
        callbacks=[_LossRecorder(losses), *callbacks],
        precision=precision,
    )
    trainer = ComponentFactory.create_trainer(recipe, Config())
    trainer.setup(context)
    return Built(trainer, context, recipe, losses)


@pytest.fixture
def build() -> Callable[..., Built]:
    """`build_trainer`, under the name that tests ask for."""
    return build_trainer


def run(built: Built) -> Built:
    """Run the trainer to its end."""
    built.trainer.run(built.context)
    return built


def resume(built: Built, recipe: Recipe, callbacks: Sequence[Callback] = (), **options: Any) -> Built:
    """A trainer in a new state of everything that goes on where `built` ended, as from a checkpoint."""
    run = built.trainer.training_run
    resumed = build_trainer(recipe, callbacks=callbacks, **options)
    for name, module in built.context.modules.items():
        resumed.context.modules[name].load_state_dict(module.state_dict())
    optimizer = built.context.optimizer.optimizer
    resumed.context.optimizer.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.context.state = json.loads(json.dumps(run.state_dict()))
    by_name = {type(callback).__name__: callback for callback in built.context.callbacks}
    for callback in callbacks:
        state = by_name[type(callback).__name__].state_dict()
        callback.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
    resumed.trainer.setup(resumed.context)
    return resumed


def parameters(built: Built) -> dict[str, torch.Tensor]:
    """All trained parameters by name."""
    return {
        f"{module_name}.{name}": parameter.detach().clone()
        for module_name, module in built.context.modules.items()
        for name, parameter in module.named_parameters()
    }
