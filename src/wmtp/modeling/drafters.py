"""The heads of an MTP model at work in self-speculation, a class a kind of head.

One cache holds the trunk's layers, head 0's, and those of the heads that have a decoder layer: head h owns
index L-1+h. A head's layer is called with what the wrapped model has just called its own last layer with
(mask, positions, rotary tables), so it sees the same block at the same place, whatever the model family.

Shapes: B rows, T tokens of a block, P prompt, W tokens of a window, M heads, D hidden, L layers, K columns in
use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wmtp.decoding.block_cache import BlockCache, KeysWrittenError
from wmtp.decoding.masks import BlockMask, causal_blocks
from wmtp.decoding.protocols import ChooseDrafts, DraftPoint
from wmtp.decoding.tree import DraftTree
from wmtp.exceptions import ModelLoadError
from wmtp.modeling.heads import HeadInputs
from wmtp.modeling.outputs import TrunkOutput

if TYPE_CHECKING:
    from wmtp.modeling.drafting import HeadsSession


class BlockDrafter:
    """What drafters of every head form do: run blocks on a cache that one mask a layer kind fits."""

    def __init__(self, session: HeadsSession, num_caches: int, capacity: int, tree: DraftTree) -> None:
        self._model = session.model
        self._session = session
        self._tap = session.tap
        self._num_drafts = tree.num_drafts
        self._cache = BlockCache(num_caches, capacity)
        device = session.device
        single = causal_blocks(1, device)
        nodes = tree.ancestors(device), torch.tensor(tree.depths, device=device)
        self._masks = {1: self._build_masks(*single), tree.num_nodes: self._build_masks(*nodes)}

    def write_prefix(self, input_ids_BP: Tensor) -> None:
        """Store keys and values of the tokens at columns 0..P-1, without predictions."""
        self._cache.place_block(0, input_ids_BP.shape[1])
        trunk = self._model.run_trunk_unchecked(input_ids_BP, cache=self._cache)
        for layer, index in self._cached_layers():
            _write_keys(layer, trunk, self._cache, index)

    def run_prompt(self, input_ids_BP: Tensor) -> Tensor:
        """Run the tokens at columns 0..P-1 as the first block; returns what `run_block` does."""
        num_tokens = input_ids_BP.shape[1]
        self._cache.place_block(0, num_tokens)
        # The wrapped model makes the mask itself, or none where the causal kernels need none.
        return self._run_base(input_ids_BP, torch.arange(num_tokens, device=input_ids_BP.device)[None], None)

    def run_block(
        self, input_ids_BT: Tensor, positions_BT: Tensor, start: int | Tensor, num_columns: int
    ) -> Tensor:
        """Run a block whose first token belongs at column `start`; see `Drafter`."""
        self._cache.place_block(start, num_columns)
        masks = self._masks[input_ids_BT.shape[1]]
        return self._run_base(input_ids_BT, positions_BT, _cut(masks, start, num_columns))

    def keep_rows(self, kept_B: Tensor) -> None:
        """Drop all rows but those at the given positions."""
        self._cache.keep_rows(kept_B)

    def _cached_layers(self) -> list[tuple[nn.Module, int]]:
        """Layers behind the trunk that read it, with their indices in the cache."""
        return [(self._model.last_layer, len(self._model.decoder_layers) - 1)]

    def _run_base(
        self, input_ids_BT: Tensor, positions_BT: Tensor, mask: Tensor | Mapping[str, Tensor] | None
    ) -> Tensor:
        self._tap.input_ids_BS = input_ids_BT
        output = self._model.base_model(
            input_ids=input_ids_BT,
            attention_mask=mask,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
        )
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def _finish_path(self, point: DraftPoint) -> None:
        """Bring the accepted nodes of a tree together, behind one another."""
        if point.is_chain or all(len(path) == 1 or path[-1] == len(path) - 1 for path in point.paths):
            return
        longest = max(map(len, point.paths))
        # What stands behind a shorter path is of no use; it stays where it is.
        paths = [[*path, *range(len(path), longest)] for path in point.paths]
        path_BN = torch.tensor(paths, device=self._session.device)
        start = point.start if isinstance(point.start, int) else point.start[:, None]
        steps_N = torch.arange(longest, device=self._session.device)
        self._cache.move(start + path_BN, (start + steps_N).expand_as(path_BN))

    def _build_masks(self, ancestors_TT: Tensor, depth_T: Tensor) -> dict[str, BlockMask]:
        return {
            kind: BlockMask(
                ancestors_TT,
                depth_T,
                window=window,
                capacity=self._cache.capacity,
                dtype=self._session.dtype,
            )
            for kind, window in self._session.windows.items()
        }


class TransformerDrafter(BlockDrafter):
    """Heads that are decoder layers on the trunk.

    In a step, each head runs on the whole block. It needs keys and values of the accepted tokens and a query
    of the last one alone, but a pass for each would cost more than it saves: weights and calls are what the
    time goes into, and a block is a few tokens.
    """

    def __init__(self, session: HeadsSession, capacity: int, tree: DraftTree) -> None:
        num_layers = len(session.model.decoder_layers)
        self._layers: list[nn.Module] = [
            head.get_submodule("layer") for head in session.model.extra_heads[: tree.num_drafts]
        ]
        super().__init__(session, num_layers + len(self._layers), capacity, tree)
        self._views = [self._cache.view(num_layers + head) for head in range(len(self._layers))]

    def draft(self, point: DraftPoint, choose: ChooseDrafts) -> None:
        """Run the heads' layers on the block and read their states where it was accepted last."""
        trunk = self._tap.trunk
        states_BMTD = torch.stack(
            [
                trunk.layer_arguments.with_cache(self._cache, view).run_layer(layer, trunk.trunk_BSD)
                for layer, view in zip(self._layers, self._views, strict=True)
            ],
            dim=1,
        )
        choose(self._model.final_norm(_at_nodes(states_BMTD, [path[-1] for path in point.paths])))
        self._finish_path(point)

    def _cached_layers(self) -> list[tuple[nn.Module, int]]:
        first = len(self._model.decoder_layers)
        return [*super()._cached_layers(), *((layer, first + i) for i, layer in enumerate(self._layers))]


