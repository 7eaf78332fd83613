"""`mtp-weighted-ce`: weights from whatever scorer the recipe names."""

from __future__ import annotations

from wmtp.components.registry import trainer_registry
from wmtp.components.trainer.base import BaseWmtpTrainer


@trainer_registry.register("mtp-weighted-ce", description="weights from the scorer named in train.scorer")
@trainer_registry.register("mtp-weighted-ce-trainer", description="the same as mtp-weighted-ce")
class MtpWeightedCeTrainer(BaseWmtpTrainer):
    """Weighted multi-token cross entropy with any registered scorer (`train.scorer`)."""
