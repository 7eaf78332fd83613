"""Writing on from a prompt with a checkpoint, as `wmtp generate` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from transformers.utils.logging import disable_progress_bar

from wmtp.components.data.unified_loader import UnifiedDataLoader
from wmtp.components.tokenizer import HfTokenizer
from wmtp.decoding import Generation, GenerationCounts, Speculation, frequent_tokens, generate
from wmtp.exceptions import UserInputError
from wmtp.modeling.formats.configuration import context_length
from wmtp.objectives.labels import IGNORE_INDEX
from wmtp.pipelines.export_source import read_source

# Examples that are read to learn which tokens are frequent.
_MAX_EXAMPLES: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to write on.

    Attributes:
        max_new_tokens: budget, the end-of-sequence token included.
        temperature, top_k, top_p, min_p: see `wmtp.decoding.SamplingSettings`; temperature 0 is greedy.
        seed: of all draws.
        stop: strings that end the text and are not part of it.
        speculative: let the heads draft.
        widths: alternatives that heads 1, 2, ... draft; None for one each.
        draft_from: dataset (file, directory, URL or built-in id) in whose completions a token must occur to
            be drafted; None drafts any token.
        draft_vocabulary: only its so many most frequent tokens.
        trust_remote_code: let the model run code that comes with it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()
    speculative: bool = False
    widths: Sequence[int] | None = None
    draft_from: str | None = None
    draft_vocabulary: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOutputs:
    """What was written.

    Attributes:
        generation: the new tokens and their text.
        counts: forwards, and how often drafts stood.
        seconds: wall-clock time of generating.
    """

    generation: Generation
    counts: GenerationCounts
    seconds: float


def run_generation_pipeline(
    checkpoint: str,
    prompt: str,
    *,
    options: GenerationOptions | None = None,
    on_text: Callable[[str], None] | None = None,
) -> GenerationOutputs:
    """Write on from `prompt`.

    Args:
        checkpoint: a run folder, a `step-N` folder, an export, a model folder or id.
        prompt: text, encoded as in training.
        options: of sampling and drafting.
        on_text: called with pieces of text as they become certain.

    Raises:
        UserInputError: an option is out of range, the prompt leaves no room, the heads cannot draft, or the
            checkpoint has no tokenizer.
        DataError: the dataset to draft from cannot be read.
        CheckpointError: there is no checkpoint.
        ModelLoadError: it cannot be read.
    """
    options = options or GenerationOptions()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    _check_drafting(options)
    # 1. The model on the fastest device there is, and its tokenizer.
    loaded = read_source(checkpoint, trust_remote_code=options.trust_remote_code).load(None)
    if loaded.tokenizer is None:
        raise UserInputError(
            f"{checkpoint} has no tokenizer, so it cannot read a prompt",
            remedy="put the tokenizer's files beside the model",
        )
    model = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = loaded.tokenizer.tokenizer
    # 2. The prompt.
    prompt_ids = loaded.tokenizer.encode_prompt(prompt)
    limit = context_length(model.config)
    if limit is not None and len(prompt_ids) >= limit:
        raise UserInputError(
            f"the prompt has {len(prompt_ids)} tokens and the model {limit} positions",
            remedy="shorten the prompt",
        )
    # 3. How to draft.
    speculation = None
    if options.speculative:
        token_ids = None
        if options.draft_from is not None:
            token_ids = tokens_to_draft(options.draft_from, options.draft_vocabulary, loaded.tokenizer)
        speculation = Speculation(model, options.widths, token_ids)
    # 4. Write.
    counts = GenerationCounts()
    stream = _TextStream(
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), options.stop, on_text
    )
    start = time.perf_counter()
    (generation,) = generate(
        model.causal_lm,
        [prompt_ids],
        tokenizer=tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        stop=options.stop,
        context_length=limit,
        speculation=speculation,
        counts=counts,
        on_tokens=lambda _, token_ids: stream.update(prompt_ids, token_ids),
    )
    seconds = time.perf_counter() - start
    stream.finish(generation.text)
    return GenerationOutputs(generation=generation, counts=counts, seconds=seconds)


def _check_drafting(options: GenerationOptions) -> None:
    given = {
        "--tree": options.widths,
        "--draft-from": options.draft_from,
        "--draft-vocabulary": options.draft_vocabulary,
    }
    names = [name for name, value in given.items() if value is not None]
    if names and not options.speculative:
        raise UserInputError(
            f"{names[0]} says how to draft, and nothing is drafted without speculation",
            remedy="add --speculative, or leave it out",
        )
    if options.draft_vocabulary is not None and options.draft_from is None:
        raise UserInputError(
            "--draft-vocabulary takes the most frequent tokens of a dataset, and none is named",
            remedy="add --draft-from with the data that the model was trained on, or text like it",
        )
    if options.draft_vocabulary is not None and options.draft_vocabulary < 1:
        raise UserInputError(
            f"--draft-vocabulary must be at least 1, got {options.draft_vocabulary}", remedy="raise it"
        )


def tokens_to_draft(source: str, limit: int | None, tokenizer: HfTokenizer) -> list[int]:
    """Return the tokens that occur in a dataset's completions, the most frequent first, `limit` at most."""
    features, _ = tokenizer.tokenize_chunk(UnifiedDataLoader().load(source, limit=_MAX_EXAMPLES))
    targets = ([label for label in each["labels"] if label != IGNORE_INDEX] for each in features)
    return frequent_tokens(targets, limit)


class _TextStream:
    """Hands on text as it becomes certain: neither the beginning of a stop string nor half a character.

    Args:
        decode: turns tokens into text.
        stop: strings that end the text.
        on_text: gets the pieces.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str],
        on_text: Callable[[str], None] | None,
    ) -> None:
        self._decode = decode
        self._stop = stop
        self._on_text = on_text
        self._shown = ""

    def update(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """Show what the tokens so far make certain."""
        if self._on_text is None:
            return
        before = self._decode(list(prompt_ids[-8:]))
        whole = self._decode([*prompt_ids[-8:], *token_ids])
        if whole.startswith(before):
            self._show(self._certain(whole[len(before) :]))

    def finish(self, text: str) -> None:
        """Show the rest of the final text."""
        self._show(text)

    def _certain(self, text: str) -> str:
        # A character whose bytes are not complete decodes to this one.
        text = text.rstrip("\ufffd")
        end = len(text)
        for stop in self._stop:
            if (found := text.find(stop)) >= 0:
                end = min(end, found)
            for length in range(1, len(stop)):
                if text.endswith(stop[:length]):
                    end = min(end, len(text) - length)
        return text[:end]

    def _show(self, text: str) -> None:
        if self._on_text is not None and len(text) > len(self._shown) and text.startswith(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text
