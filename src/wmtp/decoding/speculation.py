"""Self-speculation: the model's own heads draft, head 0 verifies, and what it would not have said is undone.

A block is the last known token and the drafts for those after it. One forward of it verifies the drafts, and
from its hidden states the next ones are drafted. Rows of a batch have lengths of their own: a row that
accepts more runs ahead. Sources: blockwise parallel decoding, Stern et al., 2018 (arXiv:1811.03115);
sampling, Leviathan et al., 2023 (arXiv:2211.17192).

Shapes: B rows still running, T nodes of a block, N drafts of a chain, M heads that draft at once, K
candidates of a head, X tokens that drafts are chosen among, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from wmtp.decoding.acceptance import Verdict, accept_path, accept_sampled
from wmtp.decoding.counts import GenerationCounts
from wmtp.decoding.protocols import DraftingSession, DraftPoint
from wmtp.decoding.rows import Row, draw_uniforms
from wmtp.decoding.sampling import (
    ACCEPT_STREAM,
    DRAFT_STREAM,
    TOKEN_STREAM,
    SamplingSettings,
    choose_tokens,
    draw_from_weights,
    probabilities,
    shape_logits,
)
from wmtp.decoding.tree import DraftTree
from wmtp.exceptions import UserInputError

# Longer prompts, all rows together, are stored up to their last token without predictions: it saves what the
# last layer and the heads would do for tokens nobody asks about, and costs one more pass.
_WHOLE_PROMPT_TOKENS: Final = 512


class DraftPlan:
    """How a model drafts, for all batches of a generation.

    Args:
        session: the model.
        tree: shape of a block.
        token_ids: tokens that drafts are chosen among; None for all.

    Raises:
        UserInputError: a tree that the heads cannot draft, or token ids that are none.
    """

    def __init__(self, session: DraftingSession, tree: DraftTree, token_ids: Sequence[int] | None) -> None:
        session.check_tree(tree)
        self.session = session
        self.tree = tree
        num_choices = session.vocab_size if token_ids is None else len(set(token_ids))
        self._token_ids: Tensor | None = None
        if token_ids is not None:
            _check_token_ids(token_ids, session.vocab_size)
            self._token_ids = torch.tensor(sorted(set(token_ids)), device=session.device)
            self._unembed = session.partial_unembedding(self._token_ids)
        else:
            self._unembed = session.unembed
        if tree.width > num_choices:
            raise UserInputError(
                f"a head cannot draft {tree.width} alternatives among {num_choices} tokens",
                remedy="give smaller widths, or more tokens to draft from",
            )

    def unembed(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., D] to logits of the tokens that drafts are chosen among."""
        return self._unembed(hidden)

    def to_tokens(self, indices: Tensor) -> Tensor:
        """Turn indices of such logits into token ids."""
        return indices if self._token_ids is None else self._token_ids[indices]

    def spread(self, weights_BMX: Tensor) -> Tensor:
        """Turn probabilities of these tokens into probabilities of all, [B,M,V]."""
        if self._token_ids is None:
            return weights_BMX
        spread_BMV = weights_BMX.new_zeros(*weights_BMX.shape[:2], self.session.vocab_size)
        spread_BMV[..., self._token_ids.to(weights_BMX.device)] = weights_BMX
        return spread_BMV


def _check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    outside = [token_id for token_id in token_ids if not 0 <= token_id < vocab_size]
    if outside or not token_ids:
        found = f"{outside[0]} among them" if outside else "none"
        raise UserInputError(
            f"the tokens to draft from must be ids in 0..{vocab_size - 1}, and there is {found}",
            remedy="give ids of this model's vocabulary, or leave them out to draft from all",
        )


