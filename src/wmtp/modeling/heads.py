"""The forms that heads 1..H-1 come in, behind one interface.

Every head reads what came before it (`HeadInputs`) and returns hidden states [B,S,D] that still have to pass
the model's final norm. Entry t of head h predicts token t + offset, offset h+1 by default.

    form             reads                                               sees tokens up to
    transformer      the trunk                                           t
    linear, medusa   head 0, before the final norm                       t
    sequential       head h-1 before the final norm, and the embedding   t + offset - 1
                     of token t + offset - 1
    teacher_forcing  head 0 at position t + offset - 1                   t + offset - 1

Sources: `transformer`, Gloeckle et al., 2024 (arXiv:2404.19737); `medusa`, Cai et al., 2024
(arXiv:2401.10774, section 2.1); `sequential`, DeepSeek-V3 (arXiv:2412.19437, equations 21 to 23).
Shapes: B batch, S sequence, D hidden size, H heads.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from wmtp.exceptions import UserInputError
from wmtp.modeling.outputs import TrunkOutput
from wmtp.modeling.structure import DecoderParts

HeadForm = Literal["transformer", "linear", "medusa", "sequential", "teacher_forcing"]
Adapter = Literal["heads", "teacher_forcing", "fallback"]
HEAD_FORMS: tuple[str, ...] = get_args(HeadForm)
ADAPTERS: tuple[str, ...] = get_args(Adapter)
# Forms that are added by `head`; teacher forcing is an adapter, because it has nothing to learn.
TRAINABLE_FORMS = tuple(form for form in HEAD_FORMS if form != "teacher_forcing")


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What a head may read.

    Attributes:
        trunk: hidden states in front of the last decoder layer, and the arguments of that layer.
        states: [B,S,D] of heads 0, 1, ... before the final norm, as far as they have been run.
        embed_ahead: gives the embeddings [B,S,D] of tokens t + distance, zero where there is none.
    """

    trunk: TrunkOutput
    states: Sequence[Tensor]
    embed_ahead: Callable[[int], Tensor]


class TransformerHead(nn.Module):
    """One decoder layer on the trunk."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Return [B,S,D] before the final norm."""
        return inputs.trunk.layer_arguments.run_layer(self.layer, inputs.trunk.trunk_BSD)


class LinearHead(nn.Module):
    """A linear map of head 0's hidden state, `x + W x`; the identity at the start.

    Written as what it adds, so that weight decay pulls it towards head 0 and not towards nothing.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.map = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.map.weight)

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Return [B,S,D] before the final norm."""
        state_BSD: Tensor = inputs.states[0] + self.map(inputs.states[0])
        return state_BSD


class MedusaHead(nn.Module):
    """A residual SiLU block on head 0's hidden state, `x + silu(W x + b)`; the identity at the start."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.map = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Return [B,S,D] before the final norm."""
        return inputs.states[0] + nn.functional.silu(self.map(inputs.states[0]))


class SequentialHead(nn.Module):
    """One depth of DeepSeek-V3: `layer(M [norm(depth before); norm(embedding of token t + offset - 1)])`.

    Args:
        layer: decoder layer of this depth.
        norm: a norm of the model's kind; each of the two inputs gets a copy.
        distance: how far ahead the token is whose embedding is read: offset - 1.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module, *, hidden_size: int, distance: int) -> None:
        super().__init__()
        self.distance = distance
        self.hidden_norm = norm
        self.embedding_norm = copy.deepcopy(norm)
        self.projection = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layer = layer
        # The depth before passes through at the start, so that a new depth begins as one more decoder layer
        # on it; the embedding's half learns from the first step on, because its input is not zero.
        with torch.no_grad():
            self.projection.weight.zero_()
            self.projection.weight[:, :hidden_size].copy_(torch.eye(hidden_size))

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Return [B,S,D] before the final norm."""
        embedding_BSD = inputs.embed_ahead(self.distance)
        both_BSE = torch.cat(
            [self.hidden_norm(inputs.states[-1]), self.embedding_norm(embedding_BSD)], dim=-1
        )
        return inputs.trunk.layer_arguments.run_layer(self.layer, self.projection(both_BSE))


class TeacherForcedHead(nn.Module):
    """Head 0 of a later position: what the ordinary model says once it has been given the tokens between.

    It has no parameters and cannot draft, because it needs the tokens that a draft would have to guess.
    """

    def __init__(self, *, distance: int) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, inputs: HeadInputs) -> Tensor:
        """Return [B,S,D] before the final norm, zero where position t + distance does not exist."""
        return shift_left(inputs.states[0], self.distance)


def shift_left(values_BSD: Tensor, distance: int) -> Tensor:
    """`result[:, t] = values[:, t + distance]`, zero past the end."""
    if distance == 0:
        return values_BSD
    return nn.functional.pad(values_BSD[:, distance:], (0, 0, 0, min(distance, values_BSD.shape[1])))


def check_offsets(offsets: Sequence[int]) -> tuple[int, ...]:
    """Return the offsets of heads 0..H-1 where they are increasing and the first is 1.

    Raises:
        UserInputError: they are not.
    """
    listed = tuple(offsets)
    if not listed or listed[0] != 1 or sorted(set(listed)) != list(listed):
        raise UserInputError(
            f"offsets are {list(listed)}, but must increase and begin with 1",
            remedy="list the distance in tokens that each head predicts, such as [1, 2, 4, 8]",
        )
    return listed


