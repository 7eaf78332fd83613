"""How another model's tokenizer relates to the base's, and the same documents in its tokens.

same         every id means the same in both: the other model reads the base's ids
compatible   a few ids differ (Code Llama's infilling tokens, renamed reserved tokens): it reads the
             base's ids too, and data that uses one of the few is an error
characters   its own tokens of the same text; values are carried over by characters (`alignment`)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal

from transformers import PreTrainedTokenizerBase

from wmtp.components.data.examples import Feature
from wmtp.components.tokenizer.alignment import LocatedTokens, Span, locate_tokens, require_offsets
from wmtp.components.tokenizer.encoding import EncodedPiece
from wmtp.components.tokenizer.hf import HfTokenizer
from wmtp.exceptions import DataError, UserInputError

Relation = Literal["same", "compatible", "characters"]

# Families rename or append some hundred special tokens (256 of 128256 in Llama 3); a vocabulary that merely
# begins alike (the 256 bytes of all byte-level ones) must not pass for the same.
_MAX_FOREIGN_SHARE: Final = 0.02
# What no tokenizer of programs may change.
_PROBE: Final = "def F(x):\n\tif x:  # a  B\n        return [x, -1]\n\n\n"


@dataclass(frozen=True, slots=True)
class OtherDocument:
    """A document in the other tokenizer's tokens.

    Attributes:
        input_ids: its tokens of the text.
        spans: characters of each of them.
        base_spans: characters of the base's tokens, in the same text.
        is_known: which of the base's tokens the other model can say something about. It cannot about what it
            sees first and does not predict, nor about a token that stands for nothing in its text.
    """

    input_ids: list[int]
    spans: list[Span]
    base_spans: list[Span]
    is_known: list[bool]


@dataclass(frozen=True, slots=True)
class TokenizerPair:
    """The base's tokenizer and another model's, compared; see `compare_tokenizers`.

    Attributes:
        base: the tokenizer that the data is tokenised with.
        other: the other model's.
        relation: how they relate.
        foreign: where they are compatible, the base's ids that the other model reads as something else.
    """

    base: HfTokenizer
    other: HfTokenizer
    relation: Relation
    foreign: frozenset[int] = field(default=frozenset())

    def describe(self) -> str:
        """The relation in words."""
        if self.relation == "same":
            return "the same as the base's"
        if self.relation == "compatible":
            names = self.base.tokenizer.convert_ids_to_tokens(sorted(self.foreign)[:3])
            listed = ", ".join(map(repr, names))
            return (
                f"compatible: all but {len(self.foreign)} of the base's tokens ({listed}, ...) are the same"
            )
        return f"another one ({len(self.other.tokenizer)} tokens): values are carried over by characters"

    def require_shared(self, features: Iterable[Feature]) -> None:
        """Check that the data uses no token that the other model reads as something else.

        Raises:
            DataError: with the token, the row and both vocabularies.
        """
        if not self.foreign:
            return
        for feature in features:
            used = self.foreign.intersection(feature["input_ids"])
            if used:
                token_id = min(used)
                raise DataError(
                    f"{feature.get('row_id', 'a document')} has token {token_id} "
                    f"({self.base.tokenizer.convert_ids_to_tokens(token_id)!r}), which is not the same in "
                    f"both vocabularies: {describe_both(self.base, self.other)}",
                    remedy="leave such rows out, or choose a model with the base's vocabulary",
                )

    def read(
        self, documents: Sequence[Sequence[int]], targets: Sequence[Sequence[bool]]
    ) -> list[OtherDocument]:
        """Tokenise documents of the base's ids with the other tokenizer.

        It meets the texts as the base did: what the model learns is tokenised apart from what stands before
        it.

        Args:
            documents: ids, without padding.
            targets: which of them are targets.

        Raises:
            DataError: a text cannot be read back from the ids, or the other tokenizer has no tokens for it.
        """
        located = [self._locate(document) for document in documents]
        pieces = [_cut_at_seams(text, is_target) for text, is_target in zip(located, targets, strict=True)]
        encoded = self.other.encode_documents(pieces)
        return [
            self._document(ids, text, parts, texts)
            for ids, text, parts, texts in zip(documents, located, encoded, pieces, strict=True)
        ]

    def _locate(self, document: Sequence[int]) -> LocatedTokens:
        try:
            return locate_tokens(self.base.tokenizer, document)
        except DataError as error:
            raise DataError(f"{error}\nThe tokenizers are {describe_both(self.base, self.other)}") from error

    def _document(
        self, base_ids: Sequence[int], text: LocatedTokens, parts: list[EncodedPiece], pieces: list[str]
    ) -> OtherDocument:
        input_ids: list[int] = []
        spans: list[Span] = []
        at = 0
        for part, piece in zip(parts, pieces, strict=True):
            input_ids += part.input_ids
            spans += [(at + start, at + end) for start, end in part.spans]
            at += len(piece)
        unknown = self.other.tokenizer.unk_token_id
        if unknown is not None and unknown in input_ids:
            start, end = spans[input_ids.index(unknown)]
            name = self.other.tokenizer.name_or_path
            raise DataError(
                f"tokenizer {name!r} has no tokens for {text.text[start:end]!r}, and "
                f"texts cannot be aligned between {describe_both(self.base, self.other)}",
                remedy="choose a model whose tokenizer knows all bytes",
            )
        return self._with_ends(base_ids, text, input_ids, spans)

    def _with_ends(
        self, base_ids: Sequence[int], text: LocatedTokens, input_ids: list[int], spans: list[Span]
    ) -> OtherDocument:
        """Put the other tokenizer's beginning and end around the document, and say what it predicts."""
        bos, eos = self.other.bos_token_id, self.other.eos_token_id
        end = len(text.text)
        # The first token is not predicted; a beginning-of-sequence token takes that place where there is one.
        predicted_from = spans[0][1] if spans else end
        if bos is not None:
            input_ids, spans, predicted_from = [bos, *input_ids], [(0, 0), *spans], 0
        has_end = len(base_ids) > 0 and base_ids[-1] == self.base.tokenizer.eos_token_id
        if has_end and eos is not None:
            input_ids, spans = [*input_ids, eos], [*spans, (end, end)]
        is_known = [start < stop and start >= predicted_from for start, stop in text.spans]
        if has_end:
            is_known[-1] = eos is not None and len(input_ids) > 1
        return OtherDocument(input_ids, spans, text.spans, is_known)


