"""Recipe section `data`: what is trained on and how it becomes batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from wmtp.settings.base import Fraction, Section, Seed, Text

Source = Text
"""A name under `paths.datasets`, or a path, a hub id (`org/name`), `builtin:<name>` or a URI."""


class TrainDataSettings(Section):
    """Training rows and batches."""

    sources: Annotated[list[Source], Field(min_length=1)] = Field(
        description="Names under paths.datasets, or paths; rows of all are mixed.", examples=[["microcode"]]
    )
    batch_size: int = Field(
        default=1, ge=1, description="Rows of a micro-batch; with packing a row holds several examples."
    )
    max_tokens_per_batch: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of a micro-batch, padding included; where set, batch_size is not used.",
    )
    max_length: int = Field(default=2048, ge=2, description="Tokens of a row; longer examples are cut.")
    pack_sequences: bool = Field(
        default=True, description="Fill rows with several examples that never see each other."
    )
    pad_to_multiple_of: int | None = Field(
        default=None,
        ge=1,
        description="Row lengths are multiples of this, in tokens; null is 8 when packing, else 1.",
    )
    num_workers: int = Field(
        default=0, ge=0, description="Processes that prepare batches; 0 is the training process."
    )
    train_on_prompt: bool = Field(default=False, description="Count prompt tokens in the loss as well.")
    shuffle: bool = Field(default=True, description="Shuffle rows by train.seed and epoch.")
    streaming: Literal["auto", True, False] = Field(
        default="auto",
        description="Read rows as they are needed instead of holding all in memory; "
        "auto does so for sources above in_memory_mib.",
    )
    in_memory_mib: int = Field(
        default=256,
        ge=0,
        description="With streaming: auto, files up to this size together, in MiB, are held in memory.",
    )
    shuffle_buffer: int = Field(
        default=10_000,
        ge=1,
        description="Examples that are shuffled and packed among themselves when streaming.",
    )


class EvalDataSettings(Section):
    """Rows for validation during training."""

    sources: list[Source] = Field(
        default=[],
        description="Names under paths.datasets, or paths; empty holds out training rows.",
    )
    batch_size: int = Field(default=8, ge=1, description="Rows of a validation batch.")
    max_examples: int = Field(default=256, ge=1, description="Most validation examples.")


class MicroCodeSettings(Section):
    """The generator behind builtin:microcode."""

    seed: Seed = Field(default=0, description="Seed of the generated problems.")
    num_examples: int = Field(default=4000, ge=1, description="Generated training examples.")
    wrong_ratio: Fraction = Field(
        default=0.3, description="Share of training examples whose solution is wrong."
    )
    comment_ratio: Fraction = Field(
        default=0.3, description="Share of training examples with distracting comments."
    )


class DataSettings(Section):
    """What is trained on and how it becomes batches."""

    train: TrainDataSettings = Field(description="Training rows and batches.")
    eval: EvalDataSettings = Field(default_factory=EvalDataSettings, description="Rows for validation.")
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail", description="A row that cannot be read: stop, or leave it out and report it."
    )
    microcode: MicroCodeSettings = Field(
        default_factory=MicroCodeSettings, description="The generator behind builtin:microcode."
    )
