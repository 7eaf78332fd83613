"""Perplexity and token accuracy of every head on held-out batches.

Legend: B batch, S sequence, H horizon, D hidden, V vocabulary, C positions of one chunk. [B,S,H,V] is never
built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from wmtp.components.base import Component
from wmtp.components.data import to_device
from wmtp.components.data.examples import Batch, model_inputs
from wmtp.components.evaluator.base import (
    EvaluationResult,
    EvaluatorContext,
    no_targets_error,
)
from wmtp.components.registry import evaluator_registry
from wmtp.modeling import MTPModel, MTPOutput, evaluating
from wmtp.objectives import IGNORE_INDEX, shift_labels, token_cross_entropy
from wmtp.settings.recipe_eval import EvalSettings

Autocast = Callable[[], AbstractContextManager[object]]

# Logits of one chunk, in elements: 64 MiB in fp32.
_CHUNK_ELEMENTS: Final = 16 * 2**20


def measure_losses(
    model: MTPModel, batches: Iterable[Batch], *, autocast: Autocast = nullcontext
) -> dict[str, float]:
    """Return the exact token means of the cross entropy, in nats, and what follows from them.

    Sums and counts run over all batches before anything is divided, so the numbers do not depend on the batch
    size.

    Returns:
        `val/loss`: the uniform training loss, the mean over positions with a target of the mean over their
        heads; `val/ce_head_{h}`: the mean over head h's targets; `perplexity_head_{h}`: its exponential. A
        head without targets (documents shorter than its distance) has no entries.

    Raises:
        UserInputError: no batch has a target.
    """
    ce_sum_H = torch.zeros(model.horizon, dtype=torch.float64)
    count_H = torch.zeros(model.horizon, dtype=torch.int64)
    loss_sum, num_positions = 0.0, 0
    with evaluating(model):
        for batch in batches:
            output, labels_BSH = _forward(model, batch, autocast)
            ce_BSH = torch.stack(
                [
                    token_cross_entropy(
                        output.hidden_BSHD[:, :, head],
                        model.unembedding_VD,
                        labels_BSH[:, :, head],
                        logit_scale=model.logit_scale,
                        logit_softcap=model.logit_softcap,
                        bias_V=model.unembedding_bias_V,
                    )
                    for head in range(model.horizon)
                ],
                dim=2,
            ).double()
            is_target_BSH = labels_BSH != IGNORE_INDEX
            num_heads_BS = is_target_BSH.sum(dim=2)
            ce_sum_H += ce_BSH.sum(dim=(0, 1)).cpu()
            count_H += is_target_BSH.sum(dim=(0, 1)).cpu()
            loss_sum += float((ce_BSH.sum(dim=2) / num_heads_BS.clamp(min=1)).sum())
            num_positions += int((num_heads_BS > 0).sum())
    if num_positions == 0:
        raise no_targets_error()
    metrics = {"val/loss": loss_sum / num_positions}
    for head, (ce_sum, count) in enumerate(zip(ce_sum_H.tolist(), count_H.tolist(), strict=True)):
        if count:
            metrics[f"val/ce_head_{head}"] = ce_sum / count
            metrics[f"perplexity_head_{head}"] = _exponential(ce_sum / count)
    return metrics


def measure_accuracy(
    model: MTPModel, batches: Iterable[Batch], *, autocast: Autocast = nullcontext
) -> dict[str, float]:
    """Return `token_accuracy_head_{h}`: how often head h's most likely token is its target.

    A head without targets has no entry.

    Raises:
        UserInputError: no batch has a target.
    """
    correct_H = torch.zeros(model.horizon, dtype=torch.int64)
    count_H = torch.zeros(model.horizon, dtype=torch.int64)
    with evaluating(model):
        for batch in batches:
            output, labels_BSH = _forward(model, batch, autocast)
            for head in range(model.horizon):
                labels_BS = labels_BSH[:, :, head]
                is_target_BS = labels_BS != IGNORE_INDEX
                hidden_ND = output.hidden_BSHD[:, :, head][is_target_BS]
                correct_H[head] += _num_correct(model, hidden_ND, labels_BS[is_target_BS])
                count_H[head] += int(is_target_BS.sum())
    if not count_H.any():
        raise no_targets_error()
    return {
        f"token_accuracy_head_{head}": correct / count
        for head, (correct, count) in enumerate(zip(correct_H.tolist(), count_H.tolist(), strict=True))
        if count
    }


@evaluator_registry.register("perplexity", version="1.0.0")
class PerplexityEvaluator(Component[EvaluatorContext, EvaluationResult]):
    """Cross entropy and perplexity of every head, as exact token means."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings

    def run(self, context: EvaluatorContext) -> EvaluationResult:
        """Measure on `context.batches`; see `measure_losses`."""
        metrics = measure_losses(context.model, context.batches, autocast=context.autocast)
        return EvaluationResult(type="perplexity", metrics=metrics)


@evaluator_registry.register("token-accuracy", version="1.0.0")
class TokenAccuracyEvaluator(Component[EvaluatorContext, EvaluationResult]):
    """Top-1 accuracy of every head on its targets."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings

    def run(self, context: EvaluatorContext) -> EvaluationResult:
        """Measure on `context.batches`; see `measure_accuracy`."""
        metrics = measure_accuracy(context.model, context.batches, autocast=context.autocast)
        return EvaluationResult(type="token-accuracy", metrics=metrics)


def _forward(model: MTPModel, batch: Batch, autocast: Autocast) -> tuple[MTPOutput, Tensor]:
    """Run the model on a batch; returns its output and every head's targets [B,S,H]."""
    batch = to_device(batch, model.device)
    with autocast():
        output: MTPOutput = model(**model_inputs(batch))
    labels_BSH = shift_labels(
        batch["token_labels"],
        model.horizon,
        document_ids_BS=batch["document_ids"],
        offsets=model.offsets,
    )
    return output, labels_BSH


def _num_correct(model: MTPModel, hidden_ND: Tensor, labels_N: Tensor) -> int:
    num_rows = max(1, _CHUNK_ELEMENTS // model.unembedding_VD.shape[0])
    hidden_ND = hidden_ND.to(model.unembedding_VD.dtype)
    chunks = zip(torch.split(hidden_ND, num_rows), torch.split(labels_N, num_rows), strict=True)
    matches = [(model.unembed(hidden_CD).argmax(dim=-1) == labels_C).sum() for hidden_CD, labels_C in chunks]
    return int(torch.stack(matches).sum())


def _exponential(mean: float) -> float:
    # A diverged model's mean may be beyond what a float's exponential can hold.
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