class ResidualDrafter(BlockDrafter):
    """Heads that map head 0's state (`linear`, `medusa`); nothing of theirs is kept."""

    def __init__(self, session: HeadsSession, capacity: int, tree: DraftTree) -> None:
        super().__init__(session, len(session.model.decoder_layers), capacity, tree)
        self._heads = list(session.model.extra_heads[: tree.num_drafts])

    def draft(self, point: DraftPoint, choose: ChooseDrafts) -> None:
        """Map head 0's state where the block was accepted last."""
        state_B1D = _at_nodes(self._tap.state_BSD[:, None], [path[-1] for path in point.paths])
        inputs = HeadInputs(self._tap.trunk, [state_B1D], _no_embedding)
        states_BMD = torch.cat([head(inputs) for head in self._heads], dim=1)
        choose(self._model.final_norm(states_BMD))
        self._finish_path(point)


class SequentialDrafter(BlockDrafter):
    """Depths that read the depth before and the embedding of the token it would lead to.

    A depth's keys at position s depend on token s + distance, at the end of the text a draft. Where a draft
    turns out wrong, the entries that rest on it are among those of the last N positions, N drafts; so every
    step runs the depths on the last N + 1, which holds these and all new ones, or on the block just run.
    """

    def __init__(self, session: HeadsSession, batch_size: int, capacity: int, tree: DraftTree) -> None:
        num_layers = len(session.model.decoder_layers)
        super().__init__(session, num_layers + tree.num_drafts, capacity, tree)
        self._heads = list(session.model.extra_heads[: tree.num_drafts])
        self._views = [self._cache.view(num_layers + head) for head in range(tree.num_drafts)]
        device = session.device
        self._window = tree.num_nodes
        self._window_masks = self._build_masks(*causal_blocks(self._window, device))
        self._window_T = torch.arange(self._window, device=device)
        self._tokens_BC = torch.zeros(batch_size, capacity, dtype=torch.long, device=device)
        self._states_BCD = torch.zeros(
            batch_size, capacity, session.model.hidden_size, dtype=session.dtype, device=device
        )
        self._has_drafted = False

    def write_prefix(self, input_ids_BP: Tensor) -> None:
        """Store keys, values and head 0's states, which the depths go through at the first draft."""
        self.run_prompt(input_ids_BP)

    def run_prompt(self, input_ids_BP: Tensor) -> Tensor:
        """Run the first block and keep head 0's states."""
        hidden_BPD = super().run_prompt(input_ids_BP)
        self._store(input_ids_BP, 0)
        return hidden_BPD

    def run_block(
        self, input_ids_BT: Tensor, positions_BT: Tensor, start: int | Tensor, num_columns: int
    ) -> Tensor:
        """Run a block and keep head 0's states."""
        hidden_BTD = super().run_block(input_ids_BT, positions_BT, start, num_columns)
        self._store(input_ids_BT, start)
        return hidden_BTD

    def draft(self, point: DraftPoint, choose: ChooseDrafts) -> None:
        """Run the depths one after another, each on the draft of the one before."""
        batch_size = self._tokens_BC.shape[0]
        rows_B1 = torch.arange(batch_size, device=self._tokens_BC.device)[:, None]
        last_B = point.start + torch.tensor(
            [len(path) - 1 for path in point.paths], device=self._session.device
        )
        columns_BW, trunk = self._open_window(point, last_B)
        nodes = (last_B - columns_BW[:, 0]).tolist()
        states_BWD = self._states_BCD[rows_B1, columns_BW]
        self._tokens_BC[rows_B1, last_B[:, None] + 1] = point.next_token_B[:, None]
        embedding = self._model.causal_lm.get_input_embeddings()

        def embed_ahead(distance: int) -> Tensor:
            ahead_BW = (columns_BW + distance).clamp(max=self._cache.capacity - 1)
            embedded: Tensor = embedding(self._tokens_BC[rows_B1, ahead_BW])
            return embedded

        for depth, (head, view) in enumerate(zip(self._heads, self._views, strict=True), start=1):
            arguments = trunk.layer_arguments.with_cache(self._cache, view)
            inputs = HeadInputs(
                TrunkOutput(trunk.trunk_BSD, arguments, trunk.input_ids_BS), [states_BWD], embed_ahead
            )
            states_BWD = head(inputs)
            drafts_B1 = choose(self._model.final_norm(_at_nodes(states_BWD[:, None], nodes)))
            self._tokens_BC[rows_B1, last_B[:, None] + 1 + depth] = drafts_B1
        self._has_drafted = True

    def keep_rows(self, kept_B: Tensor) -> None:
        """Drop all rows but those at the given positions."""
        super().keep_rows(kept_B)
        self._tokens_BC = self._tokens_BC[kept_B]
        self._states_BCD = self._states_BCD[kept_B]

    def _store(self, input_ids_BT: Tensor, start: int | Tensor) -> None:
        num_tokens = input_ids_BT.shape[1]
        if isinstance(start, int):
            self._tokens_BC[:, start : start + num_tokens] = input_ids_BT
            self._states_BCD[:, start : start + num_tokens] = self._tap.state_BSD
            return
        rows_B1 = torch.arange(len(input_ids_BT), device=input_ids_BT.device)[:, None]
        columns_BT = start[:, None] + torch.arange(num_tokens, device=input_ids_BT.device)
        self._tokens_BC[rows_B1, columns_BT] = input_ids_BT
        self._states_BCD[rows_B1, columns_BT] = self._tap.state_BSD

    def _open_window(self, point: DraftPoint, last_B: Tensor) -> tuple[Tensor, TrunkOutput]:
        """Return the columns to run the depths on, and the arguments of their layers there."""
        batch_size, device = len(last_B), last_B.device
        if not self._has_drafted:
            # The whole text so far.
            self._cache.place_block(0, point.num_columns)
            positions_1P = torch.arange(point.num_columns, device=device)[None]
            columns_BP = positions_1P.expand(batch_size, -1)
            return columns_BP, self._session.layer_arguments_at(positions_1P, None, self._cache)
        start: int | Tensor
        if all(len(path) >= self._window - 1 for path in point.paths):
            # The block just run begins with or before the first entry that may be wrong.
            start_B1 = point.start if isinstance(point.start, int) else point.start[:, None]
            return (start_B1 + self._window_T).expand(batch_size, -1), self._tap.trunk
        if batch_size == 1:
            start = max(point.num_columns - self._window, 0)
            columns_BW = (self._window_T + start)[None]
        else:
            start = (last_B - self._window + 1).clamp(min=0)
            columns_BW = start[:, None] + self._window_T
        num_columns = max(point.num_columns, self._window)
        self._cache.place_block(start, num_columns)
        masks = _cut(self._window_masks, start, num_columns)
        # Short rows have no tokens yet at the end of their window; what is written there is written over.
        return columns_BW, self._session.layer_arguments_at(columns_BW, masks, self._cache)


