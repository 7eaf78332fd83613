"""Hugging Face tokenizers as a component: examples to features."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from wmtp.components.base import Component
from wmtp.components.data.arguments import settings_of
from wmtp.components.data.examples import Example, Feature, TokenizedCount
from wmtp.components.data.formats import missing_fields, recognise
from wmtp.components.registry import tokenizer_registry
from wmtp.components.tokenizer.chat import chat_pieces
from wmtp.components.tokenizer.encoding import EncodedPiece, Piece, PieceEncoder, weights_from_spans
from wmtp.components.tokenizer.raw_files import (
    RAW_FILES,
    find_only_raw_file,
    load_raw_tokenizer,
    read_sentencepiece_model,
)
from wmtp.components.tokenizer.remote import TOKENIZER_FILES, local_path
from wmtp.evaluation.microcode import build_tokenizer
from wmtp.exceptions import DataError, ModelLoadError, UserInputError
from wmtp.modeling.formats.sources import locate_source
from wmtp.objectives import IGNORE_INDEX
from wmtp.settings.config import S3Settings

logger = logging.getLogger(__name__)

BUILTIN_PREFIX = "builtin:micro-"
# Examples tokenised in one call: enough to keep the tokenizer's threads busy.
_CHUNK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """Settings of the tokenizer component.

    Attributes:
        tokenizer: a loaded Hugging Face tokenizer; takes precedence over `path`.
        path: directory, hub id, `s3://` folder, or one of the built-in models (`builtin:micro-...`).
        max_length: tokens an example is cut to, special tokens included.
        train_on_prompt: prompt tokens count in the loss too.
        trust_remote_code: let the tokenizer run code from its repository.
        s3: access to S3, for an `s3://` path.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    path: str | None = None
    max_length: int = 2048
    train_on_prompt: bool = False
    trust_remote_code: bool = False
    s3: S3Settings | None = None


@dataclass(frozen=True, slots=True)
class TokenizerContext:
    """What one `run` tokenises."""

    examples: Sequence[Example]


