"""From the scores of a step's micro-batches to the weight of every head at every position.

Legend: B batch, S sequence, H horizon, N all tokens of a step, flattened and joined over micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from wmtp.components.data.examples import Batch
from wmtp.components.scorer.base import Scorer, TokenScores
from wmtp.components.trainer.evidence import all_finite
from wmtp.exceptions import UserInputError
from wmtp.objectives import (
    IGNORE_INDEX,
    ScoreStatistics,
    blend_strength,
    index_by_token,
    normalize_document_weights,
    normalize_head_weights,
    normalize_with_statistics,
    position_scores,
    rescale_to_mean_one,
    score_statistics,
    spread_weights,
    valid_tokens,
    weight_statistics,
)
from wmtp.settings.recipe_train import LossSettings


@dataclass(frozen=True, slots=True)
class StepWeights:
    """Weights of one optimizer step.

    Attributes:
        weight_BSH: fp32, one tensor a micro-batch.
        token_weight_BS: what head 0 weighs each token with, indexed by token; for reports.
        metrics: scalar tensors by metric name.
        score_is_finite_B: bool, one tensor a micro-batch: whether all needed scores of a row are finite;
            empty where nothing was scored row by row.
    """

    weight_BSH: list[Tensor]
    token_weight_BS: list[Tensor]
    metrics: dict[str, Tensor]
    score_is_finite_B: list[Tensor] = field(default_factory=list)

    def finite_scores(self, micro_batch: int) -> Tensor | None:
        """Rows of a micro-batch whose scores are finite; None where nothing was scored row by row."""
        return self.score_is_finite_B[micro_batch] if self.score_is_finite_B else None


class _Limits(TypedDict):
    temperature: float
    epsilon: float
    w_max: float


class StepWeighting:
    """The normalisation pipeline over a whole step, as the `loss` section of the recipe asks for it.

    Args:
        loss: the recipe's section.
        scorer: says how much each token matters.
        offsets: how far ahead each head predicts, in tokens.
    """

    def __init__(self, loss: LossSettings, scorer: Scorer, offsets: Sequence[int]) -> None:
        self.loss = loss
        self.scorer = scorer
        self.offsets = tuple(offsets)
        self._limits: _Limits = {
            "temperature": loss.temperature,
            "epsilon": loss.epsilon,
            "w_max": loss.w_max,
        }
        self._running: ScoreStatistics | None = None
        self._proposed: ScoreStatistics | None = None

    @property
    def strength(self) -> float:
        """`loss.lambda`, lessened by what the scorer knows of its own quality."""
        return self.loss.lambda_ * self.scorer.strength

    def needed_tokens(self, batch: Batch) -> Tensor:
        """Tokens of a micro-batch whose score the step will use, bool [B,S]."""
        if self.loss.weight_scope == "target":
            return valid_tokens(batch["labels"])
        if self.loss.weight_scope == "position":
            return index_by_token(_has_target(batch).any(dim=-1))
        is_real_BS: Tensor = batch["document_ids"] >= 0
        return is_real_BS

    def step_weights(self, batches: Sequence[Batch], scores: Sequence[TokenScores]) -> StepWeights:
        """Weights of all micro-batches of a step, from their scores."""
        weights = self._step_weights(batches, scores)
        if scores[0].kind == "head_factors":
            return weights
        finite_B = [
            _finite_rows(score.values, self.needed_tokens(batch))
            for batch, score in zip(batches, scores, strict=True)
        ]
        return replace(weights, score_is_finite_B=finite_B)

    def settle(self, is_finite: Tensor) -> None:
        """Take the last step's scores into the running statistics, unless its update was suppressed."""
        proposed, self._proposed = self._proposed, None
        if proposed is None:
            return
        if self._running is None:
            # Once a run: whether there are statistics at all decides what the next step computes.
            self._running = proposed if bool(is_finite) else None
        else:
            pairs = zip(proposed, self._running, strict=True)
            self._running = ScoreStatistics(*(torch.where(is_finite, new, old) for new, old in pairs))

    def _step_weights(self, batches: Sequence[Batch], scores: Sequence[TokenScores]) -> StepWeights:
        if scores[0].kind == "head_factors":
            return self._from_head_factors(batches, scores)
        if self.loss.weight_scope == "head":
            return self._from_head_scores(batches, scores)
        if self.loss.weight_scope == "position":
            values = [position_scores(score.values) for score in scores]
            valid = [_has_target(batch).any(dim=-1) for batch in batches]
        else:
            values = [score.values for score in scores]
            valid = [valid_tokens(batch["labels"]) for batch in batches]
        normalized = self._normalize(values, valid, batches, scores[0].kind)
        weights = [self._blend(w, mask) for w, mask in zip(normalized, valid, strict=True)]
        flat_weights, flat_valid = _flatten(weights), _flatten(valid)
        spread = [
            spread_weights(weight_BS, len(self.offsets), scope=self.loss.weight_scope, offsets=self.offsets)
            for weight_BS in weights
        ]
        metrics = _weight_metrics(flat_weights, flat_valid)
        metrics.update(self.scorer.describe(_flatten(values), flat_valid, flat_weights))
        is_position = self.loss.weight_scope == "position"
        return StepWeights(spread, [index_by_token(w) for w in weights] if is_position else weights, metrics)

    def _blend(self, weights: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid, blend_strength(weights, self.strength), 0.0)

    def _normalize(
        self, values: list[Tensor], valid: list[Tensor], batches: Sequence[Batch], kind: str
    ) -> list[Tensor]:
        flat_values, flat_valid = _flatten(values), _flatten(valid)
        if kind == "weights":
            return _split_like(rescale_to_mean_one(flat_values, flat_valid), values)
        if self.loss.normalize_over == "sequence":
            return [
                normalize_document_weights(value, mask, batch["document_ids"], **self._limits)
                for value, mask, batch in zip(values, valid, batches, strict=True)
            ]
        if self.loss.normalize_over == "running":
            return _split_like(self._normalize_running(flat_values, flat_valid), values)
        return _split_like(self.scorer.weigh(flat_values, flat_valid, self.loss), values)

    def _normalize_running(self, values_N: Tensor, valid_N: Tensor) -> Tensor:
        """Weights from the statistics of earlier steps only; the first step uses its own."""
        previous = self._running
        self._proposed = score_statistics(values_N, valid_N, previous=previous, **self._limits)
        if previous is None:
            return self.scorer.weigh(values_N, valid_N, self.loss)
        return normalize_with_statistics(values_N, valid_N, previous, **self._limits)

    def _from_head_scores(self, batches: Sequence[Batch], scores: Sequence[TokenScores]) -> StepWeights:
        """Scope `head`: the heads of a position share a weight of |K(t)| between them."""
        weights, valid = [], []
        for batch, score in zip(batches, scores, strict=True):
            mask_BSH = _has_target(batch)
            values_BSH = score.values
            if values_BSH.ndim == 2:
                values_BSH = spread_weights(values_BSH, len(self.offsets), offsets=self.offsets)
            if score.kind == "weights":
                raise UserInputError(
                    "loss.weight_scope 'head' needs scores, and this scorer gives finished weights",
                    remedy="use loss.weight_scope: target",
                )
            weights.append(
                self._blend(normalize_head_weights(values_BSH, mask_BSH, **self._limits), mask_BSH)
            )
            valid.append(mask_BSH)
        token_weights = [index_by_token(weight_BSH[..., 0]) for weight_BSH in weights]
        return StepWeights(weights, token_weights, _weight_metrics(_flatten(weights), _flatten(valid)))

    def _from_head_factors(self, batches: Sequence[Batch], scores: Sequence[TokenScores]) -> StepWeights:
        """One factor a head for all positions; neither mean nor clip apply."""
        weights, valid = [], []
        for batch, score in zip(batches, scores, strict=True):
            mask_BSH = _has_target(batch)
            weights.append(self._blend(score.values.expand(mask_BSH.shape), mask_BSH))
            valid.append(mask_BSH)
        token_weights = [index_by_token(weight_BSH[..., 0]) for weight_BSH in weights]
        return StepWeights(weights, token_weights, _weight_metrics(_flatten(weights), _flatten(valid)))

    def state_dict(self) -> dict[str, Any]:
        """JSON state: the scorer's, and the running statistics."""
        running = None if self._running is None else [float(value) for value in self._running]
        return {"scorer": self.scorer.state_dict(), "running": running}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take back what `state_dict` gave."""
        self.scorer.load_state_dict(state["scorer"])
        if state["running"] is not None:
            self._running = ScoreStatistics(
                *(torch.tensor(value, dtype=torch.float64, device=device) for value in state["running"])
            )


def _finite_rows(values: Tensor, needed_BS: Tensor) -> Tensor:
    """Whether the needed scores [B,S] or [B,S,H] of each row are all finite, bool [B]."""
    needed = needed_BS if values.ndim == 2 else needed_BS.unsqueeze(-1)
    return all_finite(torch.where(needed, values, 0.0), tuple(range(1, values.ndim)))


def _has_target(batch: Batch) -> Tensor:
    """Pairs of position and head that have a target, bool [B,S,H]."""
    has_target_BSH: Tensor = batch["labels"] != IGNORE_INDEX
    return has_target_BSH


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split_like(flat_N: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat_N, [tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def _weight_metrics(weights: Tensor, valid: Tensor) -> dict[str, Tensor]:
    return {f"train/weight_{name}": value for name, value in weight_statistics(weights, valid).items()}
