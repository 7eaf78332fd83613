"""What flows from datasets to batches: examples (text), features (token ids), bins (features in a row)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

from torch import Tensor

from wmtp.evaluation.tasks import Task

# A number (the sample), a list of numbers (one per token of the text without special tokens, or one per
# message of a chat), or character spans over prompt + completion: {"start", "end", "weight"}.
Weight: TypeAlias = float | list[float] | list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a dataset, in the form that every dataset kind is brought to.

    Attributes:
        row_id: where it came from, such as `mbpp.jsonl:12`; unique within a source.
        prompt: what the model is given; masked from the loss unless `train_on_prompt`. Empty for plain text.
        completion: what the model learns to write.
        reward: a reward already in the dataset, None when unknown.
        weight: column weights, None for 1.0 everywhere; see `Weight`.
        messages: the turns of a chat, each with `role` and `content`; prompt and completion are then empty.
        task: the tests that a completion of this prompt is executed against.
    """

    row_id: str
    prompt: str
    completion: str
    reward: float | None = None
    weight: Weight | None = None
    messages: tuple[dict[str, str], ...] | None = None
    task: Task | None = None


class _FeatureTokens(TypedDict):
    input_ids: Sequence[int]


class Feature(_FeatureTokens, total=False):
    """A tokenised example. Only `input_ids` is required.

    `labels` default to `input_ids`, -100 marks what is no target; `attention_mask` 0 marks padding, which
    collators drop; `reward` belongs to the whole document, and `rewards` has one number a token, which add up
    to it (without them it falls on the last token); `weights` has one number a token.
    """

    labels: Sequence[int]
    attention_mask: Sequence[int]
    reward: float | None
    rewards: Sequence[float] | None
    weights: Sequence[float]
    row_id: str


@dataclass(frozen=True, slots=True)
class TokenizedCount:
    """How many examples were tokenised, cut to length, and dropped because no target was left."""

    num_examples: int = 0
    num_cut: int = 0
    num_dropped: int = 0

    def __add__(self, other: TokenizedCount) -> TokenizedCount:
        return TokenizedCount(
            self.num_examples + other.num_examples,
            self.num_cut + other.num_cut,
            self.num_dropped + other.num_dropped,
        )


# Features that share one row of a batch, side by side.
Bin: TypeAlias = list[Feature]

# What a collator returns: tensors, and `row_ids` (a list of strings for each row of the batch).
Batch: TypeAlias = dict[str, Any]

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_ids")


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """The part of a batch that a model's forward takes, by the names of its arguments."""
    return {name: batch[name] for name in _MODEL_INPUTS}
