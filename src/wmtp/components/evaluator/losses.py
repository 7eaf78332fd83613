"""Perplexity, token accuracy and agreement of every head on held-out batches.

Legend: B batch, S sequence, H horizon, D hidden, V vocabulary, C positions of one chunk. [B,S,H,V] is never
built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
    losses = _LossSums(model)
    _measure(model, batches, autocast, [losses])
    return losses.metrics()


def measure_accuracy(
    model: MTPModel, batches: Iterable[Batch], *, autocast: Autocast = nullcontext
) -> dict[str, float]:
    """Return how often heads are right, and how often they agree with what head 0 would write.

    Returns:
        `token_accuracy_head_{h}`: how often head h's most likely token is its target.
        `acceptance_proxy_head_{h}`, h >= 1, for what self-speculation accepts: the share of positions t, of
        those where heads 0..h all have a target, at which for every j in 1..h the most likely token of head j
        at t is the most likely token of head 0 at t+j. That is the token which head 0 would write there if
        the text so far were its own.
        `acceptance_proxy_tokens_per_forward`: 1 + the sum of these, the tokens a verifying forward would
        yield. Heads that cannot draft (offsets with a gap) have neither, a head without targets no entries.

    Raises:
        UserInputError: no batch has a target.
    """
    matches = _MatchCounts(model)
    _measure(model, batches, autocast, [matches])
    return matches.metrics()


def measure_validation(
    model: MTPModel, batches: Iterable[Batch], *, autocast: Autocast = nullcontext
) -> dict[str, float]:
    """Return losses, accuracies and acceptance of one pass, all under `val/` but for the perplexities."""
    losses, matches = _LossSums(model), _MatchCounts(model)
    _measure(model, batches, autocast, [losses, matches])
    return losses.metrics() | {f"val/{name}": value for name, value in matches.metrics().items()}


def _measure(
    model: MTPModel, batches: Iterable[Batch], autocast: Autocast, sums: Sequence[_LossSums | _MatchCounts]
) -> None:
    has_target = False
    with evaluating(model):
        for batch in batches:
            output, labels_BSH = _forward(model, batch, autocast)
            has_target |= bool((labels_BSH != IGNORE_INDEX).any())
            for each in sums:
                each.add(output.hidden_BSHD, labels_BSH)
    if not has_target:
        raise no_targets_error()


class _LossSums:
    """Sums of the cross entropy over all targets of every head."""

    def __init__(self, model: MTPModel) -> None:
        self._model = model
        self._ce_sum_H = torch.zeros(model.horizon, dtype=torch.float64)
        self._count_H = torch.zeros(model.horizon, dtype=torch.int64)
        self._loss_sum, self._num_positions = 0.0, 0

    def add(self, hidden_BSHD: Tensor, labels_BSH: Tensor) -> None:
        """Take in one batch."""
        model = self._model
        ce_BSH = torch.stack(
            [
                token_cross_entropy(
                    hidden_BSHD[:, :, head],
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
        self._ce_sum_H += ce_BSH.sum(dim=(0, 1)).cpu()
        self._count_H += is_target_BSH.sum(dim=(0, 1)).cpu()
        self._loss_sum += float((ce_BSH.sum(dim=2) / num_heads_BS.clamp(min=1)).sum())
        self._num_positions += int((num_heads_BS > 0).sum())

    def metrics(self) -> dict[str, float]:
        """Means over everything taken in."""
        metrics = {"val/loss": self._loss_sum / self._num_positions}
        sums = zip(self._ce_sum_H.tolist(), self._count_H.tolist(), strict=True)
        for head, (ce_sum, count) in enumerate(sums):
            if count:
                metrics[f"val/ce_head_{head}"] = ce_sum / count
                metrics[f"perplexity_head_{head}"] = _exponential(ce_sum / count)
        return metrics


class _MatchCounts:
    """How often the most likely tokens of heads are their targets, and those of head 0 further on."""

    def __init__(self, model: MTPModel) -> None:
        self._model = model
        self._can_draft = tuple(model.offsets) == tuple(range(1, model.horizon + 1))
        counts_H = torch.zeros(4, model.horizon, dtype=torch.int64)
        self._correct_H, self._count_H, self._agreed_H, self._drafted_H = counts_H

    def add(self, hidden_BSHD: Tensor, labels_BSH: Tensor) -> None:
        """Take in one batch."""
        likeliest_BSH = torch.stack(
            [
                _likeliest(self._model, hidden_BSHD[:, :, head], labels_BSH[:, :, head] != IGNORE_INDEX)
                for head in range(self._model.horizon)
            ],
            dim=2,
        )
        is_target_BSH = labels_BSH != IGNORE_INDEX
        self._correct_H += ((likeliest_BSH == labels_BSH) & is_target_BSH).sum(dim=(0, 1)).cpu()
        self._count_H += is_target_BSH.sum(dim=(0, 1)).cpu()
        if not self._can_draft:
            return
        is_agreed_BS = is_drafted_BS = is_target_BSH[:, :, 0]
        for head in range(1, self._model.horizon):
            # Where head h has a target at t, so has head 0 at t+h: the same token. What comes round from the
            # start of the row stands where there is no target.
            written_BS = likeliest_BSH[:, :, 0].roll(-head, dims=1)
            is_drafted_BS = is_drafted_BS & is_target_BSH[:, :, head]
            is_agreed_BS = is_agreed_BS & is_drafted_BS & (likeliest_BSH[:, :, head] == written_BS)
            self._agreed_H[head] += int(is_agreed_BS.sum())
            self._drafted_H[head] += int(is_drafted_BS.sum())

    def metrics(self) -> dict[str, float]:
        """Shares of everything taken in."""
        shares = {
            f"token_accuracy_head_{head}": correct / count
            for head, (correct, count) in enumerate(
                zip(self._correct_H.tolist(), self._count_H.tolist(), strict=True)
            )
            if count
        }
        acceptance = {
            f"acceptance_proxy_head_{head}": agreed / drafted
            for head, (agreed, drafted) in enumerate(
                zip(self._agreed_H.tolist(), self._drafted_H.tolist(), strict=True)
            )
            if drafted
        }
        total = {"acceptance_proxy_tokens_per_forward": 1 + sum(acceptance.values())} if acceptance else {}
        return shares | acceptance | total


@evaluator_registry.register("perplexity", version="1.0.0")
class PerplexityEvaluator(Component[EvaluatorContext, EvaluationResult]):
    """Cross entropy and perplexity of every head, as exact token means."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings

    def run(self, context: EvaluatorContext) -> EvaluationResult:
        """Measure on `context.batches`; see `measure_losses`."""
        metrics = measure_losses(context.model, context.batches, autocast=context.autocast)
        return EvaluationResult(type="perplexity", metrics=metrics)


@evaluator_registry.register("token-accuracy", version="1.1.0")
class TokenAccuracyEvaluator(Component[EvaluatorContext, EvaluationResult]):
    """Top-1 accuracy of every head on its targets, and how often its drafts would be accepted."""

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


def _likeliest(model: MTPModel, hidden_BSD: Tensor, is_wanted_BS: Tensor) -> Tensor:
    """The most likely token at every wanted position, -1 elsewhere."""
    num_rows = max(1, _CHUNK_ELEMENTS // model.unembedding_VD.shape[0])
    hidden_ND = hidden_BSD[is_wanted_BS].to(model.unembedding_VD.dtype)
    chunks = [model.unembed(hidden_CD).argmax(dim=-1) for hidden_CD in torch.split(hidden_ND, num_rows)]
    likeliest_BS = torch.full(is_wanted_BS.shape, -1, dtype=torch.int64, device=hidden_BSD.device)
    likeliest_BS[is_wanted_BS] = torch.cat(chunks)
    return likeliest_BS


def _exponential(mean: float) -> float:
    # A diverged model's mean may be beyond what a float's exponential can hold.
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
