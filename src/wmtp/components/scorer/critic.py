"""`critic-delta-v1`: what a value function says of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.components.registry import scorer_registry
from wmtp.components.scorer.base import Scorer, ScorerContext, ScorerSetup, TokenScores
from wmtp.exceptions import UserInputError
from wmtp.modeling import ValueHead
from wmtp.objectives import value_deltas
from wmtp.settings import Recipe


@scorer_registry.register("critic-delta-v1", version="1.0.0", description="value, or change of value")
class CriticScorer(Scorer):
    """Scores a token by the value after it, or by the change of value it made (`critic.score`).

    `strength` is max(0, 2 * AUC - 1) on held-out programs where `critic.strength` is `calibrated`; whoever
    measures the AUC sets it.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.settings = recipe.critic
        self._value_head: ValueHead | None = None

    def prepare(self, setup: ScorerSetup) -> None:
        """Take the value head.

        Raises:
            UserInputError: there is none.
        """
        if not isinstance(setup.value_head, ValueHead):
            raise UserInputError(
                "critic-wmtp needs a value head", remedy="run stage 1, or set critic.value_head"
            )
        self._value_head = setup.value_head

    def run(self, context: ScorerContext) -> TokenScores:
        """Value, or change of value, of each token."""
        assert self._value_head is not None
        assert context.output is not None
        values_BS = self._value_head(context.output)
        if self.settings.score == "delta":
            values_BS = value_deltas(values_BS, document_ids_BS=context.batch["document_ids"])
        return TokenScores(values_BS)

    def describe(self, scores_N: Tensor, valid_N: Tensor, weights_N: Tensor) -> dict[str, Tensor]:
        """Mean score."""
        mean = torch.where(valid_N, scores_N, 0.0).sum() / valid_N.sum().clamp(min=1)
        name = "critic/value_mean" if self.settings.score == "value" else "critic/delta_mean"
        return {name: mean}
