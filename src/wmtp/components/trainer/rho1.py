"""`rho1-wmtp`: tokens weigh by how far the model is behind a reference model on them."""

from __future__ import annotations

from wmtp.components.registry import trainer_registry
from wmtp.components.trainer.base import BaseWmtpTrainer


@trainer_registry.register("rho1-wmtp", version="1.0.0", description="weights from excess loss (Rho-1)")
class Rho1WmtpTrainer(BaseWmtpTrainer):
    """Weights from the loss in excess of a reference's (Lin et al., 2024, arXiv:2404.07965)."""