class SpeculativeBatch:
    """Rows that advance by verified blocks.

    Args:
        plan: how the model drafts.
        rows: the prompts.
        settings: of sampling.
        seed: of all draws.
        context_length: positions the model has; None for no limit.
    """

    def __init__(
        self,
        plan: DraftPlan,
        rows: Sequence[Row],
        settings: SamplingSettings,
        seed: int,
        *,
        context_length: int | None,
    ) -> None:
        self._plan, self._settings = plan, settings
        tree = self._tree = plan.tree
        self._max_position = None if context_length is None else context_length - 1
        self._prompts = [row.prompt_ids for row in rows]
        self.num_forwards = 0
        # Column of the next block's first token: the number of tokens whose keys are stored.
        self._lengths = [0] * len(rows)
        self._num_new = [0] * len(rows)
        device = self._device = plan.session.device
        num_steps = max(row.max_new_tokens for row in rows)
        # A block may begin at the last token of a row that is full but not yet dropped.
        capacity = max(map(len, self._prompts)) + num_steps + 2 * tree.num_nodes
        self._drafter = plan.session.build_drafter(len(rows), capacity, tree)
        self._depth_1T = torch.tensor([tree.depths], device=device)
        # Where nodes 1.. stand among the candidates [N * K], head by head.
        self._candidate_T = torch.tensor(
            [(d - 1) * tree.width + r for d, r in zip(tree.depths[1:], tree.ranks[1:], strict=True)],
            device=device,
            dtype=torch.long,
        )
        self._uniforms_BSC = draw_uniforms(
            rows,
            settings,
            seed,
            num_steps + 2 * tree.num_nodes,
            streams=(TOKEN_STREAM, DRAFT_STREAM, ACCEPT_STREAM),
            device=device,
        )
        self._point: DraftPoint | None = None
        self._block_BT = torch.empty(0)
        self._draft_BNV: Tensor | None = None

    def advance(self) -> list[list[int]]:
        """Run one forward; returns each row's new tokens: the drafts that stand and one more."""
        start, verdicts = self._run_prompt() if self._point is None else self._run_block()
        self.num_forwards += 1
        self._num_new = [
            num_new + len(verdict.token_ids) for num_new, verdict in zip(self._num_new, verdicts, strict=True)
        ]
        self._lengths = [
            len(prompt) + num_new - 1 for prompt, num_new in zip(self._prompts, self._num_new, strict=True)
        ]
        self._point = DraftPoint(
            start=start,
            paths=[verdict.path for verdict in verdicts],
            num_columns=max(self._lengths),
            next_token_B=torch.tensor([verdict.token_ids[-1] for verdict in verdicts], device=self._device),
            is_chain=self._tree.is_chain,
        )
        return [verdict.token_ids for verdict in verdicts]

    def keep(self, running: Sequence[int]) -> None:
        """Draft, then drop all rows but those at the given positions."""
        self._draft()
        if len(running) == len(self._lengths):
            return
        kept_B = torch.tensor(running, device=self._device)
        self._drafter.keep_rows(kept_B)
        self._block_BT = self._block_BT[kept_B]
        self._uniforms_BSC = self._uniforms_BSC[kept_B.to(self._uniforms_BSC.device)]
        if self._draft_BNV is not None:
            self._draft_BNV = self._draft_BNV[kept_B.to(self._draft_BNV.device)]
        self._lengths = [self._lengths[row] for row in running]
        self._num_new = [self._num_new[row] for row in running]
        self._prompts = [self._prompts[row] for row in running]

    def count(self, num_tokens: int, counts: GenerationCounts) -> None:
        """Add a row's tokens: one forward."""
        counts.add(num_tokens)

    # ---------------------------------------------------------------- verifying

    def _run_prompt(self) -> tuple[int | Tensor, list[Verdict]]:
        """Run the prompts; head 0 chooses each row's first token."""
        lengths = [len(prompt) for prompt in self._prompts]
        longest = max(lengths)
        # Any id does behind the shorter prompts: what it leaves in the cache is written over.
        ids_BP = torch.tensor(
            [[*prompt, *[0] * (longest - len(prompt))] for prompt in self._prompts], device=self._device
        )
        last_B = torch.tensor(lengths, device=self._device) - 1
        rows_B = torch.arange(len(lengths), device=self._device)
        if sum(lengths) <= _WHOLE_PROMPT_TOKENS or longest == 1:
            start: int | Tensor = 0
            hidden_BD = self._drafter.run_prompt(ids_BP)[rows_B, last_B]
            # Every token of a prompt stands.
            paths = [list(range(length)) for length in lengths]
        else:
            self._drafter.write_prefix(ids_BP[:, :-1])
            start = _one_or_all([length - 1 for length in lengths], self._device)
            last_B1 = ids_BP[rows_B, last_B][:, None]
            hidden_BD = self._drafter.run_block(last_B1, last_B[:, None], start, longest)[:, 0]
            paths = [[0]] * len(lengths)
        logits_BV = self._plan.session.unembed(hidden_BD)
        chosen_B = choose_tokens(logits_BV, self._settings, self._uniforms_BSC[:, 0, 0])
        tokens = chosen_B.tolist()
        return start, [Verdict(path, [token]) for path, token in zip(paths, tokens, strict=True)]

    def _run_block(self) -> tuple[int | Tensor, list[Verdict]]:
        """Run the drafts; head 0 decides which stand."""
        start = _one_or_all(self._lengths, self._device)
        start_B1 = start if isinstance(start, int) else start[:, None]
        positions_BT = start_B1 + self._depth_1T
        if self._max_position is not None:
            # Beyond the last position of the model are only drafts that no row has room for.
            positions_BT = positions_BT.clamp(max=self._max_position)
        num_columns = max(self._lengths) + self._tree.num_nodes
        hidden_BTD = self._drafter.run_block(self._block_BT, positions_BT, start, num_columns)
        return start, self._verify(self._plan.session.unembed(hidden_BTD))

    def _verify(self, logits_BTV: Tensor) -> list[Verdict]:
        """Decide over the drafts; the one look at the host in a forward."""
        if self._settings.is_greedy:
            chosen_BT = logits_BTV.argmax(dim=-1)
        else:
            shaped_NV = shape_logits(logits_BTV.flatten(0, 1), self._settings)
            model_BTV = probabilities(shaped_NV).view_as(logits_BTV)
            uniforms_BT = self._uniforms(TOKEN_STREAM, self._depth_1T)
            if self._draft_BNV is not None:
                return self._verify_sampled(model_BTV, self._draft_BNV, uniforms_BT)
            chosen_N = draw_from_weights(model_BTV.flatten(0, 1), uniforms_BT.flatten())
            chosen_BT = chosen_N.view_as(self._block_BT).to(self._device)
        blocks, chosen = torch.stack([self._block_BT, chosen_BT]).tolist()
        return [accept_path(self._tree, *pair) for pair in zip(blocks, chosen, strict=True)]

    def _verify_sampled(self, model_BTV: Tensor, draft_BNV: Tensor, uniforms_BT: Tensor) -> list[Verdict]:
        block_BT = self._block_BT.to(model_BTV.device)
        accept_uniforms_BN = self._uniforms(ACCEPT_STREAM, self._depth_1T[:, :-1])
        num_accepted_B, next_B = accept_sampled(
            block_BT, model_BTV, draft_BNV, accept_uniforms_BN, uniforms_BT
        )
        rows = torch.cat([num_accepted_B[:, None], next_B[:, None], block_BT[:, 1:]], dim=1).tolist()
        return [
            Verdict(list(range(num_accepted + 1)), [*drafts[:num_accepted], next_token])
            for num_accepted, next_token, *drafts in rows
        ]

    # ---------------------------------------------------------------- drafting

    def _draft(self) -> None:
        """Make the next block: the known token and the drafts behind it."""
        assert self._point is not None
        candidates: list[Tensor] = []
        weights: list[Tensor] = []

        def choose(hidden_BMD: Tensor) -> Tensor:
            logits_BMX = self._plan.unembed(hidden_BMD)
            if self._settings.is_greedy or not self._tree.is_chain:
                # Alternatives are fixed tokens, drawn or not: see `accept_tree`.
                if self._tree.width == 1:
                    best_BMK = logits_BMX.argmax(dim=-1, keepdim=True)
                else:
                    best_BMK = logits_BMX.topk(self._tree.width, dim=-1).indices
                candidates.append(self._plan.to_tokens(best_BMK))
            else:
                num_before = sum(each.shape[1] for each in candidates)
                heads_M = torch.arange(num_before, num_before + hidden_BMD.shape[1], device=self._device)
                weights_NX = probabilities(shape_logits(logits_BMX.flatten(0, 1), self._settings))
                drawn_N = draw_from_weights(weights_NX, self._uniforms(DRAFT_STREAM, heads_M).flatten())
                drawn_BM = drawn_N.view(hidden_BMD.shape[:2]).to(self._device)
                candidates.append(self._plan.to_tokens(drawn_BM)[..., None])
                weights.append(self._plan.spread(weights_NX.view_as(logits_BMX)))
            return candidates[-1][..., 0]

        self._drafter.draft(self._point, choose)
        next_B1 = self._point.next_token_B[:, None]
        if self._tree.is_chain:
            self._block_BT = torch.cat([next_B1, *(each[..., 0] for each in candidates)], dim=1)
        else:
            drafts_BN = torch.cat(candidates, dim=1).flatten(1)[:, self._candidate_T]
            self._block_BT = torch.cat([next_B1, drafts_BN], dim=1)
        self._draft_BNV = torch.cat(weights, dim=1) if weights else None

    def _uniforms(self, stream: int, ahead_X: Tensor) -> Tensor:
        """Return the numbers [B,X] of the new tokens that lie so many behind those there are."""
        index_BX = torch.tensor(self._num_new, device=self._device)[:, None] + ahead_X
        return self._uniforms_BSC[:, stream].gather(1, index_BX.to(self._uniforms_BSC.device))


def _one_or_all(starts: list[int], device: torch.device) -> int | Tensor:
    """Return one number where all are equal: columns are then sliced, not gathered."""
    return starts[0] if min(starts) == max(starts) else torch.tensor(starts, device=device)
