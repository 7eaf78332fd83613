"""Losses of a reference model on each token of the base's text, also where it has a tokenizer of its own.

Legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.components.data import CollatorSettings, LMDataCollator, to_device
from wmtp.components.data.examples import Batch, Feature, model_inputs
from wmtp.components.scorer.base import ScorerContext
from wmtp.components.scorer.losses import token_losses
from wmtp.components.tokenizer.alignment import carry_over
from wmtp.components.tokenizer.pairs import OtherDocument, TokenizerPair
from wmtp.modeling import MTPModel
from wmtp.objectives import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a document lies in a batch."""

    row: int
    start: int
    end: int


def head_losses(model: MTPModel, batch: Batch, needed_BS: Tensor) -> Tensor:
    """Loss of a model's head 0 on the needed tokens of a batch of its own ids, fp32 [B,S] by token."""
    output = model(**model_inputs(batch), num_heads=1)
    return token_losses(model, output.hidden_BSHD[:, :, 0], batch, needed_BS)


def aligned_losses(
    model: MTPModel, tokenizers: TokenizerPair, context: ScorerContext
) -> tuple[Tensor, Tensor]:
    """Loss of a reference that reads the same documents in its own tokens, carried over by characters.

    Returns:
        fp32 [B,S] by token of the base, 0 where nothing is known, and bool [B,S]: where something is. Over a
        document the losses add up to those of the reference.
    """
    input_ids_BS = context.batch["input_ids"]
    device = input_ids_BS.device
    places = list(_documents(context.batch["document_ids"].cpu()))
    documents = _read(tokenizers, places, context.batch)
    bins: list[list[Feature]] = [[] for _ in range(len(input_ids_BS))]
    for place, document in zip(places, documents, strict=True):
        bins[place.row].append({"input_ids": document.input_ids})
    # A row keeps its documents, so that the reference's batch is as full as the base's.
    settings = CollatorSettings(tokenizer=tokenizers.other.tokenizer)
    own_batch = to_device(LMDataCollator(settings)(bins), device)
    own_losses = head_losses(model, own_batch, own_batch["document_ids"] >= 0).cpu()

    losses_BS = torch.zeros(input_ids_BS.shape, dtype=torch.float32)
    known_BS = torch.zeros(input_ids_BS.shape, dtype=torch.bool)
    starts = [0] * len(bins)
    for place, document in zip(places, documents, strict=True):
        start = starts[place.row]
        starts[place.row] = end = start + len(document.input_ids)
        values = own_losses[place.row, start:end].tolist()
        carried = carry_over(values, document.spans, document.base_spans)
        losses_BS[place.row, place.start : place.end] = torch.tensor(carried)
        known_BS[place.row, place.start : place.end] = torch.tensor(document.is_known)
    return losses_BS.to(device), known_BS.to(device)


def _read(tokenizers: TokenizerPair, places: list[_Place], batch: Batch) -> list[OtherDocument]:
    """The batch's documents as the reference reads them."""
    ids, labels = batch["input_ids"].cpu(), batch["token_labels"].cpu()
    return tokenizers.read(
        [ids[place.row, place.start : place.end].tolist() for place in places],
        [(labels[place.row, place.start : place.end] != IGNORE_INDEX).tolist() for place in places],
    )


def _documents(document_ids_BS: Tensor) -> Iterator[_Place]:
    """The documents of each row, in order; padding is none."""
    for row, document_ids in enumerate(document_ids_BS):
        values, counts = torch.unique_consecutive(document_ids, return_counts=True)
        start = 0
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            if value >= 0:
                yield _Place(row, start, start + count)
            start += count
