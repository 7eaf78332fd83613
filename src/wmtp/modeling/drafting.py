"""An MTP model that is ready to draft: what `wmtp.decoding` needs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from wmtp.decoding.block_cache import BlockCache
from wmtp.decoding.protocols import Drafter
from wmtp.decoding.tree import DraftTree
from wmtp.exceptions import UserInputError
from wmtp.modeling.drafters import ResidualDrafter, SequentialDrafter, TransformerDrafter
from wmtp.modeling.outputs import TrunkOutput
from wmtp.modeling.probe import differs
from wmtp.modeling.recording import LastLayerRecorder, LastLayerTap

if TYPE_CHECKING:
    from wmtp.modeling.mtp_model import MTPModel

_PLAIN_REMEDY = "generate without speculation (speculative=False)"


class HeadsSession:
    """An MTP model that is ready to draft; made by `MTPModel.decoding_session`.

    Args:
        model: with heads that can draft.
        tap: listening to its last layer.
        windows: see `attention_windows`.
    """

    def __init__(self, model: MTPModel, tap: LastLayerTap, windows: dict[str, int | None]) -> None:
        self.model = model
        self.tap = tap
        # Looked up once: finding the unembedding takes the library longer than using it.
        self.device = model.device
        self.dtype = model.dtype
        self.vocab_size, self.hidden_size = model.unembedding_VD.shape
        self.unembed = model.build_unembedding()
        self.windows = windows

    def check_tree(self, tree: DraftTree) -> None:
        """Raise `UserInputError` where the heads cannot draft such a tree."""
        num_drafts = self.model.horizon - 1
        if not 1 <= tree.num_drafts <= num_drafts:
            raise UserInputError(
                f"widths are given for {tree.num_drafts} heads, and {num_drafts} of this model draft",
                remedy=f"give 1 to {num_drafts} widths",
            )
        if not tree.is_chain and self.model.head_form == "sequential":
            raise UserInputError(
                "sequential heads draft from one another's drafts and have no alternatives",
                remedy="leave the widths out",
            )

    def build_drafter(self, batch_size: int, capacity: int, tree: DraftTree) -> Drafter:
        """Return a drafter for a batch with room for `capacity` columns a row."""
        match self.model.head_form:
            case "transformer":
                return TransformerDrafter(self, capacity, tree)
            case "sequential":
                return SequentialDrafter(self, batch_size, capacity, tree)
            case _:
                return ResidualDrafter(self, capacity, tree)

    def partial_unembedding(self, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a map of hidden states [..., D] to the logits of these tokens alone."""
        return self.model.build_unembedding(token_ids)

    def layer_arguments_at(
        self, positions_BW: Tensor, mask: Tensor | Mapping[str, Tensor] | None, cache: BlockCache
    ) -> TrunkOutput:
        """Return what the wrapped model would call its last layer with at these positions.

        It runs without its layers, so the hidden states mean nothing.
        """
        hollow = self._hollow
        hollow.recorder.input_ids_BS = torch.zeros_like(positions_BW)
        with hollow.in_place():
            self.model.base_model(
                input_ids=hollow.recorder.input_ids_BS,
                attention_mask=mask,
                position_ids=positions_BW,
                past_key_values=cache,
                use_cache=True,
            )
        return hollow.recorder.recorded

    @cached_property
    def _hollow(self) -> _HollowLayers:
        return _HollowLayers(self.model, self.tap)


class _HollowLayers:
    """Stand-ins for a model's decoder layers that do nothing, but the last, which notes its arguments."""

    def __init__(self, model: MTPModel, tap: LastLayerTap) -> None:
        self._owner, self._name = _find_layer_list(model)
        self._layers = model.decoder_layers
        self.recorder = LastLayerRecorder(torch.empty(0))
        skipped = [_Skip(tap) for _ in range(len(self._layers) - 1)]
        self._stand_ins = nn.ModuleList([*skipped, self.recorder])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put them where the layers are inside the block."""
        setattr(self._owner, self._name, self._stand_ins)
        try:
            yield
        finally:
            setattr(self._owner, self._name, self._layers)


class _Skip(nn.Module):
    """A decoder layer that does nothing, and answers in the form the model's own layers do."""

    def __init__(self, tap: LastLayerTap) -> None:
        super().__init__()
        self._tap = tap

    def forward(self, hidden_states: Tensor, *positional: Any, **keyword: Any) -> Any:
        """Return the hidden states."""
        return (hidden_states,) if self._tap.answers_in_tuple else hidden_states


