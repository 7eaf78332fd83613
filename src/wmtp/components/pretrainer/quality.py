"""How good a value head is, on programs it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from wmtp.components.data import evaluation_batches, to_device
from wmtp.components.data.batching import Collator
from wmtp.components.data.examples import Batch, Feature, model_inputs
from wmtp.modeling import MTPModel, MTPOutput, ValueHead, evaluating
from wmtp.objectives import explained_variance, roc_auc


@dataclass(frozen=True, slots=True)
class RewardedPrograms:
    """Tokenised programs with their rewards.

    Attributes:
        features: each with a `reward`.
        is_right: whether the program is right, for AUC.
    """

    features: list[Feature]
    is_right: list[bool]


@dataclass(frozen=True, slots=True)
class CriticQuality:
    """Measured on held-out programs.

    Attributes:
        auc: chance that a right program's value, after its last token, is above a wrong one's; 0.5 is blind.
        explained_variance: 1 - var(reward - V) / var(reward), over all tokens; 0 or less is blind.
        value_mean: mean of V over all tokens.
        num_right: right programs among the held-out ones.
        num_wrong: wrong programs among them.
    """

    auc: float
    explained_variance: float
    value_mean: float
    num_right: int
    num_wrong: int

    @property
    def strength(self) -> float:
        """max(0, 2 * AUC - 1), the factor on `loss.lambda` when calibrated; 0 where AUC is unknown."""
        return max(0.0, 2.0 * self.auc - 1.0) if self.auc == self.auc else 0.0


def measure_critic(
    model: MTPModel,
    value_head: ValueHead,
    programs: RewardedPrograms,
    *,
    collator: Collator,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> CriticQuality:
    """Measure a value head on held-out programs with the model as it is now."""
    last, values, returns = [], [], []
    with evaluating(model), evaluating(value_head):
        for batch in evaluation_batches(programs.features, collator, batch_size):
            with autocast():
                output = forward_trunk_and_head(model, batch, device)
                values_BS = value_head(output).cpu()
            for row, mask in enumerate(batch["reward_mask"]):
                document = values_BS[row][mask]
                last.append(document[-1])
                values.append(document)
                returns.append(torch.full_like(document, float(batch["token_rewards"][row].sum())))
    is_right = torch.tensor(programs.is_right)
    all_values, all_returns = torch.cat(values), torch.cat(returns)
    known = torch.ones_like(all_values, dtype=torch.bool)
    return CriticQuality(
        auc=float(roc_auc(torch.stack(last), is_right)),
        explained_variance=float(explained_variance(all_values, all_returns, known)),
        value_mean=float(all_values.mean()),
        num_right=int(is_right.sum()),
        num_wrong=int((~is_right).sum()),
    )


def forward_trunk_and_head(model: MTPModel, batch: Batch, device: torch.device) -> MTPOutput:
    """Forward of the trunk and head 0 on a collated batch."""
    output: MTPOutput = model(**model_inputs(to_device(batch, device)), num_heads=1)
    return output
