"""Recipe sections about the loop and the mathematics: `train`, `loss`, `rho1`, `optim`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from wmtp.settings.base import Fraction, Ratio, Section, Seed, Text

Algorithm = Literal["baseline-mtp", "critic-wmtp", "rho1-wmtp", "mtp-weighted-ce"]


class TrainSettings(Section):
    """The algorithm and the training loop."""

    algo: Algorithm = Field(
        description="Training algorithm: how tokens are weighted.", examples=["baseline-mtp", "rho1-wmtp"]
    )
    scorer: Text | None = Field(
        default=None,
        description="Registry key of the scorer; required with mtp-weighted-ce, refused with others.",
    )
    max_steps: int = Field(ge=1, description="Optimizer steps of the whole run.", examples=[150])
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Micro-batches of one optimizer step."
    )
    seed: Seed = Field(default=0, description="Seed of weights, data order and sampling.")
    log_every_steps: int = Field(default=10, ge=1, description="Optimizer steps between two log lines.")
    eval_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between two validations; null validates only at the end.",
    )
    save_every_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps between two checkpoints; null saves only at the end."
    )
    keep_last: int = Field(default=2, ge=1, description="Newest checkpoints that are kept.")
    keep_best: int = Field(
        default=0, ge=0, description="Best checkpoints that are kept beside the newest, by best_metric."
    )
    best_metric: Text = Field(
        default="val/loss",
        description="Validation metric that keep_best goes by; a step counts where it was measured.",
        examples=["val/loss", "val/ce_head_0"],
    )
    best_mode: Literal["min", "max"] = Field(
        default="min", description="Whether a low or a high best_metric is good."
    )
    permanent_every_steps: int | None = Field(
        default=None, ge=1, description="Checkpoints of steps divisible by this are never deleted."
    )
    async_checkpoints: bool = Field(
        default=False,
        description="Write checkpoints while training goes on, from a copy of the state in host memory.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="What a NaN or infinite loss or gradient does: end the run, or drop that update.",
    )
    max_nonfinite_steps: int = Field(
        default=10,
        ge=1,
        description="Dropped updates in a row that on_nonfinite: skip allows; one more ends the run.",
    )


class LossSettings(Section):
    """From token scores to weights to one number."""

    lambda_: Fraction = Field(
        default=1.0,
        alias="lambda",
        description="Strength of the weights: w <- 1 + lambda * (w - 1); 0 is uniform.",
    )
    scale: float = Field(default=1.0, gt=0, description="Factor on the final loss.")
    reduction: Literal["position", "token", "head_sum"] = Field(
        default="position",
        description="Mean over positions, over (position, head) pairs, or the sum of each head's own mean.",
    )
    weight_scope: Literal["target", "position", "head"] = Field(
        default="target",
        description="What a weight belongs to: the predicted token, the position, or the pair.",
    )
    normalize_over: Literal["step", "running", "sequence"] = Field(
        default="step",
        description="Tokens a score is compared with: the optimizer step's, earlier steps', its document's.",
    )
    temperature: float = Field(
        default=0.7,
        gt=0,
        description="Temperature of the softmax over z-scored token scores; lower is sharper.",
    )
    epsilon: float = Field(default=0.05, gt=0, lt=1, description="Smallest weight.")
    w_max: float = Field(default=3.0, gt=1, description="Largest weight.")


class Rho1Settings(Section):
    """rho1-wmtp: weights from the gap to a reference model's loss."""

    score: Literal["excess", "absolute"] = Field(
        default="excess", description="CE_current - CE_reference (the paper), or its absolute value."
    )
    mode: Literal["weighted", "tokenskip", "random", "shuffled"] = Field(
        default="weighted",
        description="Soft weights, hard selection, or a control: random or permuted weights.",
    )
    percentile_top_p: Ratio = Field(
        default=0.15, description="Share of tokens selected by mode weighted; 1.0 takes the plain z-score."
    )
    alpha: Fraction = Field(default=0.0, description="Floor of mode weighted: w <- (1 - alpha) * w + alpha.")
    ratio: Ratio = Field(default=0.6, description="Share of tokens kept by modes tokenskip and random.")
    current: Literal["live", "frozen"] = Field(
        default="live",
        description="Model whose loss is compared: the one in training, or a snapshot of its start.",
    )
    reference: Literal["online", "precomputed"] = Field(
        default="online", description="Reference losses: computed in the run, or read from reference_scores."
    )
    reference_scores: Text | None = Field(
        default=None, description="Folder written by `wmtp score`; required with reference: precomputed."
    )


class OptimSettings(Section):
    """Optimizer, learning-rate schedule and clipping."""

    name: Literal["adamw"] = Field(default="adamw", description="Optimizer algorithm.")
    lr: float = Field(default=3e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled weight decay of matrices.")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = Field(default=(0.9, 0.95), description="Decay rates of AdamW's two moments.")
    eps: float = Field(default=1e-8, gt=0, description="Term added to AdamW's denominator.")
    scheduler: Literal["cosine", "wsd", "constant", "linear"] = Field(
        default="cosine",
        description="Learning-rate schedule after the warm-up; wsd is warm-up, stable, decay.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Optimizer steps of linear warm-up; at most train.max_steps."
    )
    decay_ratio: Ratio = Field(default=0.2, description="Share of train.max_steps in which wsd decays.")
    min_lr_ratio: Fraction = Field(default=0.1, description="Final learning rate as a share of lr.")
    grad_clip: float | None = Field(
        default=1.0, gt=0, description="Largest gradient norm over all parameters; null does not clip."
    )
