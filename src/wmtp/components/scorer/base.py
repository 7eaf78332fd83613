"""What a scorer is given, what it returns, and how its scores become weights.

A scorer says how much each token of the text matters. It does not know about heads, horizons or accumulation:
the weighting (`wmtp.components.trainer.weighting`) collects the scores of a whole optimizer step, asks the
scorer to turn them into weights, and spreads these over the heads.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from wmtp.components.base import Component
from wmtp.components.data.examples import Batch
from wmtp.components.tokenizer.pairs import TokenizerPair
from wmtp.modeling import MTPModel, MTPOutput
from wmtp.objectives import normalize_weights
from wmtp.settings.recipe_train import LossSettings

ScoreKind = Literal["scores", "weights", "head_factors"]


@dataclass(frozen=True, slots=True)
class ScorerSetup:
    """The models a scorer may need.

    Attributes:
        model: the model being trained.
        reference: a frozen model whose losses serve as reference (Rho-1).
        tokenizers: the model's tokenizer and the reference's; None where they are the same.
        value_head: the value function (critic).
        seed: seed of scorers that draw at random.
    """

    model: MTPModel
    reference: MTPModel | None = None
    tokenizers: TokenizerPair | None = None
    value_head: nn.Module | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ScorerContext:
    """One micro-batch to score.

    Attributes:
        batch: what the collator made of the examples.
        output: the trained model's forward on it, detached; None for a scorer that does not ask for one.
        needed_BS: bool, the tokens whose score the step will use; others may be left at 0.
    """

    batch: Batch
    output: MTPOutput | None
    needed_BS: Tensor


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of one micro-batch.

    Attributes:
        values: fp32, [B,S] indexed by token (entry t is about token t), or [H] for `head_factors`.
        kind: `scores` go through the whole pipeline; `weights` are rescaled to mean 1, without softmax and
        clip;
            `head_factors` multiply the heads' weights last, outside mean and clip.
    """

    values: Tensor
    kind: ScoreKind = "scores"


class Scorer(Component[ScorerContext, TokenScores]):
    """A way to tell how much each token matters.

    Attributes:
        needs_output: whether `run` reads the trained model's forward; where it does and a step has several
            micro-batches, the step runs a scoring pass without gradients first.
        strength: factor in [0, 1] on `loss.lambda`; 1 unless the scorer knows that it knows little.
    """

    needs_output: bool = True
    strength: float = 1.0

    def prepare(self, setup: ScorerSetup) -> None:
        """Take hold of the models the scorer needs; called once, before the first step."""

    @abstractmethod
    def run(self, context: ScorerContext) -> TokenScores:
        """Score the tokens of one micro-batch, without gradient."""

    def weigh(self, scores_N: Tensor, valid_N: Tensor, loss: LossSettings) -> Tensor:
        """Turn the scores of a whole step into weights of mean 1 over the valid tokens."""
        return normalize_weights(
            scores_N, valid_N, temperature=loss.temperature, epsilon=loss.epsilon, w_max=loss.w_max
        )

    def describe(self, scores_N: Tensor, valid_N: Tensor, weights_N: Tensor) -> dict[str, Tensor]:
        """Metrics of a step, by the names they are logged under."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON state that a resumed run needs."""
        return {"strength": self.strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.strength = float(state["strength"])