def build_heads(
    parts: DecoderParts, form: HeadForm, offsets: Sequence[int], hidden_size: int
) -> nn.ModuleList:
    """Build heads 1..H-1 for the offsets of heads 0..H-1, on the last layer's device and in its dtype.

    Decoder layers start as copies of the model's last one, each tensor in the precision it has there: some
    families keep a few (what routes to experts) in fp32 in a model of 16 bits.
    """
    heads = nn.ModuleList(_build_head(parts, form, offset, hidden_size) for offset in offsets[1:])
    # The wrapped model may be frozen; its new heads are there to be trained.
    return heads.requires_grad_(True)


def _build_head(parts: DecoderParts, form: HeadForm, offset: int, hidden_size: int) -> nn.Module:
    parameter = next(parts.layers[-1].parameters())
    where, precision = parameter.device, parameter.dtype
    match form:
        case "transformer":
            return TransformerHead(copy.deepcopy(parts.layers[-1]))
        case "linear":
            return LinearHead(hidden_size).to(where, precision)
        case "medusa":
            return MedusaHead(hidden_size).to(where, precision)
        case "sequential":
            head = SequentialHead(
                copy.deepcopy(parts.layers[-1]),
                copy.deepcopy(parts.final_norm),
                hidden_size=hidden_size,
                distance=offset - 1,
            )
            head.projection.to(where, precision)
            return head
        case "teacher_forcing":
            return TeacherForcedHead(distance=offset - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRequest:
    """The heads a caller asks for; None takes what the checkpoint has. See `MTPModel.from_pretrained`."""

    horizon: int | None = None
    head: HeadForm | None = None
    adapter: Adapter = "heads"
    offsets: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.horizon is not None and self.horizon < 1:
            raise UserInputError(
                f"horizon is {self.horizon}", remedy="choose at least 1 (1 is next-token prediction)"
            )
        if self.head is not None and self.head not in TRAINABLE_FORMS:
            raise UserInputError(
                f"unknown head form {self.head!r}", remedy=f"choose one of: {', '.join(TRAINABLE_FORMS)}"
            )
        if self.adapter not in ADAPTERS:
            raise UserInputError(
                f"unknown adapter {self.adapter!r}", remedy=f"choose one of: {', '.join(ADAPTERS)}"
            )
        if self.offsets is not None:
            check_offsets(self.offsets)
            if self.horizon not in (None, len(self.offsets)):
                raise UserInputError(
                    f"{len(self.offsets)} offsets {list(self.offsets)} do not fit horizon {self.horizon}",
                    remedy="give one offset a head",
                )

    @property
    def wanted_horizon(self) -> int | None:
        """The number of heads that is asked for, in either way."""
        return self.horizon if self.offsets is None else len(self.offsets)


@dataclass(frozen=True, slots=True)
class SavedHeads:
    """The heads a checkpoint brings: their form, and the offsets of all of them, head 0 included."""

    form: HeadForm = "transformer"
    offsets: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """The heads a model gets; the first `num_saved` of them, head 0 included, come from the checkpoint."""

    form: HeadForm
    offsets: tuple[int, ...]
    num_saved: int


def plan_heads(request: HeadRequest, saved: SavedHeads, source: str) -> HeadPlan:
    """Bring together what is asked for and what there is; `source` names the checkpoint in messages.

    Raises:
        UserInputError: they do not go together.
    """
    if saved.form == "teacher_forcing" and request.wanted_horizon is not None:
        saved = SavedHeads()  # nothing learned in it stands in the way of other heads
    num_saved = len(saved.offsets)
    wanted = request.wanted_horizon or num_saved
    if num_saved == 1:
        return _plan_new_heads(request, wanted, source)
    _check_saved_heads(request, saved, wanted, source)
    if wanted < num_saved:
        warnings.warn(
            f"{source} has {num_saved} heads; the first {wanted} are used (horizon={wanted})", stacklevel=4
        )
        return HeadPlan(saved.form, saved.offsets[:wanted], wanted)
    more = range(saved.offsets[-1] + 1, saved.offsets[-1] + 1 + wanted - num_saved)
    offsets = (*saved.offsets, *more) if request.offsets is None else tuple(request.offsets)
    return HeadPlan(saved.form, offsets, num_saved)


def _plan_new_heads(request: HeadRequest, wanted: int, source: str) -> HeadPlan:
    offsets = tuple(range(1, wanted + 1)) if request.offsets is None else tuple(request.offsets)
    if wanted > 1 and request.adapter == "fallback":
        warnings.warn(
            f"{source} has one head, so it is used with horizon 1 in place of {wanted} (adapter: fallback); "
            "adapter: heads would add heads",
            stacklevel=5,
        )
        offsets = (1,)
    form = "teacher_forcing" if request.adapter == "teacher_forcing" else request.head or "transformer"
    return HeadPlan(form, offsets, 1)


def _check_saved_heads(request: HeadRequest, saved: SavedHeads, wanted: int, source: str) -> None:
    num_saved = len(saved.offsets)
    if wanted > num_saved and request.adapter != "heads":
        raise UserInputError(
            f"{source} has {num_saved} heads and horizon {wanted} asks for more, which adapter "
            f"{request.adapter!r} does not add",
            remedy=f"use horizon {num_saved}, or adapter: heads (model.mtp.adapter) for new ones",
        )
    if wanted > 1 and request.head not in (None, saved.form):
        raise UserInputError(
            f"{source} has heads of the form {saved.form!r}, not {request.head!r}",
            remedy=f"use head: {saved.form} (model.mtp.head), or start from a model without heads",
        )
    shared = min(wanted, num_saved)
    if request.offsets is not None and tuple(request.offsets[:shared]) != saved.offsets[:shared]:
        raise UserInputError(
            f"the heads of {source} predict at offsets {list(saved.offsets)}, not {list(request.offsets)}",
            remedy="use these offsets (model.mtp.offsets), or start from a model without heads",
        )
