"""`critic-head-pretrainer`: stage 1 of `critic-wmtp`, a value head on the frozen base."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from wmtp.components.base import Component
from wmtp.components.data import BatchPlan, TrainingData
from wmtp.components.data.batching import Collator
from wmtp.components.optimizer import learning_rate_factor
from wmtp.components.pretrainer.quality import (
    CriticQuality,
    RewardedPrograms,
    forward_trunk_and_head,
    measure_critic,
)
from wmtp.components.pretrainer.value_loss import value_errors
from wmtp.components.registry import pretrainer_registry
from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel, ValueHead
from wmtp.settings import Recipe

logger = logging.getLogger(__name__)

_WARMUP_SHARE = 0.1
_MEASURE_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class PretrainerContext:
    """What stage 1 works on.

    Attributes:
        model: the base; it is not changed.
        train: programs to learn from.
        holdout: programs to measure on.
        collator: makes batches of features.
        device: where the model is.
        autocast: the run's precision.
        on_step: called with (step, loss) after every update.
    """

    model: MTPModel
    train: RewardedPrograms
    holdout: RewardedPrograms
    collator: Collator
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    on_step: Callable[[int, float], None] | None = None


@dataclass(frozen=True, slots=True)
class PretrainedCritic:
    """A value head and how good it is."""

    value_head: ValueHead
    quality: CriticQuality


@pretrainer_registry.register(
    "critic-head-pretrainer", version="1.0.0", description="value head, frozen base"
)
class CriticHeadPretrainer(Component[PretrainerContext, PretrainedCritic]):
    """Trains `V(h_t)` by mean squared error against the GAE(lambda) return, on right and wrong programs."""

    def __init__(self, recipe: Recipe) -> None:
        self.critic = recipe.critic
        self.seed = recipe.train.seed
        self.max_length = recipe.data.train.max_length

    def run(self, context: PretrainerContext) -> PretrainedCritic:
        """Train and measure.

        Raises:
            UserInputError: the programs' rewards do not vary, or `critic.min_explained_variance` is not met.
        """
        self._check_rewards(context.train, "training")
        self._check_rewards(context.holdout, "held-out")
        value_head = ValueHead.from_model(context.model, form=self.critic.head.form).to(context.device)
        self._train(value_head, context)
        quality = measure_critic(
            context.model,
            value_head,
            context.holdout,
            collator=context.collator,
            batch_size=_MEASURE_BATCH_SIZE,
            device=context.device,
            autocast=context.autocast,
        )
        minimum = self.critic.min_explained_variance
        if minimum is not None and not quality.explained_variance >= minimum:
            raise UserInputError(
                f"the value head explains {quality.explained_variance:.3f} of the held-out reward variance, "
                f"below critic.min_explained_variance {minimum}",
                remedy="train it longer (critic.pretrain.max_steps), on more programs, or lower the minimum",
            )
        return PretrainedCritic(value_head, quality)

    def _train(self, value_head: ValueHead, context: PretrainerContext) -> None:
        settings = self.critic.pretrain
        features = context.train.features
        plan = BatchPlan(
            [len(feature["input_ids"]) for feature in features],
            batch_size=settings.batch_size,
            max_length=self.max_length,
            seed=self.seed,
            pack=False,
        )
        optimizer = torch.optim.AdamW(value_head.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
        was_training = context.model.training
        context.model.eval()
        value_head.train()
        batches = TrainingData(features, plan, context.collator).batches()
        for step in range(settings.max_steps):
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * learning_rate_factor(
                    step,
                    schedule="cosine",
                    max_steps=settings.max_steps,
                    warmup_steps=round(_WARMUP_SHARE * settings.max_steps),
                )
            with context.autocast():
                with torch.no_grad():
                    output = forward_trunk_and_head(context.model, batch, context.device)
                values_BS = value_head(output)
            batch = {name: batch[name].to(context.device) for name in _VALUE_KEYS}
            errors_BS = value_errors(batch, values_BS, gamma=self.critic.gamma, lam=self.critic.lambda_)
            loss = errors_BS.square().sum() / batch["reward_mask"].sum().clamp(min=1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(value_head.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if context.on_step is not None:
                context.on_step(step + 1, float(loss.detach()))
        context.model.train(was_training)

    def _check_rewards(self, programs: RewardedPrograms, which: str) -> None:
        rewards = {feature["reward"] for feature in programs.features}
        if len(rewards) < 2:
            raise UserInputError(
                f"all {len(programs.features)} {which} programs have the same reward "
                f"({', '.join(map(str, rewards)) or 'none'}), from critic.reward.source "
                f"{self.critic.reward.source!r}: there is nothing to learn",
                remedy="add wrong and right programs: more critic.reward.num_programs, more "
                "critic.pretrain.num_rollouts, a higher critic.pretrain.rollout_temperature",
            )


_VALUE_KEYS = ("token_rewards", "reward_mask", "document_ids")
