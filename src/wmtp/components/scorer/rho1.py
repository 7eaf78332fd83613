"""`rho1-excess-v1`: how far the model is behind a reference model on each token.

Lin et al., 2024, "Rho-1: Not All Tokens Are What You Need", arXiv:2404.07965, equations 3 to 5, for all
heads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from wmtp.components.registry import scorer_registry
from wmtp.components.scorer.base import Scorer, ScorerContext, ScorerSetup, TokenScores
from wmtp.components.scorer.losses import token_losses
from wmtp.components.scorer.reference import aligned_losses, head_losses
from wmtp.components.tokenizer.pairs import TokenizerPair
from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel
from wmtp.objectives import (
    excess_loss,
    random_skip_weights,
    shuffle_weights,
    tokenskip_weights,
    weighted_excess_weights,
)
from wmtp.settings import Recipe
from wmtp.settings.recipe_train import LossSettings


@scorer_registry.register("rho1-excess-v1", version="1.0.0", description="excess loss over a reference model")
class Rho1ExcessScorer(Scorer):
    """Scores `CE_current - CE_reference` per token and selects by it, as the `rho1` section says."""

    def __init__(self, recipe: Recipe) -> None:
        self.settings = recipe.rho1
        self.needs_output = self.settings.current == "live"
        self._model: MTPModel | None = None
        self._reference: MTPModel | None = None
        self._tokenizers: TokenizerPair | None = None
        self._snapshot: MTPModel | None = None
        self._generator = torch.Generator()

    def prepare(self, setup: ScorerSetup) -> None:
        """Take the reference, and a snapshot of the model where `rho1.current` is `frozen`.

        Raises:
            UserInputError: there is no reference model.
        """
        if setup.reference is None:
            raise UserInputError(
                "rho1-wmtp needs a reference model", remedy="set model.ref_id or paths.models.ref"
            )
        self._model, self._reference = setup.model, setup.reference
        self._tokenizers = setup.tokenizers
        self._generator.manual_seed(setup.seed)
        if self.settings.current == "frozen":
            self._snapshot = copy.deepcopy(setup.model).requires_grad_(False).eval()

    def run(self, context: ScorerContext) -> TokenScores:
        """Excess loss of each needed token."""
        assert self._model is not None
        assert self._reference is not None
        batch, needed_BS = context.batch, context.needed_BS
        if context.output is None:
            assert self._snapshot is not None
            current_BS = head_losses(self._snapshot, batch, needed_BS)
        else:
            current_BS = token_losses(self._model, context.output.hidden_BSHD[:, :, 0], batch, needed_BS)
        if self._tokenizers is None or self._tokenizers.relation != "characters":
            reference_BS = head_losses(self._reference, batch, needed_BS)
            return TokenScores(excess_loss(current_BS, reference_BS, score=self.settings.score))
        reference_BS, known_BS = aligned_losses(self._reference, self._tokenizers, context)
        excess_BS = excess_loss(current_BS, reference_BS, score=self.settings.score)
        # The model is neither ahead of nor behind a reference that says nothing.
        return TokenScores(torch.where(known_BS & needed_BS, excess_BS, 0.0))

    def weigh(self, scores_N: Tensor, valid_N: Tensor, loss: LossSettings) -> Tensor:
        """Select over the whole step and weigh what was selected."""
        settings = self.settings
        if settings.mode == "tokenskip":
            return tokenskip_weights(scores_N, valid_N, ratio=settings.ratio)
        if settings.mode == "random":
            return random_skip_weights(valid_N, ratio=settings.ratio, generator=self._generator)
        weights_N = weighted_excess_weights(
            scores_N,
            valid_N,
            percentile_top_p=settings.percentile_top_p,
            alpha=settings.alpha,
            temperature=loss.temperature,
            epsilon=loss.epsilon,
            w_max=loss.w_max,
        )
        if settings.mode == "shuffled":
            return shuffle_weights(weights_N, valid_N, generator=self._generator)
        return weights_N

    def describe(self, scores_N: Tensor, valid_N: Tensor, weights_N: Tensor) -> dict[str, Tensor]:
        """Mean excess, and the share of tokens that weigh more than the average."""
        count = valid_N.sum().clamp(min=1)
        return {
            "rho1/excess_mean": torch.where(valid_N, scores_N, 0.0).sum() / count,
            "rho1/selected_ratio": ((weights_N > 1.0) & valid_N).sum() / count,
        }

    def state_dict(self) -> dict[str, Any]:
        """The strength, and where the random draws of modes `random` and `shuffled` stand."""
        return {**super().state_dict(), "generator": self._generator.get_state().tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self._generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
