"""`Recipe`: what is run. Algorithm, model and heads, data, loss, optimizer and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from pydantic import Field, model_validator

from wmtp.settings.base import Section, Violation, raise_violations
from wmtp.settings.recipe_critic import CriticSettings
from wmtp.settings.recipe_data import DataSettings
from wmtp.settings.recipe_eval import EvalSettings
from wmtp.settings.recipe_model import ModelSettings
from wmtp.settings.recipe_train import LossSettings, OptimSettings, Rho1Settings, TrainSettings


class Recipe(Section):
    """What is run. Two runs with the same recipe, data and models do the same work wherever they happen."""

    train: TrainSettings = Field(description="The algorithm and the training loop.")
    model: ModelSettings = Field(default_factory=ModelSettings, description="Models, heads, what is trained.")
    data: DataSettings = Field(description="What is trained on and how it becomes batches.")
    loss: LossSettings = Field(
        default_factory=LossSettings, description="From token scores to weights to one number."
    )
    rho1: Rho1Settings = Field(
        default_factory=Rho1Settings,
        description="Weights from the gap to a reference model's loss (rho1-wmtp).",
    )
    critic: CriticSettings = Field(
        default_factory=CriticSettings, description="Weights from a value function's change (critic-wmtp)."
    )
    optim: OptimSettings = Field(default_factory=OptimSettings, description="Optimizer and schedule.")
    eval: EvalSettings = Field(default_factory=EvalSettings, description="What is measured after training.")

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        raise_violations(_find_violations(self))
        return self


def _find_violations(recipe: Recipe) -> Iterator[Violation]:
    """Check the rules that span several fields."""
    yield from _check_train(recipe)
    yield from _check_checkpoints(recipe)
    yield from _check_rewards(recipe)
    yield from _check_heads(recipe)
    yield from _check_trainable(recipe)
    yield from _check_schedule(recipe)


def _check_train(recipe: Recipe) -> Iterator[Violation]:
    """Scorer and algorithm, reference scores, batch limits."""
    train, data, rho1 = recipe.train, recipe.data.train, recipe.rho1
    if train.algo == "mtp-weighted-ce" and train.scorer is None:
        yield Violation(
            "train.scorer",
            "is required with train.algo: mtp-weighted-ce",
            "name a scorer; `wmtp list scorer` shows them",
            ("train.algo",),
        )
    if train.algo != "mtp-weighted-ce" and train.scorer is not None:
        yield Violation(
            "train.scorer",
            f"is not used by train.algo: {train.algo}, which has its own scorer",
            "remove it, or set train.algo: mtp-weighted-ce",
            ("train.algo",),
        )
    if rho1.reference == "precomputed" and rho1.reference_scores is None:
        yield Violation(
            "rho1.reference_scores",
            "is required with rho1.reference: precomputed",
            "give the folder that `wmtp score` wrote, or set rho1.reference: online",
            ("rho1.reference",),
        )
    if data.streaming is True and train.algo == "critic-wmtp":
        yield Violation(
            "data.train.streaming",
            "cannot be true with train.algo: critic-wmtp, whose first stage goes through all examples",
            "set it to false; the training rows must then fit into memory",
            ("train.algo",),
        )
    if data.max_tokens_per_batch is not None and data.max_tokens_per_batch < data.max_length:
        yield Violation(
            "data.train.max_tokens_per_batch",
            f"is below data.train.max_length ({data.max_length}), so a full row never fits",
            f"set it to at least {data.max_length}, or lower data.train.max_length",
            ("data.train.max_length",),
        )


def _check_checkpoints(recipe: Recipe) -> Iterator[Violation]:
    """What is kept for ever or as the best must be saved, and measured, in the first place."""
    train = recipe.train
    every, permanent = train.save_every_steps, train.permanent_every_steps
    if train.keep_best > 0 and (every is None or train.eval_every_steps is None):
        missing = "train.save_every_steps" if every is None else "train.eval_every_steps"
        yield Violation(
            "train.keep_best",
            f"needs checkpoints that were measured on the way, and {missing} is null",
            f"set {missing}, or train.keep_best to 0",
            (missing,),
        )
    if permanent is not None and (every is None or permanent % every != 0):
        yield Violation(
            "train.permanent_every_steps",
            f"must be a multiple of train.save_every_steps ({every}), or no such step is saved",
            "set it to a multiple, or to null",
            ("train.save_every_steps",),
        )


def _check_rewards(recipe: Recipe) -> Iterator[Violation]:
    """Only a reward model tells a reward at every token."""
    reward = recipe.critic.reward
    if reward.granularity == "token" and reward.source != "reward_model":
        yield Violation(
            "critic.reward.granularity",
            f"cannot be token with critic.reward.source: {reward.source}, which gives a program one reward",
            "set it to sequence, or critic.reward.source: reward_model",
            ("critic.reward.source",),
        )


def _check_heads(recipe: Recipe) -> Iterator[Violation]:
    """Horizon, offsets and length of a row."""
    mtp, max_length = recipe.model.mtp, recipe.data.train.max_length
    length_key = "data.train.max_length"
    if mtp.horizon >= max_length:
        yield Violation(
            "model.mtp.horizon",
            f"must be below {length_key} ({max_length}): the last head predicts {mtp.horizon} tokens "
            "ahead and would have no target",
            f"set model.mtp.horizon to at most {max_length - 1}, or raise {length_key}",
            (length_key,),
        )
    offsets = mtp.offsets
    if offsets is not None:
        if len(offsets) != mtp.horizon or offsets[0] != 1 or sorted(set(offsets)) != offsets:
            yield Violation(
                "model.mtp.offsets",
                f"must be model.mtp.horizon ({mtp.horizon}) increasing numbers, the first 1",
                "list one distance a head, such as [1, 2, 4, 8] with horizon 4, or remove it",
                ("model.mtp.horizon",),
            )
        elif offsets[-1] >= max_length:
            yield Violation(
                "model.mtp.offsets",
                f"must stay below {length_key} ({max_length})",
                f"lower the last offset, or raise {length_key}",
                (length_key,),
            )


def _check_trainable(recipe: Recipe) -> Iterator[Violation]:
    """What is trained exists, and nothing is asked of what is frozen."""
    model, mtp = recipe.model, recipe.model.mtp
    trainable_key, steps_key = "model.trainable", "model.warmup_head_steps"
    if model.trainable != "all" and (mtp.horizon == 1 or mtp.adapter != "heads"):
        is_short = mtp.horizon == 1
        yield Violation(
            trainable_key,
            "needs heads that can learn, and "
            + ("model.mtp.horizon is 1" if is_short else f"model.mtp.adapter is {mtp.adapter}"),
            f"set {'model.mtp.horizon above 1' if is_short else 'model.mtp.adapter: heads'}, or "
            f"{trainable_key}: all",
            ("model.mtp.horizon", "model.mtp.adapter"),
        )
    if model.trainable == "heads_then_all" and not 0 < model.warmup_head_steps < recipe.train.max_steps:
        yield Violation(
            steps_key,
            f"must be above 0 and below train.max_steps ({recipe.train.max_steps}) with heads_then_all",
            "set how many steps train the heads alone",
            (trainable_key, "train.max_steps"),
        )
    if model.trainable != "heads_then_all" and model.warmup_head_steps > 0:
        yield Violation(
            steps_key,
            f"is not used with {trainable_key}: {model.trainable}",
            f"remove it, or set {trainable_key}: heads_then_all",
            (trainable_key,),
        )
    if model.trainable == "heads_only" and model.lora is not None:
        yield Violation(
            "model.lora",
            f"puts adapters on the trunk, which learns nothing with {trainable_key}: heads_only",
            f"remove it, or set {trainable_key}: all",
            (trainable_key,),
        )
    if model.trainable == "heads_only" and recipe.critic.value_loss_into_trunk:
        yield Violation(
            "critic.value_loss_into_trunk",
            f"has nothing to move: the trunk is frozen with {trainable_key}: heads_only",
            f"set it to false, or {trainable_key}: all",
            (trainable_key,),
        )


def _check_schedule(recipe: Recipe) -> Iterator[Violation]:
    """Warm-up and decay fit into the run."""
    optim, max_steps = recipe.optim, recipe.train.max_steps
    if optim.warmup_steps > max_steps:
        yield Violation(
            "optim.warmup_steps",
            f"must be at most train.max_steps ({max_steps})",
            "lower optim.warmup_steps or raise train.max_steps",
            ("train.max_steps",),
        )
    elif optim.scheduler == "wsd" and optim.warmup_steps + optim.decay_ratio * max_steps > max_steps:
        yield Violation(
            "optim.decay_ratio",
            f"leaves no room: warm-up ({optim.warmup_steps}) and decay exceed train.max_steps ({max_steps})",
            "lower optim.decay_ratio or optim.warmup_steps",
            ("optim.warmup_steps", "optim.scheduler", "train.max_steps"),
        )
