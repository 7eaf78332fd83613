"""Batched generation with a key-value cache.

The output of a row does not depend on which rows share its batch (up to rounding of the model's own
arithmetic): prompts are padded on the left and masked, positions count from each row's first real token, and
random draws are keyed by (seed, problem, sample, position). Rows that have ended are dropped from the batch
and from the cache.

Shapes: B rows still running, P padded prompt length, T new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from wmtp.decoding.cache import build_cache
from wmtp.decoding.sampling import SamplingSettings, choose_tokens, position_uniforms
from wmtp.decoding.stopping import StopFinder
from wmtp.exceptions import UserInputError

# Tokens generated between two looks at the host. Each look synchronises with the device and decodes text; a
# row that has ended costs the rest of its interval for nothing.
_CHECK_INTERVAL: Final = 4

FinishReason = Literal["eos", "stop", "length"]


class DecoderProtocol(Protocol):
    """What generation needs of a model; any Hugging Face decoder-only causal language model has it."""

    config: Any

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Return all submodules and the model itself."""
        ...

    def eval(self) -> Any:
        """Switch dropout off."""
        ...

    def __call__(self, **inputs: Any) -> Any:
        """Return an object with `logits`, given the usual keyword inputs."""
        ...


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote after one prompt.

    Attributes:
        token_ids: the tokens as generated, up to and including the end-of-sequence token, or the token that
            completed a stop string.
        text: their text without special tokens, cut before the earliest stop string.
        finish_reason: `eos`, `stop` (a stop string), or `length` (no room or no budget for more).
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason


@dataclass(slots=True)
class _Row:
    """A prompt being continued."""

    index: int
    prompt_ids: Sequence[int]
    key: tuple[int, int]
    max_new_tokens: int
    token_ids: list[int]


