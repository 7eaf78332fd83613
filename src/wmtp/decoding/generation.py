"""Batched generation with a key-value cache, token by token or by self-speculation.

The output of a row does not depend on which rows share its batch (up to rounding of the model's own
arithmetic): positions count from each row's first token, and random draws are keyed by (seed, problem,
sample, position). Rows that have ended are dropped from the batch and from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from wmtp.decoding.counts import GenerationCounts
from wmtp.decoding.plain import PlainBatch
from wmtp.decoding.protocols import DecoderProtocol, DraftingModel
from wmtp.decoding.rows import Batch, Row
from wmtp.decoding.sampling import SamplingSettings
from wmtp.decoding.speculation import DraftPlan, SpeculativeBatch
from wmtp.decoding.stopping import EndFinder, StopFinder, TokenEndFinder
from wmtp.decoding.tree import DraftTree
from wmtp.exceptions import UserInputError

FinishReason = Literal["eos", "stop", "length"]


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


@dataclass(frozen=True, slots=True)
class Speculation:
    """How to draft.

    Attributes:
        model: the model with its heads; head 0 is the model that generates.
        widths: alternatives that heads 1, 2, ... draft; None for one each (a chain).
        token_ids: tokens that drafts are chosen among, such as `frequent_tokens` of the training data; None
            for all. Fewer make drafting cheaper where the vocabulary is large for the model; the output is
            the same.
    """

    model: DraftingModel
    widths: Sequence[int] | None = None
    token_ids: Sequence[int] | None = None


def generate(
    model: DecoderProtocol,
    prompts_ids: Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
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
    speculation: Speculation | None = None,
    counts: GenerationCounts | None = None,
    on_tokens: Callable[[int, Sequence[int]], None] | None = None,
    on_done: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; entry i of the result belongs to prompt i.

    Args:
        model: a causal language model; it is put in evaluation mode and back.
        prompts_ids: token ids of the prompts, each at least one token.
        tokenizer: turns tokens into text, for stop strings and `Generation.text`; None leaves the texts
            empty.
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
        speculation: let the model's heads draft; what is generated is what head 0 generates by itself, token
            for token when greedy and in distribution when sampled.
        counts: added to.
        on_tokens: called with (index, all new tokens so far) as rows grow.
        on_done: called with (index, generation) as rows end.

    Raises:
        UserInputError: an argument is out of range, a prompt is empty, the model cannot draft, or it cannot
            take padding.
    """
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if max_new_tokens < 1 or batch_size < 1:
        raise UserInputError(
            f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}",
            remedy="raise them",
        )
    finder = _build_finder(tokenizer, eos_token_ids, stop)
    rows = _make_rows(prompts_ids, keys, max_new_tokens, context_length)
    counts = GenerationCounts() if counts is None else counts
    results: list[Generation | None] = [None] * len(rows)

    def finish(row: Row, generation: Generation) -> None:
        results[row.index] = generation
        if on_done is not None:
            on_done(row.index, generation)

    for row in rows:
        if row.max_new_tokens < 1:
            finish(row, Generation([], "", "length"))
    # Like lengths together waste little padding; the longest first shows at once whether memory suffices.
    runnable = sorted((row for row in rows if row.max_new_tokens >= 1), key=lambda row: -len(row.prompt_ids))
    with _batch_builder(model, settings, seed, context_length, speculation) as build_batch:
        for start in range(0, len(runnable), batch_size):
            group = runnable[start : start + batch_size]
            _run_batch(
                group,
                build_batch(group),
                finder,
                counts or GenerationCounts(),
                on_tokens=on_tokens,
                finish=finish,
            )
    return [generation for generation in results if generation is not None]


def _build_finder(
    tokenizer: PreTrainedTokenizerBase | None, eos_token_ids: Sequence[int] | None, stop: Sequence[str]
) -> EndFinder:
    if tokenizer is None:
        if any(stop):
            raise UserInputError("stop strings need a tokenizer", remedy="pass tokenizer=")
        return TokenEndFinder(eos_token_ids or ())
    if eos_token_ids is None:
        eos_token_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return StopFinder(tokenizer, eos_token_ids, stop)


def _make_rows(
    prompts_ids: Sequence[Sequence[int]],
    keys: Sequence[tuple[int, int]] | None,
    max_new_tokens: int,
    context_length: int | None,
) -> list[Row]:
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
        rows.append(Row(index, prompt_ids, key, min(max_new_tokens, room), []))
    return rows


@contextmanager
def _batch_builder(
    model: DecoderProtocol,
    settings: SamplingSettings,
    seed: int,
    context_length: int | None,
    speculation: Speculation | None,
) -> Iterator[Callable[[list[Row]], Batch]]:
    """Make the model ready inside the block; yields what makes a batch of rows."""
    if speculation is None:
        with torch.inference_mode(), _evaluating(model):
            yield lambda rows: PlainBatch(model, rows, settings, seed, context_length=context_length)
        return
    drafter = speculation.model
    widths = (1,) * (drafter.horizon - 1) if speculation.widths is None else speculation.widths
    with torch.inference_mode(), _evaluating(drafter), drafter.decoding_session() as session:
        plan = DraftPlan(session, DraftTree.of_widths(widths), speculation.token_ids)
        yield lambda rows: SpeculativeBatch(plan, rows, settings, seed, context_length=context_length)


@contextmanager
def _evaluating(model: DecoderProtocol | DraftingModel) -> Iterator[None]:
    """Switch dropout off inside the block; every submodule gets its mode back."""
    training = [module for module in model.modules() if module.training]
    if not training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _run_batch(
    rows: list[Row],
    batch: Batch,
    finder: EndFinder,
    counts: GenerationCounts,
    *,
    on_tokens: Callable[[int, Sequence[int]], None] | None,
    finish: Callable[[Row, Generation], None],
) -> None:
    """Continue rows until each has ended."""
    while rows:
        running = []
        for position, (row, new_ids) in enumerate(zip(rows, batch.advance(), strict=True)):
            num_seen = len(row.token_ids)
            row.token_ids.extend(new_ids[: row.max_new_tokens - num_seen])
            ending = finder.find(row.prompt_ids, row.token_ids, num_seen)
            if ending is not None:
                del row.token_ids[ending.num_tokens :]
            batch.count(len(row.token_ids) - num_seen, counts)
            if on_tokens is not None:
                on_tokens(row.index, row.token_ids)
            if ending is not None:
                finish(row, Generation(row.token_ids, ending.text, ending.reason))
            elif len(row.token_ids) >= row.max_new_tokens:
                finish(row, Generation(row.token_ids, finder.text(row.prompt_ids, row.token_ids), "length"))
            else:
                running.append(position)
        if running:
            batch.keep(running)
        rows = [rows[position] for position in running]
    counts.num_forwards += batch.num_forwards