@tokenizer_registry.register("hf", version="1.0.0", description="any Hugging Face tokenizer")
class HfTokenizer(Component[TokenizerContext, list[Feature]]):
    """Turns examples into features with a Hugging Face tokenizer.

    A document is: beginning-of-sequence token where the tokenizer has one and adds it itself; prompt;
    completion; end-of-sequence token, a target, so that the model learns to stop. Prompt and completion are
    tokenised apart (see `encoding`). In a chat the template writes all of this. Special tokens spelled out in
    the data become those tokens.

    Attributes:
        tokenizer: the Hugging Face object.
        sentencepiece_model: contents of the `tokenizer.model` it was read from or that lay beside it; None
            where there was none.
    """

    def __init__(self, settings: TokenizerSettings | Mapping[str, Any]) -> None:
        settings = settings_of(TokenizerSettings, settings)
        if settings.max_length < 2:
            raise UserInputError(
                f"max_length is {settings.max_length}", remedy="use at least 2: a token, and one to predict"
            )
        self.settings = settings
        self.sentencepiece_model: bytes | None = None
        self.tokenizer = settings.tokenizer if settings.tokenizer is not None else self._load_from_anywhere()
        self._encoder = PieceEncoder(self.tokenizer)

    def _load_from_anywhere(self) -> PreTrainedTokenizerBase:
        path = require_path(self.settings)
        with local_path(path, self.settings.s3) as local:
            tokenizer = self.load(replace(self.settings, path=local))
            if not path.startswith(BUILTIN_PREFIX):
                self.sentencepiece_model = read_sentencepiece_model(local)
        if local != path:
            tokenizer.name_or_path = path
        return tokenizer

    @staticmethod
    def load(settings: TokenizerSettings) -> PreTrainedTokenizerBase:
        """Load the tokenizer at `settings.path`; a raw file is converted where there is nothing else."""
        path = require_path(settings)
        if path.startswith(BUILTIN_PREFIX):
            return build_tokenizer()
        raw_file = find_only_raw_file(path)
        if raw_file is not None:
            if raw_file != Path(path).expanduser():
                logger.info("%s has no Hugging Face tokenizer; %s is converted", path, raw_file)
            return load_raw_tokenizer(raw_file)
        # Says at once, and better than transformers, that a folder or repository is not there.
        source = locate_source(path)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, trust_remote_code=settings.trust_remote_code
            )
        except (OSError, ValueError, ImportError) as error:
            names = source.names()
            reason = (
                str(error).splitlines()[0]
                if names.intersection(TOKENIZER_FILES)
                else f"it has none (it holds: {', '.join(sorted(names)[:8]) or 'no files'})"
            )
            raise ModelLoadError(
                f"no tokenizer can be loaded from {path!r}: {reason}",
                remedy="give a directory or hub id with tokenizer.json or tokenizer.model "
                "(model.tokenizer.path where the model has none)",
            ) from error
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer as a Hugging Face one, and the SentencePiece file it came with, if any."""
        self.tokenizer.save_pretrained(folder)
        self.save_sentencepiece_model(folder)

    def save_sentencepiece_model(self, folder: str | Path) -> None:
        """Write the SentencePiece file alone, `tokenizer.model`, if there is one."""
        if self.sentencepiece_model is not None:
            (Path(folder) / RAW_FILES[0]).write_bytes(self.sentencepiece_model)

    def run(self, context: TokenizerContext) -> list[Feature]:
        """Tokenise the context's examples; see `tokenize_dataset`."""
        return self.tokenize_dataset(context.examples)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids a model is given to generate from: exactly those that precede the completion in training."""
        ids = self._encoder.encode([prompt])[0].input_ids
        return self._with_bos(ids)

    @property
    def bos_token_id(self) -> int | None:
        """What stands at the start of a document; None where the tokenizer puts nothing there."""
        return self._encoder.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """What stands at the end of a document; None where the tokenizer has no such token."""
        return self._encoder.eos_token_id

    def encode_documents(self, documents: Sequence[Sequence[str]]) -> list[list[EncodedPiece]]:
        """Tokenise documents of one or more pieces of text each, without tokens at start and end."""
        first = iter(self._encoder.encode([pieces[0] for pieces in documents]))
        rest = iter(
            self._encoder.encode_continuations([piece for pieces in documents for piece in pieces[1:]])
        )
        return [[next(first), *islice(rest, len(pieces) - 1)] for pieces in documents]

    def tokenize_dataset(self, dataset: Iterable[Example | Mapping[str, Any]]) -> list[Feature]:
        """Tokenise examples, or plain rows that are recognised as the data loader does.

        Examples longer than `max_length` are cut on the right, and those left without a target are dropped; a
        warning counts both.

        Returns:
            Features with `input_ids`, `labels` (-100 on what is no target), `row_id`, and where the example
            has them `reward` and `weights` (one a token).

        Raises:
            DataError: weights that do not fit the tokens, a chat that cannot be rendered, or nothing left.
        """
        features: list[Feature] = []
        count = TokenizedCount()
        for chunk in _chunks(dataset):
            kept, counted = self.tokenize_chunk(chunk)
            features += kept
            count += counted
        self.report(count)
        return features

    def tokenize_chunk(self, examples: Sequence[Example]) -> tuple[list[Feature], TokenizedCount]:
        """Tokenise a part of a dataset as `tokenize_dataset` does, and count what was cut and dropped.

        Each example is tokenised by itself, so that it does not matter which ones share a call. `report` says
        what was counted once the whole dataset has been seen.
        """
        features: list[Feature] = []
        num_cut = 0
        for feature in self._features(examples):
            is_cut = len(feature["input_ids"]) > self.settings.max_length
            num_cut += is_cut
            if is_cut:
                feature = _cut(feature, self.settings.max_length)
            # Nothing predicts a document's first token.
            if any(label != IGNORE_INDEX for label in feature["labels"][1:]):
                features.append(feature)
        return features, TokenizedCount(len(examples), num_cut, len(examples) - len(features))

    def report(self, count: TokenizedCount) -> None:
        """Warn of examples that were cut or dropped, and of a model that will not learn to stop.

        Raises:
            DataError: nothing is left.
        """
        if self._encoder.eos_token_id is None:
            logger.warning(
                "tokenizer %r has no end-of-sequence token, so the model does not learn to stop; "
                "set eos_token in its tokenizer_config.json",
                self.tokenizer.name_or_path,
            )
        if count.num_cut or count.num_dropped:
            logger.warning(
                "%d of %d examples are longer than %d tokens and were cut; %d have no target left and were "
                "dropped; raise data.train.max_length to keep them whole",
                count.num_cut,
                count.num_examples,
                self.settings.max_length,
                count.num_dropped,
            )
        if count.num_examples == count.num_dropped:
            raise DataError(
                f"none of {count.num_examples} examples has a token to learn in its first "
                f"{self.settings.max_length} tokens",
                remedy="raise data.train.max_length, or check that prompts are not longer than it",
            )

    def _features(self, examples: Sequence[Example]) -> list[Feature]:
        """Features of some examples, not yet cut to length."""
        documents = [self._pieces(example) for example in examples]
        encoded = self.encode_documents([[piece.text for piece in pieces] for pieces in documents])
        return [
            self._feature(example, pieces, parts)
            for example, pieces, parts in zip(examples, documents, encoded, strict=True)
        ]

    def _pieces(self, example: Example) -> list[Piece]:
        pieces = (
            [Piece(example.prompt, is_target=False), Piece(example.completion, is_target=True)]
            if example.messages is None
            else chat_pieces(example, self.tokenizer)
        )
        # The first piece that has text begins the document; after an empty one it would be a continuation.
        return [piece for piece in pieces if piece.text] or pieces[:1]

    def _feature(self, example: Example, pieces: list[Piece], encoded: list[EncodedPiece]) -> Feature:
        input_ids: list[int] = []
        labels: list[int] = []
        for piece, part in zip(pieces, encoded, strict=True):
            input_ids += part.input_ids
            is_target = piece.is_target or self.settings.train_on_prompt
            labels += part.input_ids if is_target else [IGNORE_INDEX] * len(part.input_ids)
        feature: Feature = {"input_ids": input_ids, "labels": labels, "row_id": example.row_id}
        if example.weight is not None:
            feature["weights"] = self._weights(example, pieces, encoded)
        if example.reward is not None:
            feature["reward"] = example.reward
        return feature if example.messages is not None else self._with_special_tokens(feature)

    def _weights(self, example: Example, pieces: list[Piece], encoded: list[EncodedPiece]) -> list[float]:
        """One weight a token of the text, special tokens not yet there."""
        num_tokens = sum(len(part.input_ids) for part in encoded)
        weight = example.weight
        if example.messages is not None:
            parts = zip(pieces, encoded, strict=True)
            return [
                1.0 if piece.weight is None else piece.weight for piece, part in parts for _ in part.input_ids
            ]
        if not isinstance(weight, list):
            return [1.0 if weight is None else weight] * num_tokens
        spans = [item for item in weight if isinstance(item, dict)]
        if spans:
            if not self.tokenizer.is_fast:
                raise DataError(
                    f"{example.row_id} has weights by character, which tokenizer "
                    f"{self.tokenizer.name_or_path!r} cannot place",
                    remedy="use a fast tokenizer, or weights per token",
                )
            return weights_from_spans(_document_spans(pieces, encoded), spans)
        numbers = [item for item in weight if not isinstance(item, dict)]
        if len(numbers) != num_tokens:
            raise DataError(
                f"{example.row_id} has {len(numbers)} weights, but prompt and completion have {num_tokens} "
                "tokens (special tokens not counted)",
                remedy="give one weight a token, or weights by character: start, end, weight",
            )
        return numbers

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self._encoder.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _with_special_tokens(self, feature: Feature) -> Feature:
        """Put beginning and end around a document that does not have them; both weigh 1."""
        before = len(self._with_bos(list(feature["input_ids"]))) - len(feature["input_ids"])
        bos, eos = self._encoder.bos_token_id, self._encoder.eos_token_id
        head = [bos] if before and bos is not None else []
        tail = [eos] if eos is not None and list(feature["input_ids"][-1:]) != [eos] else []
        result: Feature = {
            **feature,
            "input_ids": [*head, *feature["input_ids"], *tail],
            "labels": [*[IGNORE_INDEX] * len(head), *feature["labels"], *tail],
        }
        if "weights" in feature:
            result["weights"] = [*[1.0] * len(head), *feature["weights"], *[1.0] * len(tail)]
        return result


def _document_spans(pieces: list[Piece], encoded: list[EncodedPiece]) -> list[tuple[int, int]]:
    """Characters of each token in the text of the whole document."""
    spans: list[tuple[int, int]] = []
    offset = 0
    for piece, part in zip(pieces, encoded, strict=True):
        spans += [(offset + start, offset + end) for start, end in part.spans]
        offset += len(piece.text)
    return spans


def _cut(feature: Feature, max_length: int) -> Feature:
    result: Feature = {
        **feature,
        "input_ids": feature["input_ids"][:max_length],
        "labels": feature["labels"][:max_length],
    }
    if "weights" in feature:
        result["weights"] = feature["weights"][:max_length]
    return result


def _chunks(dataset: Iterable[Example | Mapping[str, Any]]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    for number, row in enumerate(dataset):
        chunk += [row] if isinstance(row, Example) else _examples_of_row(row, number)
        if len(chunk) >= _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _examples_of_row(row: Mapping[str, Any], number: int) -> list[Example]:
    fields = {key: value for key, value in row.items() if value is not None}
    row_format = recognise(fields)
    if row_format is None:
        problem, remedy = missing_fields(fields, None)
        raise DataError(f"row {number}: {problem}", remedy=remedy)
    return row_format.convert(f"row {number}", fields)


def require_path(settings: TokenizerSettings) -> str:
    """The path of the settings.

    Raises:
        UserInputError: there is none.
    """
    if settings.path is None:
        raise UserInputError("no tokenizer is named", remedy="set model.tokenizer.path or the base model")
    return settings.path
