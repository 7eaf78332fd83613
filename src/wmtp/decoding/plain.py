"""A batch that advances token by token, with any causal language model.

Prompts are padded on the left and masked, and positions count from each row's first real token.

Shapes: B rows still running, S columns, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from wmtp.decoding.cache import build_cache
from wmtp.decoding.counts import GenerationCounts
from wmtp.decoding.protocols import DecoderProtocol
from wmtp.decoding.rows import Row, draw_uniforms
from wmtp.decoding.sampling import TOKEN_STREAM, SamplingSettings, choose_tokens
from wmtp.exceptions import UserInputError

# Tokens generated between two looks at the host, on devices that work beside it: each look waits for the
# device, and a row that has ended costs the rest of its interval for nothing.
_CHECK_INTERVAL: Final = 4


class PlainBatch:
    """The model's inputs for the next forward of a batch, and its cache.

    Args:
        model: a causal language model.
        rows: the prompts.
        settings: of sampling.
        seed: of all draws.
        context_length: positions the model has; None for no limit.

    Raises:
        UserInputError: by the first `advance`, where the model answers NaN to padded prompts alone.
    """

    def __init__(
        self,
        model: DecoderProtocol,
        rows: Sequence[Row],
        settings: SamplingSettings,
        seed: int,
        *,
        context_length: int | None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._max_position = None if context_length is None else context_length - 1
        self._num_left = max(row.max_new_tokens for row in rows)
        self._num_new = 0
        self.num_forwards = 0
        device = model.device
        self._interval = 1 if device.type == "cpu" else _CHECK_INTERVAL
        self._uniforms_BT = draw_uniforms(
            rows, settings, seed, self._num_left, streams=(TOKEN_STREAM,), device=device
        )[:, 0]
        lengths = [len(row.prompt_ids) for row in rows]
        longest = max(lengths)
        self._cache = build_cache(model.config, longest + self._num_left)
        # Any id does for padding: it is masked.
        self._input_ids = torch.tensor(
            [[0] * (longest - len(row.prompt_ids)) + list(row.prompt_ids) for row in rows], device=device
        )
        lengths_B = torch.tensor(lengths, device=device)
        columns = torch.arange(longest + self._num_left, device=device)
        self._is_real_BS = columns >= longest - lengths_B[:, None]
        self._position_ids = (columns[:longest] - (longest - lengths_B)[:, None]).clamp(min=0)
        # Without padding no mask is needed, and attention kernels are faster without one.
        self._has_padding = min(lengths) < longest
        self._num_columns = longest

    def advance(self) -> list[list[int]]:
        """Run a few forwards; returns each row's new tokens."""
        chosen = []
        for _ in range(min(self._interval, self._num_left)):
            tokens_B = choose_tokens(self._next_logits(), self._settings, self._uniforms_BT[:, self._num_new])
            self._append(tokens_B)
            chosen.append(tokens_B)
            self._num_new += 1
            self._num_left -= 1
        self.num_forwards += len(chosen)
        new_ids: list[list[int]] = torch.stack(chosen, 1).tolist()
        return new_ids

    def keep(self, running: Sequence[int]) -> None:
        """Drop all rows but those at the given positions."""
        if len(running) == len(self._input_ids):
            return
        kept_B = torch.tensor(running, device=self._input_ids.device)
        self._cache.batch_select_indices(kept_B)
        self._input_ids = self._input_ids[kept_B]
        self._position_ids = self._position_ids[kept_B]
        self._is_real_BS = self._is_real_BS[kept_B]
        self._uniforms_BT = self._uniforms_BT[kept_B.to(self._uniforms_BT.device)]

    def count(self, num_tokens: int, counts: GenerationCounts) -> None:
        """Add a row's tokens: a forward each."""
        for _ in range(num_tokens):
            counts.add(1)

    def _next_logits(self) -> Tensor:
        """Run the model on the tokens it has not seen and return the last position's logits [B,V]."""
        mask = self._is_real_BS[:, : self._num_columns].long() if self._has_padding else None
        output = self._model(
            input_ids=self._input_ids,
            attention_mask=mask,
            position_ids=self._position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1]
        if self._has_padding and self._num_new == 0:
            # Broken weights give NaN to every row.
            is_nan_B = logits_BV.isnan().any(dim=1)
            if is_nan_B.any() and not is_nan_B.all():
                raise UserInputError(
                    f"{type(self._model).__name__} answers NaN where prompts are padded",
                    remedy="use batch size 1, or another dtype: eager attention in float64 takes no padding",
                )
        return logits_BV

    def _append(self, tokens_B: Tensor) -> None:
        """Make the chosen tokens the next input."""
        self._input_ids = tokens_B[:, None]
        self._position_ids = self._position_ids[:, -1:] + 1
        if self._max_position is not None:
            # A row that is full but not yet dropped keeps a position the model has; its tokens are discarded.
            self._position_ids = self._position_ids.clamp(max=self._max_position)
        self._num_columns += 1
