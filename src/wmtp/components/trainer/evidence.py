"""Where the numbers of a step were finite: noted on the device, read by the host only when they were not.

Each entry is one small reduction of a tensor that exists anyhow. Legend: B batch, S sequence, H horizon,
D hidden, P parameters with a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wmtp.components.data.examples import Batch
from wmtp.modeling import MTPModel


@dataclass(slots=True)
class MicroBatchEvidence:
    """What was finite in one micro-batch; flags are bool tensors on the device.

    Attributes:
        batch: the micro-batch, for its row ids.
        loss: its share of the step's loss.
        ce_BH: cross entropies of a row under a head.
        weight_BH: weights of a row under a head; None where they are uniform.
        score_B: scores that the weights were made of, by row; None where there are none.
        auxiliary: the auxiliary loss; None where there is none.
        hidden_gradient_BH: gradients at a head's output, by row; empty where nothing before it learns.
        input_gradient_B: gradients at the token embeddings, by row; empty where these are frozen.
    """

    batch: Batch
    loss: Tensor
    ce_BH: Tensor
    weight_BH: Tensor | None = None
    score_B: Tensor | None = None
    auxiliary: Tensor | None = None
    hidden_gradient_BH: list[Tensor] = field(default_factory=list)
    input_gradient_B: list[Tensor] = field(default_factory=list)

    def watch(self, hidden_BSHD: Tensor, embedded: list[Tensor]) -> None:
        """Note gradients of the coming backward at the heads' outputs and at the token embeddings [B,S,D]."""
        if hidden_BSHD.requires_grad:
            _on_gradient(hidden_BSHD, self.hidden_gradient_BH, (1, 3))
        for embedded_BSD in embedded:
            _on_gradient(embedded_BSD, self.input_gradient_B, (1, 2))


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """Norms of a module's gradients.

    Attributes:
        parameters: those that have a gradient, P of them.
        norm_P: norm of each one's gradient; empty without any.
        total: norm over all.
    """

    parameters: list[nn.Parameter]
    norm_P: Tensor
    total: Tensor


@dataclass(frozen=True, slots=True)
class UpdateEvidence:
    """What an update was made of.

    Attributes:
        norms: by module name.
        learning_rates: of the optimizer's parameter groups.
    """

    norms: dict[str, GradientNorms]
    learning_rates: list[float]


def gradient_norms(module: nn.Module, device: torch.device) -> GradientNorms:
    """Norms of the gradients on a module's parameters; the total is that of `clip_grad_norm_`."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    if not parameters:
        return GradientNorms([], torch.zeros(0, device=device), torch.zeros((), device=device))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm_P = torch.stack(torch._foreach_norm(gradients))
    return GradientNorms(parameters, norm_P, torch.linalg.vector_norm(norm_P))


@contextlib.contextmanager
def captured_embeddings(model: MTPModel) -> Iterator[list[Tensor]]:
    """The token embeddings [B,S,D] that forwards with gradients make meanwhile; whoever uses them clears the
    list.
    """
    captured: list[Tensor] = []

    def capture(module: nn.Module, arguments: Any, output: Tensor) -> None:
        if output.requires_grad:
            captured.append(output)

    handle = model.causal_lm.get_input_embeddings().register_forward_hook(capture)
    try:
        yield captured
    finally:
        handle.remove()


class HostCopy:
    """A scalar on its way from the device; reading it waits for the work before the copy, not for later work.

    `Tensor.item` would wait for everything queued by then, which is a whole step more.
    """

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._value = value
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.current_stream(value.device).record_event()

    def read(self) -> float:
        """The number."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


def all_finite(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Whether all values along `dim` are finite; bool."""
    # A sum is NaN or infinite where a value is, and costs one pass; a mask of the size of `values` costs ten
    # times that on a CPU. Finite values whose sum overflows fp32 are called not finite too.
    return values.sum(dim, dtype=torch.float32).isfinite()


def _on_gradient(tensor: Tensor, entries: list[Tensor], dim: tuple[int, ...]) -> None:
    def note(gradient: Tensor) -> None:
        entries.append(all_finite(gradient, dim))

    tensor.register_hook(note)  # type: ignore[no-untyped-call]  # torch leaves it untyped
