"""Pieces of text to token ids, so that the seam between prompt and completion is always a token boundary.

Each piece is tokenised by itself and the ids are concatenated. That is what a model meets when it generates:
the prompt's tokens are fixed before the first token of the completion exists. Tokenising the whole text could
merge characters from both sides into one token, which no prompt would ever end in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from wmtp.exceptions import DataError

# Put before a piece that continues a text, then cut off again; the first that does not merge with the piece.
_ANCHORS = ("\n", ":", "x")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document: whether the model learns to write it, and how much it counts.

    `weight` is None where nothing was said, which counts as 1.0.
    """

    text: str
    is_target: bool
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class EncodedPiece:
    """Token ids of a piece and, for each, the characters of the piece it stands for (start, end)."""

    input_ids: list[int]
    spans: list[tuple[int, int]]


class PieceEncoder:
    """Tokenises pieces without special tokens of the tokenizer's own.

    Attributes:
        bos_token_id: put at the start of a document; None where the tokenizer has none or does not add it.
        eos_token_id: put at the end of a document; None where the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        probe_ids = tokenizer("x")["input_ids"]
        bos = tokenizer.bos_token_id
        self.bos_token_id: int | None = bos if bos is not None and probe_ids[:1] == [bos] else None
        self.eos_token_id: int | None = tokenizer.eos_token_id
        # SentencePiece tokenizers put a blank before every text. Inside a document it would be a real one:
        # the completion of an indented line would be learned, and generated, with one blank too many.
        plain_ids = self._encode(["x"])[0].input_ids
        self._adds_blank = tokenizer.decode(plain_ids * 2, clean_up_tokenization_spaces=False) != "xx"

    def encode(self, texts: Sequence[str]) -> list[EncodedPiece]:
        """Tokenise texts that begin a document."""
        return self._encode(texts)

    def encode_continuations(self, texts: Sequence[str]) -> list[EncodedPiece]:
        """Tokenise texts that something stands before: no blank is added that the text does not have."""
        if not self._adds_blank:
            return self._encode(texts)
        results: list[EncodedPiece | None] = [None] * len(texts)
        open_indices = list(range(len(texts)))
        for anchor in _ANCHORS:
            anchor_ids = self._encode([anchor])[0].input_ids
            if self._tokenizer.unk_token_id in anchor_ids:
                continue  # what is unknown may be fused with what follows, and cut off with it
            anchored = self._encode([anchor + texts[index] for index in open_indices])
            for index, encoded in zip(open_indices, anchored, strict=True):
                if encoded.input_ids[: len(anchor_ids)] == anchor_ids:
                    results[index] = _without_anchor(encoded, len(anchor_ids), len(anchor))
            open_indices = [index for index in open_indices if results[index] is None]
        if open_indices:
            raise DataError(
                f"the tokenizer cannot tokenise {texts[open_indices[0]][:60]!r} as a continuation",
                remedy="use a tokenizer that does not merge text across line breaks",
            )
        return [encoded for encoded in results if encoded is not None]

    def _encode(self, texts: Sequence[str]) -> list[EncodedPiece]:
        if not texts:
            return []
        is_fast = self._tokenizer.is_fast
        output = self._tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=is_fast, verbose=False
        )
        ids: list[list[int]] = output["input_ids"]
        spans = output["offset_mapping"] if is_fast else [[]] * len(ids)
        return [EncodedPiece(list(i), list(s)) for i, s in zip(ids, spans, strict=True)]


def _without_anchor(encoded: EncodedPiece, num_tokens: int, num_characters: int) -> EncodedPiece:
    spans = [
        (max(start - num_characters, 0), max(end - num_characters, 0))
        for start, end in encoded.spans[num_tokens:]
    ]
    return EncodedPiece(encoded.input_ids[num_tokens:], spans)


def weights_from_spans(
    spans: Sequence[tuple[int, int]], weight_spans: Sequence[dict[str, float]]
) -> list[float]:
    """One weight a token: the mean weight of its characters, 1.0 where no weight span covers them.

    Args:
        spans: characters of each token (start, end) in the document's text.
        weight_spans: `start end weight` by characters of the same text, not overlapping.
    """
    weights = []
    for start, end in spans:
        # Tokens that are some bytes of one character report that character's span; empty spans weigh 1.
        total = float(end - start)
        for span in weight_spans:
            overlap = min(end, span["end"]) - max(start, span["start"])
            if overlap > 0:
                total += overlap * (span["weight"] - 1.0)
        weights.append(total / (end - start) if end > start else 1.0)
    return weights
