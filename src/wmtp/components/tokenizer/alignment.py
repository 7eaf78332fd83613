"""Values of one tokenizer's tokens, carried over to another tokenizer's tokens of the same text.

Rewards and log-losses add up along a text, so a value belongs to the characters that its token stands for. A
value is spread evenly over the characters of its span, and a target token takes what lies on its own:

    text            r  e  t  u  r  n
    values            6.0   |  2.0     spans (0, 4) (4, 6): 1.5 on each of the first, 1.0 on the others
    carried over      3.0 | 4.0 | 1.0  spans (0, 2) (2, 5) (5, 6)

The total is preserved. Where several tokens of a side share a character (the bytes of one), each owns an
equal part of it, in their order. Special tokens that stand for no characters (`start == end`) exchange values
among themselves: what stands at one place of the text goes to what stands there on the other side, in order.
A value that finds nothing at its place goes to the next token, and at the end of the text to the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from wmtp.exceptions import DataError

# Characters of a token: start, end; equal for a token that stands for no characters.
Span: TypeAlias = tuple[int, int]
_Floats: TypeAlias = NDArray[np.float64]
_Integers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LocatedTokens:
    """A document's text, and the characters of it that each token stands for.

    Attributes:
        text: without the beginning- and end-of-sequence tokens around the document.
        spans: one a token, in order. The bytes of a character that is cut off at the end have no characters.
    """

    text: str
    spans: list[Span]


def locate_tokens(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> LocatedTokens:
    """Text of a document and the span of each token, from the ids alone.

    The text is not tokenised again: ids that a tokenizer would not give for the whole text, because prompt
    and completion were tokenised apart, keep their own spans. A beginning-of-sequence token in front and an
    end-of-sequence token at the end stand for no characters; other special tokens (those of a chat template)
    are characters of the text as they are spelled.

    Args:
        tokenizer: a fast tokenizer, the one that made the ids.
        input_ids: one document, without padding.

    Raises:
        DataError: the tokenizer is not a fast one, or a token is the unknown token, whose text is lost.
    """
    require_offsets(tokenizer)
    first, last = _without_ends(tokenizer, input_ids)
    inner = input_ids[first:last]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in inner:
        raise DataError(
            f"the text of a document is lost: tokenizer {tokenizer.name_or_path!r} has no tokens for a part "
            f"of it and wrote its unknown token {tokenizer.unk_token!r}",
            remedy="use a tokenizer that knows all bytes (byte-level, or with byte fallback)",
        )
    backend = tokenizer.backend_tokenizer
    stream = DecodeStream(skip_special_tokens=False)
    spans: list[Span] = [(0, 0)] * first
    chunks: list[str] = []
    at = num_open = 0
    for token_id in inner:
        chunk = stream.step(backend, token_id)
        num_open += 1
        # Nothing comes out until the bytes of a character are complete; its tokens then share what comes.
        if chunk is not None:
            spans += [(at, at + len(chunk))] * num_open
            chunks.append(chunk)
            at += len(chunk)
            num_open = 0
    spans += [(at, at)] * (num_open + len(input_ids) - last)
    return LocatedTokens("".join(chunks), spans)


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `DataError` for a tokenizer that cannot say which characters its tokens stand for."""
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} cannot say which characters its tokens stand for",
            remedy="use a fast tokenizer (tokenizer.json), or model.tokenizer.type: raw for a raw file",
        )


def _without_ends(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> tuple[int, int]:
    """Positions of the first and of one past the last token that stand for text."""
    first, last = 0, len(input_ids)
    if last and tokenizer.bos_token_id is not None and input_ids[0] == tokenizer.bos_token_id:
        first = 1
    if last > first and tokenizer.eos_token_id is not None and input_ids[last - 1] == tokenizer.eos_token_id:
        last -= 1
    return first, last


def carry_over(values: Sequence[float], from_spans: Sequence[Span], to_spans: Sequence[Span]) -> list[float]:
    """Carry additive values (rewards, log-losses) over to other tokens of the same text.

    Args:
        values: one for each of `from_spans`.
        from_spans: characters (start, end) of the tokens that have the values; starts and ends ascending.
        to_spans: characters of the tokens that take them, ascending too.

    Returns:
        One value for each of `to_spans`; their sum is that of `values`.

    Raises:
        DataError: numbers of values and spans differ, spans are not in order, or no token takes the values.
    """
    if len(values) != len(from_spans):
        raise DataError(f"{len(values)} values cannot belong to {len(from_spans)} tokens")
    if not len(from_spans):
        return [0.0] * len(to_spans)
    if not len(to_spans):
        raise DataError("values of tokens cannot be carried over to a document without tokens")
    if list(from_spans) == list(to_spans):
        return [float(value) for value in values]
    owners, starts, ends, shares = _parts(from_spans)
    # The sum of all values up to a place of the text: linear within each part, constant between them.
    masses = np.cumsum(np.asarray(values, dtype=np.float64)[owners] * shares)
    places = np.stack((starts, ends), axis=1).reshape(-1)
    sums = np.stack((np.concatenate(([0.0], masses[:-1])), masses), axis=1).reshape(-1)
    takers, _, take_ends, _ = _parts(to_spans)
    # A token takes all that lies behind the token before it, so that nothing between two tokens is lost.
    reached = np.interp(take_ends, places, sums)
    reached[-1] = masses[-1]
    taken = np.bincount(takers, weights=np.diff(reached, prepend=0.0), minlength=len(to_spans))
    return [float(value) for value in taken]


def _parts(spans: Sequence[Span]) -> tuple[_Integers, _Floats, _Floats, _Floats]:
    """Cut spans into parts that do not overlap: one a token and character, or a token of no characters.

    The place of character c is [2c + 1, 2c + 2]; tokens of no characters before it are at [2c, 2c + 1].

    Returns:
        Token, start, end and share (of the token's value) of each part, by place.
    """
    bounds = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    starts, ends = bounds[:, 0], bounds[:, 1]
    if (ends < starts).any() or (starts < 0).any() or (np.diff(bounds, axis=0) < 0).any():
        raise DataError(f"spans of tokens are not in the order of the text: {list(spans)[:8]}")
    lengths = ends - starts
    counts = np.maximum(lengths, 1)
    owners = np.repeat(np.arange(len(bounds)), counts)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    cells = np.where(lengths[owners] == 0, 2 * starts[owners], 2 * (starts[owners] + within) + 1)
    order = np.argsort(cells, kind="stable")
    owners, cells = owners[order], cells[order]
    _, firsts, num_sharing = np.unique(cells, return_index=True, return_counts=True)
    rank = np.arange(len(cells)) - np.repeat(firsts, num_sharing)
    sharing = np.repeat(num_sharing, num_sharing)
    return owners, cells + rank / sharing, cells + (rank + 1) / sharing, 1.0 / counts[owners]