def verify_drafting(session: HeadsSession) -> None:
    """Check on a few tokens that blocks on the cache give what the whole text gives.

    Raises:
        UserInputError: they do not: the model ignores or refuses the masks and positions of blocks.
    """
    name = type(session.model.causal_lm).__name__
    try:
        actual, expected = _probe_block(session)
    # A family that takes no mask of its own (ALiBi) fails in a way of its own.
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserInputError(
            f"{name} cannot be run on blocks of tokens: {error}", remedy=_PLAIN_REMEDY
        ) from error
    if differs(actual, expected):
        raise UserInputError(
            f"{name} gives other results for a block of tokens than for the whole text", remedy=_PLAIN_REMEDY
        )


def _probe_block(session: HeadsSession) -> tuple[Tensor, Tensor]:
    """Return head 0's states of a block on the cache, and of the same tokens in the whole text."""
    model, num_drafts = session.model, session.model.horizon - 1
    num_prompt, num_nodes = 4, num_drafts + 1
    length = num_prompt + num_nodes
    rows_B1 = torch.arange(2, device=session.device)[:, None]
    tokens_BS = (7 * torch.arange(length, device=session.device) + rows_B1) % session.vocab_size
    expected_BSD = model.run_head(0, model.run_trunk_unchecked(tokens_BS))
    drafter = session.build_drafter(2, 2 * length, DraftTree.chain(num_drafts))
    drafter.run_prompt(tokens_BS[:, :num_prompt])
    # Rows at columns of their own; the second one's block is written over the end of its prompt.
    start_B = torch.tensor([num_prompt, num_prompt - 1], device=session.device)
    positions_BT = start_B[:, None] + torch.arange(num_nodes, device=session.device)
    block_BTD = drafter.run_block(tokens_BS[rows_B1, positions_BT], positions_BT, start_B, length)
    return block_BTD, expected_BSD[rows_B1, positions_BT]


def attention_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Return how far back the attention layers of each kind see, in tokens; None is everything.

    Raises:
        UserInputError: a layer of another kind, which keeps a state that cannot be rolled back.
    """
    layers = DynamicCache(config=config).layers
    kinds = config.get_text_config(decoder=True).to_dict().get("layer_types") or ["attention"] * len(layers)
    windows: dict[str, int | None] = {}
    for kind, layer in zip(kinds, layers, strict=True):
        if type(layer) is DynamicLayer:
            windows[kind] = None
        elif type(layer) is DynamicSlidingWindowLayer and kind != "chunked_attention":
            windows[kind] = layer.sliding_window
        else:
            raise UserInputError(
                f"{config.model_type} has layers ({kind}) whose state cannot be taken back",
                remedy=_PLAIN_REMEDY,
            )
    return windows


def check_can_draft(model: MTPModel) -> None:
    """Raise `UserInputError` where a model's heads or its attention make drafting impossible."""
    if not model.can_draft:
        if model.horizon == 1:
            reason = "it has one head"
        elif model.head_form == "teacher_forcing":
            reason = "teacher-forced heads need the tokens that a draft would have to guess"
        else:
            reason = f"its heads predict at offsets {list(model.offsets)}, which leave gaps"
        raise UserInputError(
            f"this model cannot draft: {reason}",
            remedy=f"use a model trained with heads at offsets 1, 2, 3, ..., or {_PLAIN_REMEDY}",
        )
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UserInputError(
            f"self-speculation does not work with attention implementation {implementation!r}",
            remedy="load the model with attn_implementation='sdpa'",
        )


def _find_layer_list(model: MTPModel) -> tuple[nn.Module, str]:
    """Return the module that holds the list of decoder layers, and its name there."""
    return next(
        (owner, name)
        for owner in model.base_model.modules()
        for name, child in owner.named_children()
        if child is model.decoder_layers
    )
