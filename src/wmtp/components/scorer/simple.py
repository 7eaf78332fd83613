"""Scorers that need no further model: `dft`, `column` and `head_decay`."""

from __future__ import annotations

import torch
from torch import Tensor

from wmtp.components.registry import scorer_registry
from wmtp.components.scorer.base import Scorer, ScorerContext, ScorerSetup, TokenScores
from wmtp.components.scorer.losses import token_losses
from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel
from wmtp.settings import Recipe

# The factor of head h is HEAD_DECAY ** h.
HEAD_DECAY = 0.6


@scorer_registry.register("dft", version="1.0.0", description="probability of the target token")
class DftScorer(Scorer):
    """Weights each token by the model's own probability of it (Wu et al., 2025, DFT, arXiv:2508.05629)."""

    def __init__(self, recipe: Recipe) -> None:
        self._model: MTPModel | None = None

    def prepare(self, setup: ScorerSetup) -> None:
        """Take the model, for its unembedding."""
        self._model = setup.model

    def run(self, context: ScorerContext) -> TokenScores:
        """exp(-CE) of each needed token, as weights."""
        assert self._model is not None
        assert context.output is not None
        ce_BS = token_losses(
            self._model, context.output.hidden_BSHD[:, :, 0], context.batch, context.needed_BS
        )
        return TokenScores(torch.exp(-ce_BS), kind="weights")


@scorer_registry.register("column", version="1.0.0", description="weights given in the data")
class ColumnScorer(Scorer):
    """Uses the weights of the data's `weight` or `weights` column."""

    needs_output = False

    def __init__(self, recipe: Recipe) -> None:
        pass

    def run(self, context: ScorerContext) -> TokenScores:
        """The column's weights.

        Raises:
            UserInputError: the data has no such column.
        """
        weights_BS: Tensor | None = context.batch.get("token_weights")
        if weights_BS is None:
            raise UserInputError(
                "train.scorer is 'column', but the data has no weights",
                remedy="give rows a 'weight' or 'weights' field, or choose another scorer",
            )
        return TokenScores(weights_BS, kind="weights")


@scorer_registry.register("head_decay", version="1.0.0", description="0.6^h for head h")
class HeadDecayScorer(Scorer):
    """Weighs head h by 0.6^h whatever the token: near tokens matter more than far ones."""

    needs_output = False

    def __init__(self, recipe: Recipe) -> None:
        """Nothing in the recipe changes it."""

    def run(self, context: ScorerContext) -> TokenScores:
        """One factor a head."""
        labels_BSH = context.batch["labels"]
        heads_H = torch.arange(labels_BSH.shape[-1], device=labels_BSH.device)
        return TokenScores(HEAD_DECAY ** heads_H.float(), kind="head_factors")
