"""`baseline-mtp`: every token counts the same."""

from __future__ import annotations

from collections.abc import Sequence

from wmtp.components.data.examples import Batch
from wmtp.components.registry import trainer_registry
from wmtp.components.trainer.base import BaseWmtpTrainer
from wmtp.components.trainer.weighting import StepWeights
from wmtp.modeling import MTPOutput


@trainer_registry.register("baseline-mtp", version="1.0.0", description="uniform weights")
class BaselineMtpTrainer(BaseWmtpTrainer):
    """Multi-token prediction with uniform weights (Gloeckle et al., 2024, arXiv:2404.19737)."""

    uses_scorer = False

    def compute_head_weights(
        self, batches: Sequence[Batch], outputs: Sequence[MTPOutput] = ()
    ) -> StepWeights | None:
        """Uniform weights: none are made."""
        return None
