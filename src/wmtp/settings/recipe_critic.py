"""Recipe section `critic`: the reward, the value head and the weights made from it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from wmtp.settings.base import Fraction, Ratio, Section, Text


class ValueHeadSettings(Section):
    """The value head on the trunk."""

    form: Literal["transformer", "mlp", "linear"] = Field(
        default="transformer",
        description="One decoder layer and a linear map, two layers, or a linear map alone.",
    )


class RewardSettings(Section):
    """Where rewards come from."""

    source: Literal["execution", "column", "reward_model"] = Field(
        default="execution",
        description="Run tests, read the reward column, or ask a reward model (right: above the median).",
    )
    granularity: Literal["sequence", "token"] = Field(
        default="sequence",
        description="One reward, at the last token, or the change of a reward model's score at every token.",
    )
    num_programs: int = Field(
        default=1000, ge=2, description="Programs of the training data that stage 1 rewards, right and wrong."
    )


class PretrainSettings(Section):
    """Stage 1: the value head is trained on the frozen base."""

    max_steps: int = Field(default=300, ge=1, description="Optimizer steps of stage 1.")
    lr: float = Field(default=3e-3, gt=0, description="Peak learning rate of stage 1 and of the value loss.")
    batch_size: int = Field(default=16, ge=1, description="Programs of a batch of stage 1.")
    holdout_ratio: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of programs kept out, on which AUC and explained variance are measured.",
    )
    num_rollouts: int = Field(
        default=200,
        ge=0,
        description="Programs sampled from the base and rewarded, beside the data's; none with column.",
    )
    rollout_temperature: float = Field(
        default=1.0, gt=0, description="Sampling temperature of these programs."
    )


class CriticSettings(Section):
    """critic-wmtp: weights from a value function's change."""

    value_head: Text | None = Field(
        default=None,
        description="A trained value head: a path, s3://... or models:/name/version; null runs stage 1.",
    )
    head: ValueHeadSettings = Field(
        default_factory=ValueHeadSettings, description="The value head on the trunk."
    )
    reward: RewardSettings = Field(default_factory=RewardSettings, description="Where rewards come from.")
    gamma: Ratio = Field(default=1.0, description="Discount of rewards, a token.")
    lambda_: Fraction = Field(
        default=0.95,
        alias="lambda",
        description="GAE(lambda): 1 uses the rewards alone, 0 the next value alone.",
    )
    score: Literal["value", "delta"] = Field(
        default="value", description="Score of a token: the value after it, or the change of value it made."
    )
    strength: Literal["calibrated", "fixed"] = Field(
        default="calibrated",
        description="Multiply loss.lambda by max(0, 2 * AUC - 1) on held-out programs, or keep it.",
    )
    min_explained_variance: float | None = Field(
        default=None,
        le=1,
        description="Stop when held-out explained variance is below this; null never stops.",
    )
    value_loss_coef: float = Field(
        default=0.1, ge=0, description="Factor of the auxiliary value loss in stage 2."
    )
    value_loss_into_trunk: bool = Field(
        default=False, description="Let the gradient of the value loss reach the trunk."
    )
    recalibrate_every_steps: int = Field(
        default=50,
        ge=1,
        description="Optimizer steps between two measurements of AUC for strength: calibrated.",
    )
    pretrain: PretrainSettings = Field(
        default_factory=PretrainSettings, description="Stage 1: training the value head."
    )