def _write_keys(layer: nn.Module, trunk: TrunkOutput, cache: BlockCache, index: int) -> None:
    """Run a layer until its keys and values are in the cache."""
    arguments = trunk.layer_arguments.with_cache(cache, cache.view(index, keys_only=True))
    try:
        arguments.run_layer(layer, trunk.trunk_BSD)
    except KeysWrittenError:
        return
    raise ModelLoadError(
        f"{type(layer).__name__} keeps no keys and values",
        remedy="generate without speculation (speculative=False)",
    )


def _cut(masks: Mapping[str, BlockMask], start: int | Tensor, num_columns: int) -> Tensor | dict[str, Tensor]:
    """Return the mask of a block; where the model has layers of several kinds, one a kind."""
    cut = {kind: mask.cut(start, num_columns) for kind, mask in masks.items()}
    return cut if len(cut) > 1 else next(iter(cut.values()))


def _at_nodes(states_BMTD: Tensor, nodes: Sequence[int]) -> Tensor:
    """Return each row's states at one token, [B,M,D]."""
    if len(nodes) == 1:
        return states_BMTD[:, :, nodes[0]]
    rows_B = torch.arange(len(nodes), device=states_BMTD.device)
    return states_BMTD[rows_B, :, torch.tensor(nodes, device=states_BMTD.device)]


def _no_embedding(distance: int) -> Tensor:
    raise AssertionError("heads that map head 0's state read no embeddings")
