"""Recipe section `model`: which models, how many heads, what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from wmtp.settings.base import Section, Text


class TokenizerSettings(Section):
    """The tokenizer of the run."""

    type: Literal["hf", "raw"] = Field(
        default="hf",
        description="A Hugging Face tokenizer, or the raw file (`tokenizer.model`, `tekken.json`).",
    )
    path: Text | None = Field(
        default=None,
        description="Where it is: directory, hub id or raw file; null takes the base model's.",
    )


class MtpSettings(Section):
    """Multi-token prediction heads."""

    horizon: int = Field(
        default=4, ge=1, le=64, description="Heads: tokens predicted at once; 1 is ordinary training."
    )
    head: Literal["transformer", "linear", "medusa", "sequential"] = Field(
        default="transformer", description="Form of the extra heads."
    )
    adapter: Literal["heads", "teacher_forcing", "fallback"] = Field(
        default="heads",
        description="A model without heads: add them, shift its logits, or train with horizon 1.",
    )
    offsets: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = Field(
        default=None, description="Distance in tokens each head predicts; the first is 1; null is 1..horizon."
    )


class LoraSettings(Section):
    """Low-rank adapters on the trunk, through peft."""

    rank: int = Field(ge=1, description="Rank of the update.", examples=[16])
    alpha: float = Field(
        default=16.0, gt=0, description="Scale of the update; it is multiplied by alpha / rank."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout probability before the adapter.")
    target_modules: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="Names of the adapted linear modules; null takes peft's choice for the architecture.",
    )
    quantization: Literal["none", "nf4"] = Field(
        default="none", description="Hold the trunk's matrices in 4 bits (QLoRA), through bitsandbytes."
    )


class ModelSettings(Section):
    """Which models, how many heads, what is trained."""

    base_id: Text | None = Field(default=None, description="Model to fine-tune; wins over paths.models.base.")
    ref_id: Text | None = Field(default=None, description="Reference model; wins over paths.models.ref.")
    rm_id: Text | None = Field(default=None, description="Reward model; wins over paths.models.rm.")
    tokenizer: TokenizerSettings = Field(
        default_factory=TokenizerSettings, description="The tokenizer of the run."
    )
    mtp: MtpSettings = Field(default_factory=MtpSettings, description="Multi-token prediction heads.")
    trainable: Literal["all", "heads_only", "heads_then_all"] = Field(
        default="all",
        description="Parameters that learn: all, only heads 1..H-1, or these first and then all.",
    )
    warmup_head_steps: int = Field(
        default=0, ge=0, description="Optimizer steps of heads_then_all in which only the heads learn."
    )
    lora: LoraSettings | None = Field(
        default=None,
        description="Low-rank adapters on the trunk; the heads learn in full. null trains the trunk whole.",
    )
