"""Which parameters of an MTP model learn, from the start or later, and what a checkpoint keeps of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from wmtp.exceptions import UserInputError
from wmtp.modeling.mtp_model import MTPModel

Trainable = Literal["all", "heads_only", "heads_then_all"]


@dataclass(frozen=True, slots=True)
class LateParameters:
    """Parameters that are frozen at first.

    Attributes:
        parameters: all of them.
        first_step: the first update (0-based) they take part in.
    """

    parameters: tuple[nn.Parameter, ...]
    first_step: int

    def set_learning(self, step: int) -> None:
        """Freeze or free them for the update `step`.

        Frozen ones get no gradient, so an optimizer that holds them makes no moments for them and applies no
        weight decay.
        """
        for parameter in self.parameters:
            parameter.requires_grad_(step >= self.first_step)


def choose_trainable(
    model: MTPModel, trainable: Trainable, *, warmup_head_steps: int = 0
) -> LateParameters | None:
    """Set which parameters of a model learn.

    With `all` everything learns; on a model with LoRA adapters these, the last layer and the extra heads.
    `heads_only` leaves the extra heads: head 0, norm, unembedding and embeddings never change. With
    `heads_then_all` everything that `all` means is left free, as the optimizer is built over it, and what is
    returned joins the extra heads after `warmup_head_steps` updates.

    Returns:
        The parameters that join later; None with the other two.

    Raises:
        UserInputError: heads are to learn alone and the model has none with parameters.
    """
    heads = {id(parameter) for parameter in model.extra_heads.parameters()}
    if trainable != "all" and not heads:
        raise UserInputError(
            f"trainable {trainable!r} needs heads that can learn, and this model has horizon {model.horizon} "
            f"with heads of the form {model.head_form!r}",
            remedy="set model.mtp.horizon above 1 with model.mtp.adapter: heads, or model.trainable: all",
        )
    learned = learned_parameters(model)
    chosen = {id(p) for p in learned.values()} if trainable != "heads_only" else heads
    for parameter in model.parameters():
        # Four-bit matrices hold integers, which cannot even be asked whether they learn.
        if parameter.requires_grad != (id(parameter) in chosen):
            parameter.requires_grad_(id(parameter) in chosen)
    if trainable != "heads_then_all":
        return None
    late = tuple(parameter for parameter in learned.values() if id(parameter) not in heads)
    return LateParameters(late, warmup_head_steps)


def learned_parameters(model: MTPModel) -> dict[str, nn.Parameter]:
    """Parameters that `all` trains, by name: every one, or with LoRA adapters these and the heads."""
    named = dict(model.named_parameters())
    lora = model.lora
    if lora is None:
        return named
    heads = {id(p) for module in (model.last_layer, model.extra_heads) for p in module.parameters()}
    return {name: p for name, p in named.items() if name in lora.parameter_names or id(p) in heads}


def trainable_parameters(model: nn.Module) -> int:
    """Number of parameters that learn now, tied ones counted once; works without weights (meta tensors)."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# -------------------------------------------------------------------- checkpoints


def checkpoint_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a training checkpoint keeps of a module: its state dict.

    Of a model with LoRA adapters only what learns, and buffers: the rest is the base model's, which
    `wmtp.modeling.lora.check_same_base` verifies.
    """
    state: dict[str, Tensor] = dict(module.state_dict())
    if not isinstance(module, MTPModel) or module.lora is None:
        return state
    kept = learned_parameters(module).keys() | {name for name, _ in module.named_buffers()}
    return {name: tensor for name, tensor in state.items() if name in kept}
