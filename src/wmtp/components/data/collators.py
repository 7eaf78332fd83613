"""Collators: features, or bins of features, to one right-padded batch.

Shapes: B rows, S tokens of the longest row (rounded up to `pad_to_multiple_of`), H heads.
Padding is known by length and never by id, because many tokenizers pad with the end-of-sequence token, which
is a target like any other where it stands at the end of a document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wmtp.components.data.arguments import settings_of
from wmtp.components.data.examples import Batch, Bin, Feature
from wmtp.components.registry import collator_registry
from wmtp.exceptions import DataError, UserInputError
from wmtp.objectives import IGNORE_INDEX, shift_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class CollatorSettings:
    """Settings of both collators.

    Attributes:
        tokenizer: a Hugging Face tokenizer; only its padding id is used.
        horizon: number of heads H, at least 1. `LMDataCollator` has no use for it.
        offsets: what each head predicts, as a distance in tokens; None means 1..H.
        pad_to_multiple_of: row length is rounded up to this many tokens; None pads to the longest row.
    """

    tokenizer: Any = None
    horizon: int = 4
    offsets: Sequence[int] | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise UserInputError(
                "a collator needs a tokenizer and got none", remedy='pass {"tokenizer": tokenizer, ...}'
            )
        if self.horizon < 1:
            raise UserInputError(f"horizon is {self.horizon}", remedy="use a horizon of at least 1")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise UserInputError(
                f"pad_to_multiple_of is {self.pad_to_multiple_of}", remedy="use a positive number or None"
            )

    @property
    def padding_id(self) -> int:
        """The id written on padding; which one does not matter, since padding is masked by length."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0


@collator_registry.register(
    "lm-data-collator", version="1.0.0", description="labels [B,S], unshifted, for next-token models"
)
class LMDataCollator:
    """Batches for next-token models: `labels` [B,S] follow the Hugging Face convention (the model shifts).

    Where several documents share a row, the first token of each but the first carries -100: the model would
    otherwise learn to predict it from the document before.
    """

    def __init__(self, settings: CollatorSettings | Mapping[str, Any]) -> None:
        self.settings = settings_of(CollatorSettings, settings)

    def __call__(self, features: Sequence[Feature | Bin]) -> Batch:
        """Collate features or bins of features.

        Returns:
            `input_ids attention_mask labels token_labels document_ids position_ids`, each [B,S] long, and,
            where features carry them, `token_rewards token_weights` [B,S] float32, `reward_mask` [B,S] bool
            and `row_ids`.

        Raises:
            DataError: no features, a feature without tokens, or columns of different lengths.
        """
        batch = _pad_rows(features, self.settings)
        is_new_document_BS = torch.zeros_like(batch["token_labels"], dtype=torch.bool)
        is_new_document_BS[:, 1:] = batch["document_ids"][:, 1:] != batch["document_ids"][:, :-1]
        batch["labels"] = batch["token_labels"].masked_fill(is_new_document_BS, IGNORE_INDEX)
        return batch


@collator_registry.register(
    "mtp-data-collator", version="1.0.0", description="labels [B,S,H], shifted for each head"
)
class MTPDataCollator:
    """Batches for multi-token prediction: `labels[b,t,h]` is what head h predicts at t, token t+h+1.

    It is -100 where that token is padding, masked, past the end or in another document.
    """

    def __init__(self, settings: CollatorSettings | Mapping[str, Any]) -> None:
        self.settings = settings_of(CollatorSettings, settings)

    def __call__(self, features: Sequence[Feature | Bin]) -> Batch:
        """Collate features or bins of features; as `LMDataCollator`, but `labels` is [B,S,H] long.

        Example: lengths 5 and 3 with horizon 4 give labels of shape (2, 5, 4).
        """
        batch = _pad_rows(features, self.settings)
        batch["labels"] = shift_labels(
            batch["token_labels"],
            self.settings.horizon,
            document_ids_BS=batch["document_ids"],
            offsets=self.settings.offsets,
        )
        return batch


@dataclass(slots=True)
class _Document:
    """One feature with its columns checked and its own padding dropped."""

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None
    rewards: list[float] | None
    row_id: str | None