def generate(
    model: DecoderProtocol,
    prompts_ids: Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    keys: Sequence[tuple[int, int]] | None = None,
    eos_token_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 64,
    context_length: int | None = None,
    on_done: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; entry i of the result belongs to prompt i.

    Args:
        model: a causal language model; it is put in evaluation mode and back.
        prompts_ids: token ids of the prompts, each at least one token.
        tokenizer: turns tokens into text, for stop strings and `Generation.text`.
        max_new_tokens: budget of a row, the end-of-sequence token included.
        temperature, top_k, top_p, min_p: see `SamplingSettings`; temperature 0 is greedy.
        seed: of all draws.
        keys: (problem, sample) of every prompt; by default (index, 0). Rows with equal keys draw equal
            numbers.
        eos_token_ids: tokens that end a row; by default the tokenizer's.
        stop: strings that end a row wherever they lie relative to token boundaries; sought in the new text
            only.
        batch_size: rows that run together.
        context_length: prompt and new tokens together stay within it (positions, for models that have a
            limit); a prompt that leaves no room gets an empty `length` generation.
        on_done: called with (index, generation) as rows end.

    Raises:
        UserInputError: an argument is out of range, or a prompt is empty.
    """
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if max_new_tokens < 1 or batch_size < 1:
        raise UserInputError(
            f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}",
            remedy="raise them",
        )
    if eos_token_ids is None:
        eos_token_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    rows = _make_rows(prompts_ids, keys, max_new_tokens, context_length)
    results: list[Generation | None] = [None] * len(rows)

    def finish(row: _Row, generation: Generation) -> None:
        results[row.index] = generation
        if on_done is not None:
            on_done(row.index, generation)

    for row in rows:
        if row.max_new_tokens < 1:
            finish(row, Generation([], "", "length"))
    # Like lengths together waste little padding; the longest first shows at once whether memory suffices.
    runnable = sorted((row for row in rows if row.max_new_tokens >= 1), key=lambda row: -len(row.prompt_ids))
    finder = StopFinder(tokenizer, eos_token_ids, stop)
    with _evaluating(model):
        for start in range(0, len(runnable), batch_size):
            batch = runnable[start : start + batch_size]
            _generate_batch(model, batch, settings, seed, finder, context_length, finish)
    return [generation for generation in results if generation is not None]


def _make_rows(
    prompts_ids: Sequence[Sequence[int]],
    keys: Sequence[tuple[int, int]] | None,
    max_new_tokens: int,
    context_length: int | None,
) -> list[_Row]:
    keys = [(index, 0) for index in range(len(prompts_ids))] if keys is None else keys
    if len(keys) != len(prompts_ids):
        raise UserInputError(
            f"got {len(keys)} keys for {len(prompts_ids)} prompts",
            remedy="give one (problem, sample) a prompt",
        )
    rows = []
    for index, (prompt_ids, key) in enumerate(zip(prompts_ids, keys, strict=True)):
        if not prompt_ids:
            raise UserInputError(f"prompt {index} has no tokens", remedy="begin it with the BOS token")
        room = max_new_tokens if context_length is None else context_length - len(prompt_ids)
        rows.append(_Row(index, prompt_ids, key, min(max_new_tokens, room), []))
    return rows


@contextmanager
def _evaluating(model: DecoderProtocol) -> Iterator[None]:
    """Switch dropout off inside the block; every submodule gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.inference_mode()
def _generate_batch(
    model: DecoderProtocol,
    rows: list[_Row],
    settings: SamplingSettings,
    seed: int,
    finder: StopFinder,
    context_length: int | None,
    finish: Callable[[_Row, Generation], None],
) -> None:
    device = model.device
    num_steps = max(row.max_new_tokens for row in rows)
    state = _BatchState(model, rows, num_steps, context_length)
    uniforms_BT = _uniforms(rows, settings, seed, num_steps).to(device)
    for first_step in range(0, num_steps, _CHECK_INTERVAL):
        chosen = []
        for step in range(first_step, min(first_step + _CHECK_INTERVAL, num_steps)):
            tokens_B = choose_tokens(state.next_logits(), settings, uniforms_BT[:, step])
            state.append(tokens_B)
            chosen.append(tokens_B)
        running = []
        for position, (row, new_ids) in enumerate(zip(rows, torch.stack(chosen, 1).tolist(), strict=True)):
            num_seen = len(row.token_ids)
            row.token_ids.extend(new_ids[: row.max_new_tokens - num_seen])
            ending = finder.find(row.prompt_ids, row.token_ids, num_seen)
            if ending is not None:
                finish(row, Generation(row.token_ids[: ending.num_tokens], ending.text, ending.reason))
            elif len(row.token_ids) >= row.max_new_tokens:
                finish(row, Generation(row.token_ids, finder.text(row.prompt_ids, row.token_ids), "length"))
            else:
                running.append(position)
        if not running:
            return
        if len(running) < len(rows):
            rows = [rows[position] for position in running]
            kept_B = torch.tensor(running, device=device)
            uniforms_BT = uniforms_BT[kept_B]
            state.keep(kept_B)


def _uniforms(rows: Sequence[_Row], settings: SamplingSettings, seed: int, num_steps: int) -> Tensor:
    if settings.is_greedy:
        return torch.empty(len(rows), num_steps, dtype=torch.float32)
    return torch.from_numpy(np.stack([position_uniforms(seed, *row.key, num_steps) for row in rows]))


class _BatchState:
    """The model's inputs for the next forward of a batch, and its cache."""

    def __init__(
        self, model: DecoderProtocol, rows: Sequence[_Row], num_steps: int, context_length: int | None
    ) -> None:
        self._model = model
        self._max_position = None if context_length is None else context_length - 1
        device = model.device
        lengths = [len(row.prompt_ids) for row in rows]
        longest = max(lengths)
        self._cache = build_cache(model.config, longest + num_steps)
        # Any id does for padding: it is masked.
        self._input_ids = torch.tensor(
            [[0] * (longest - len(row.prompt_ids)) + list(row.prompt_ids) for row in rows], device=device
        )
        lengths_B = torch.tensor(lengths, device=device)
        columns = torch.arange(longest + num_steps, device=device)
        self._is_real_BS = columns >= longest - lengths_B[:, None]
        self._position_ids = (columns[:longest] - (longest - lengths_B)[:, None]).clamp(min=0)
        # Without padding no mask is needed, and attention kernels are faster without one.
        self._has_padding = min(lengths) < longest
        self._num_columns = longest

    def next_logits(self) -> Tensor:
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
        return logits_BV

    def append(self, tokens_B: Tensor) -> None:
        """Make the chosen tokens the next input."""
        self._input_ids = tokens_B[:, None]
        self._position_ids = self._position_ids[:, -1:] + 1
        if self._max_position is not None:
            # A row that is full but not yet dropped keeps a position the model has; its tokens are discarded.
            self._position_ids = self._position_ids.clamp(max=self._max_position)
        self._num_columns += 1

    def keep(self, kept_B: Tensor) -> None:
        """Drop all rows but those at the given positions."""
        self._cache.batch_select_indices(kept_B)
        self._input_ids = self._input_ids[kept_B]
        self._position_ids = self._position_ids[kept_B]
        self._is_real_BS = self._is_real_BS[kept_B]
