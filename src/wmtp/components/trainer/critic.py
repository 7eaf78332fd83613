"""`critic-wmtp`: tokens weigh by what a value function says of them; the value function learns along."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wmtp.components.data.examples import Batch
from wmtp.components.pretrainer.value_loss import value_errors
from wmtp.components.registry import trainer_registry
from wmtp.components.trainer.base import BaseWmtpTrainer, TrainerContext
from wmtp.modeling import MTPOutput, ValueHead


@trainer_registry.register("critic-wmtp", version="1.0.0", description="weights from a value function")
class CriticWmtpTrainer(BaseWmtpTrainer):
    """Weights from a value head, with an auxiliary value loss that keeps it honest as the trunk moves."""

    def has_auxiliary_loss(self, context: TrainerContext) -> bool:
        """The value loss is on unless its factor is 0."""
        return self.recipe.critic.value_loss_coef > 0

    def compute_auxiliary_loss(
        self, batch: Batch, output: MTPOutput, batches: Sequence[Batch]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of V against its lambda-return, over all tokens of documents with a known
        reward.

        The mean is over such tokens of the whole step; a step without any adds nothing.
        """
        if "reward_mask" not in batch:
            return torch.zeros((), device=output.trunk_BSD.device), {}
        critic = self.recipe.critic
        value_head = self.training_run.context.modules["value_head"]
        assert isinstance(value_head, ValueHead)
        values_BS = value_head(output, into_trunk=critic.value_loss_into_trunk)
        count = torch.stack([b["reward_mask"].sum() for b in batches if "reward_mask" in b]).sum()
        error_BS = value_errors(batch, values_BS, gamma=critic.gamma, lam=critic.lambda_)
        loss = error_BS.square().sum() / count
        return critic.value_loss_coef * loss, {"critic/value_loss": loss.detach()}