def _pad_rows(features: Sequence[Feature | Bin], settings: CollatorSettings) -> Batch:
    """Lay each bin's documents side by side and pad rows on the right; everything but `labels`."""
    rows = [[_document(feature) for feature in _as_bin(item)] for item in features]
    if not rows:
        raise DataError("a batch needs at least one feature", remedy="check the batch sampler")
    longest = max(sum(len(document.input_ids) for document in row) for row in rows)
    multiple = settings.pad_to_multiple_of or 1
    shape = (len(rows), -(-longest // multiple) * multiple)

    input_ids_BS = torch.full(shape, settings.padding_id, dtype=torch.long)
    attention_mask_BS = torch.zeros(shape, dtype=torch.long)
    token_labels_BS = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    document_ids_BS = torch.full(shape, -1, dtype=torch.long)
    position_ids_BS = torch.zeros(shape, dtype=torch.long)
    token_rewards_BS = torch.zeros(shape, dtype=torch.float32)
    reward_mask_BS = torch.zeros(shape, dtype=torch.bool)
    token_weights_BS = torch.zeros(shape, dtype=torch.float32)
    for b, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            end = start + len(document.input_ids)
            input_ids_BS[b, start:end] = torch.tensor(document.input_ids)
            attention_mask_BS[b, start:end] = 1
            token_labels_BS[b, start:end] = torch.tensor(document.labels)
            document_ids_BS[b, start:end] = number
            position_ids_BS[b, start:end] = torch.arange(end - start)
            token_weights_BS[b, start:end] = (
                1.0 if document.weights is None else torch.tensor(document.weights)
            )
            if document.rewards is not None:
                token_rewards_BS[b, start:end] = torch.tensor(document.rewards)
                reward_mask_BS[b, start:end] = True
            start = end

    batch: Batch = {
        "input_ids": input_ids_BS,
        "attention_mask": attention_mask_BS,
        "token_labels": token_labels_BS,
        "document_ids": document_ids_BS,
        "position_ids": position_ids_BS,
    }
    documents = [document for row in rows for document in row]
    if any(document.rewards is not None for document in documents):
        batch |= {"token_rewards": token_rewards_BS, "reward_mask": reward_mask_BS}
    if any(document.weights is not None for document in documents):
        batch["token_weights"] = token_weights_BS
    if any(document.row_id is not None for document in documents):
        batch["row_ids"] = [[document.row_id or "unnamed" for document in row] for row in rows]
    return batch


def _as_bin(item: Feature | Bin) -> Bin:
    # Bins are lists; features are dicts or, from Hugging Face tokenizers, other mappings.
    if isinstance(item, list):
        if not item:
            raise DataError("a bin without features", remedy="leave empty bins out")
        return item
    return [item]


def _document(feature: Feature) -> _Document:
    """Read a feature's columns; its own padding (`attention_mask` 0) is dropped, not trained on."""
    input_ids = _as_list(feature["input_ids"])
    row_id = feature.get("row_id")
    name = "a feature" if row_id is None else f"feature {row_id}"
    labels = _as_list(feature["labels"]) if "labels" in feature else list(input_ids)
    weights = _as_list(feature["weights"]) if "weights" in feature else None
    rewards = None if feature.get("rewards") is None else _as_list(feature["rewards"])
    mask = _as_list(feature["attention_mask"]) if "attention_mask" in feature else None
    columns = (("labels", labels), ("weights", weights), ("rewards", rewards), ("attention_mask", mask))
    for column, values in columns:
        if values is not None and len(values) != len(input_ids):
            raise DataError(
                f"{name} has {len(input_ids)} input_ids but {len(values)} {column}",
                remedy="give every token one value in each column",
            )
    if mask is not None and not all(mask):
        input_ids, labels = _kept(input_ids, mask), _kept(labels, mask)
        weights = None if weights is None else _kept(weights, mask)
        rewards = None if rewards is None else _kept(rewards, mask)
    if not input_ids:
        raise DataError(f"{name} has no tokens", remedy="leave empty examples out of the dataset")
    reward = feature.get("reward")
    if rewards is None and reward is not None:
        rewards = [0.0] * (len(input_ids) - 1) + [reward]
    return _Document(input_ids, labels, weights, rewards, row_id)


def _as_list(column: Any) -> list[Any]:
    # Tensors and arrays have `tolist`, which gives plain numbers; lists and tuples are taken as they are.
    return list(column) if isinstance(column, list | tuple) else list(column.tolist())


def _kept(values: list[Any], mask: list[Any]) -> list[Any]:
    return [value for value, is_real in zip(values, mask, strict=True) if is_real]
