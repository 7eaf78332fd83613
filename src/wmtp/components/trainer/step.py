"""One optimizer step's forward and backward over its micro-batches.

Everything is normalised by counts of the whole step, known before the first backward, so that the split into
micro-batches changes nothing but memory. Legend: B batch, S sequence, H horizon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wmtp.components.data.examples import Batch, model_inputs
from wmtp.components.trainer.evidence import MicroBatchEvidence, all_finite, captured_embeddings
from wmtp.components.trainer.weighting import StepWeights
from wmtp.modeling import MTPModel, MTPOutput
from wmtp.objectives import MtpLoss, loss_normalizer, weighted_mtp_cross_entropy
from wmtp.settings.recipe_train import LossSettings

# (micro-batch, its forward, all micro-batches of the step) -> a loss to add, normalised over the step, and
# metrics that sum over micro-batches.
AuxiliaryLoss = Callable[[Batch, MTPOutput, Sequence[Batch]], tuple[Tensor, dict[str, Tensor]]]


@dataclass(slots=True)
class StepResult:
    """What one step measured; tensors stay on the device until they are logged.

    Attributes:
        loss: the step's loss, the number that was minimised, without auxiliary losses.
        ce_sum_H: sum of each head's cross entropies (nats) over its targets.
        num_targets_H: number of targets of each head.
        num_tokens: real tokens of the step, padding excluded.
        num_padded_tokens: tokens of the step, padding included.
        metrics: further scalars by metric name.
        evidence: what was finite, by micro-batch; holds the batches, so let go of it soon.
    """

    loss: Tensor
    ce_sum_H: Tensor
    num_targets_H: Tensor
    num_tokens: Tensor
    num_padded_tokens: int
    metrics: dict[str, Tensor] = field(default_factory=dict)
    evidence: list[MicroBatchEvidence] = field(default_factory=list)


# (micro-batches, their forwards where they exist already) -> weights of the step, None for uniform.
HeadWeights = Callable[[Sequence[Batch], Sequence[MTPOutput]], StepWeights | None]


class TrainStep:
    """Forward and backward of one step; leaves the gradients on the parameters."""

    def __init__(
        self,
        model: MTPModel,
        loss: LossSettings,
        *,
        compute_head_weights: HeadWeights,
        auxiliary_loss: AuxiliaryLoss | None,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.model = model
        self.loss = loss
        self.compute_head_weights = compute_head_weights
        self.auxiliary_loss = auxiliary_loss
        self.autocast = autocast

    def __call__(self, batches: Sequence[Batch]) -> StepResult:
        """Accumulate the gradients of a step.

        Args:
            batches: the micro-batches of the step, on the model's device.
        """
        normalizer = torch.stack([loss_normalizer(b["labels"], self.loss.reduction) for b in batches]).sum(0)
        with captured_embeddings(self.model) as embedded:
            # With one micro-batch the graph of its forward serves for scoring and for the loss. With several,
            # keeping all graphs would cost the memory that accumulation is meant to save: each is scored in a
            # pass of its own first.
            outputs = [self.forward(batches[0])] if len(batches) == 1 else []
            weights = self.compute_head_weights(batches, outputs)
            result = self._empty_result(batches)
            for index, batch in enumerate(batches):
                output = outputs.pop() if outputs else self.forward(batch)
                self._backward(index, output, weights, normalizer, batches, result, embedded)
        if weights is not None:
            result.metrics.update(weights.metrics)
        return result

    def forward(self, batch: Batch, *, num_heads: int | None = None) -> MTPOutput:
        """The model's forward on a micro-batch, in the run's precision."""
        with self.autocast():
            output: MTPOutput = self.model(**model_inputs(batch), num_heads=num_heads)
        return output

    def _backward(
        self,
        index: int,
        output: MTPOutput,
        weights: StepWeights | None,
        normalizer: Tensor,
        batches: Sequence[Batch],
        result: StepResult,
        embedded: list[Tensor],
    ) -> None:
        batch = batches[index]
        weight_BSH = None if weights is None else weights.weight_BSH[index]
        auxiliary: Tensor | None = None
        # The losses run in the precision of the forward: the products with the unembedding are a good
        # part of a step. Softmax, cross entropy and values are fp32 in any case.
        with self.autocast():
            mtp = self.loss_of(batch, output, weight_BSH, normalizer)
            total = self.loss.scale * mtp.loss
            if self.auxiliary_loss is not None:
                auxiliary, metrics = self.auxiliary_loss(batch, output, batches)
                total = total + auxiliary
                for name, value in metrics.items():
                    result.metrics[name] = result.metrics.get(name, 0.0) + value
        evidence = MicroBatchEvidence(
            batch,
            loss=mtp.loss.detach(),
            ce_BH=all_finite(mtp.ce_BSH, (1,)),
            weight_BH=None if weight_BSH is None else all_finite(weight_BSH, (1,)),
            score_B=None if weights is None else weights.finite_scores(index),
            auxiliary=None if auxiliary is None else auxiliary.detach().isfinite(),
        )
        evidence.watch(output.hidden_BSHD, embedded)
        embedded.clear()
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        result.evidence.append(evidence)
        result.loss = result.loss + self.loss.scale * mtp.loss.detach()
        result.ce_sum_H += mtp.ce_BSH.sum(dim=(0, 1))
        result.num_targets_H += (batch["labels"] != -100).sum(dim=(0, 1))

    def loss_of(
        self, batch: Batch, output: MTPOutput, weight_BSH: Tensor | None, normalizer: Tensor
    ) -> MtpLoss:
        """The fused weighted loss of a micro-batch; never builds [B,S,H,V]."""
        model = self.model
        return weighted_mtp_cross_entropy(
            output.hidden_BSHD,
            model.unembedding_VD,
            batch["labels"],
            weight_BSH,
            reduction=self.loss.reduction,
            normalizer=normalizer,
            logit_scale=model.logit_scale,
            logit_softcap=model.logit_softcap,
            bias_V=model.unembedding_bias_V,
        )

    def _empty_result(self, batches: Sequence[Batch]) -> StepResult:
        labels = batches[0]["labels"]
        zeros_H = torch.zeros(labels.shape[-1], device=labels.device)
        return StepResult(
            loss=torch.zeros((), device=labels.device),
            ce_sum_H=zeros_H,
            num_targets_H=torch.zeros_like(zeros_H),
            num_tokens=torch.stack([batch["attention_mask"].sum() for batch in batches]).sum(),
            num_padded_tokens=sum(batch["input_ids"].numel() for batch in batches),
        )
