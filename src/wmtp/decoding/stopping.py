"""Where a generated row ends: an end-of-sequence token or a stop string, whichever comes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from transformers import PreTrainedTokenizerBase

# Tokens decoded before those of interest. Some tokenizers strip the space of the first token they decode
# (SentencePiece) or need the bytes before it to form a character.
_CONTEXT_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a row: how many of its tokens count, their text, and what ended it."""

    num_tokens: int
    text: str
    reason: Literal["eos", "stop"]


class EndFinder(Protocol):
    """Looks for the end of a row as its tokens arrive."""

    def text(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` add to the prompt."""
        ...

    def find(self, prompt_ids: Sequence[int], token_ids: Sequence[int], num_seen: int) -> Ending | None:
        """Return where the row ends, or None if it goes on; the first `num_seen` tokens do not end it."""
        ...


class TokenEndFinder:
    """Ends rows at tokens; there is no text.

    Args:
        eos_token_ids: tokens that end a row.
    """

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)

    def text(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """Return nothing: see the class."""
        return ""

    def find(self, prompt_ids: Sequence[int], token_ids: Sequence[int], num_seen: int) -> Ending | None:
        """Return the first end-of-sequence token after the first `num_seen`."""
        for position in range(num_seen, len(token_ids)):
            if token_ids[position] in self._eos_token_ids:
                return Ending(position + 1, "", "eos")
        return None


class StopFinder:
    """Looks for the end of a row as its tokens arrive.

    Args:
        tokenizer: turns tokens into text.
        eos_token_ids: tokens that end a row.
        stop: strings that end a row; empty strings are ignored.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._stop = tuple(string for string in stop if string)
        # A token carries at least one byte, so a string that a new token completes began at most this many
        # earlier.
        self._max_stop_bytes = max((len(string.encode()) for string in self._stop), default=0)

    def text(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` add to the prompt, without special tokens, uncut."""
        return self._added_text(list(prompt_ids[-_CONTEXT_TOKENS:]), list(token_ids))

    def find(self, prompt_ids: Sequence[int], token_ids: Sequence[int], num_seen: int) -> Ending | None:
        """Return where the row ends, or None if it goes on.

        Args:
            prompt_ids: the prompt, whose text is not searched.
            token_ids: all new tokens so far.
            num_seen: how many of them an earlier call has searched without result.
        """
        num_before_eos = next(
            (i for i in range(num_seen, len(token_ids)) if token_ids[i] in self._eos_token_ids), None
        )
        content_ids = list(token_ids[:num_before_eos])
        if self._stop and self._may_stop(prompt_ids, content_ids, num_seen):
            for num_tokens in range(num_seen + 1, len(content_ids) + 1):
                text = self.text(prompt_ids, content_ids[:num_tokens])
                positions = [position for string in self._stop if (position := text.find(string)) >= 0]
                if positions:
                    return Ending(num_tokens, text[: min(positions)], "stop")
        if num_before_eos is not None:
            return Ending(num_before_eos + 1, self.text(prompt_ids, content_ids), "eos")
        return None

    def _may_stop(self, prompt_ids: Sequence[int], content_ids: list[int], num_seen: int) -> bool:
        """Whether a stop string ends in the tokens after `num_seen`; decodes only as much as that needs."""
        start = max(0, num_seen - self._max_stop_bytes)
        context = (list(prompt_ids[-_CONTEXT_TOKENS:]) + content_ids[:start])[-_CONTEXT_TOKENS:]
        tail = self._added_text(context, content_ids[start:])
        return any(string in tail for string in self._stop)

    def _added_text(self, context: list[int], token_ids: list[int]) -> str:
        before = self._decode(context)
        whole = self._decode(context + token_ids)
        # `before` begins `whole` unless the context ends within a character that the new tokens complete.
        return whole[_common_prefix_length(before, whole) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def _common_prefix_length(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