def compare_tokenizers(
    base: HfTokenizer, other: HfTokenizer, *, num_rows: int | None = None
) -> TokenizerPair:
    """Tell how two tokenizers relate.

    Args:
        base: the tokenizer the data is tokenised with.
        other: that of the model that is asked about the data.
        num_rows: rows of the other model's embedding, where known; ids beyond them mean nothing to it.

    Raises:
        UserInputError: the other tokenizer does not fit its model, or texts cannot be aligned between both.
    """
    own = {token_id: token for token, token_id in base.tokenizer.get_vocab().items()}
    others = {token_id: token for token, token_id in other.tokenizer.get_vocab().items()}
    known = others if num_rows is None else {i: token for i, token in others.items() if i < num_rows}
    foreign = frozenset(token_id for token_id, token in own.items() if known.get(token_id) != token)
    if not foreign:
        return TokenizerPair(base, other, "same" if own == others else "compatible")
    ends = {base.bos_token_id, base.eos_token_id}
    if len(foreign) <= _MAX_FOREIGN_SHARE * len(own) and not foreign & ends:
        return TokenizerPair(base, other, "compatible", foreign)
    if num_rows is not None:
        require_rows(other, num_rows)
    for tokenizer in (base, other):
        _require_text_kept(tokenizer.tokenizer, describe_both(base, other))
    return TokenizerPair(base, other, "characters")


def require_rows(tokenizer: HfTokenizer, num_rows: int) -> None:
    """Check that every token has a row in the embedding; rows without a token are padding.

    Raises:
        UserInputError: with the first token that has none.
    """
    without = sorted((i, token) for token, i in tokenizer.tokenizer.get_vocab().items() if i >= num_rows)
    if without:
        token_id, token = without[0]
        raise UserInputError(
            f"tokenizer {tokenizer.tokenizer.name_or_path!r} has {len(without)} token(s) that the model does "
            f"not: the first is {token!r} with id {token_id}, and the embedding has {num_rows} rows",
            remedy="use the model's own tokenizer (model.tokenizer.path), or a model with as many rows",
        )


def describe_both(base: HfTokenizer, other: HfTokenizer) -> str:
    """Names and sizes of two tokenizers."""
    return " and ".join(
        f"{tokenizer.tokenizer.name_or_path!r} ({len(tokenizer.tokenizer)} tokens)"
        for tokenizer in (base, other)
    )


def _require_text_kept(tokenizer: PreTrainedTokenizerBase, both: str) -> None:
    try:
        require_offsets(tokenizer)
        text = locate_tokens(tokenizer, tokenizer(_PROBE, add_special_tokens=False)["input_ids"]).text
    except DataError as error:
        raise UserInputError(f"text cannot be aligned between tokenizers {both}: {error}") from error
    if text != _PROBE:
        raise UserInputError(
            f"text cannot be aligned between tokenizers {both}: {tokenizer.name_or_path!r} writes "
            f"{_PROBE!r} as {text!r}",
            remedy="choose a reference (model.ref_id) and a base whose tokenizers keep blanks and letters",
        )


def _cut_at_seams(text: LocatedTokens, is_target: Sequence[bool]) -> list[str]:
    """Pieces of a text, cut where targets begin and end; the first piece is empty only where the text is."""
    seams = [
        span[0]
        for span, before, after in zip(text.spans[1:], is_target[:-1], is_target[1:], strict=True)
        if before != after
    ]
    bounds = [0, *sorted({seam for seam in seams if 0 < seam < len(text.text)}), len(text.text)]
    return [text.text[start:end] for start, end in pairwise(bounds)]
