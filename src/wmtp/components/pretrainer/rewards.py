"""Rewards from a reward model: scores of programs, told after each token, as rewards of the base's tokens.

Let s_t be the model's score of the document up to and including token t, for t = 0 .. T-1. `granularity:
sequence` gives the reward s_{T-1} to the last token. `granularity: token` gives r_0 = s_0 and r_t = s_t -
s_{t-1}: what each token changed, s_0 being where the document starts from. Either way a document's rewards
add up to s_{T-1}, so both give the value head the same total to estimate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch

from wmtp.components.data.examples import Example, Feature
from wmtp.components.tokenizer.alignment import carry_over
from wmtp.components.tokenizer.pairs import OtherDocument, TokenizerPair
from wmtp.exceptions import UserInputError
from wmtp.modeling.reward_model import RewardModel
from wmtp.objectives import IGNORE_INDEX

ProgramSource = Literal["data", "rollout"]


@dataclass(frozen=True, slots=True)
class LabelledProgram:
    """A program and what it earned.

    Attributes:
        example: prompt and completion; its `reward` is set.
        is_right: whether the program is right.
        source: the dataset, or a rollout of the base.
        token_rewards: the reward of each token of the tokenised example, which add up to its reward; None
            where all of it falls on the last token.
    """

    example: Example
    is_right: bool
    source: ProgramSource
    token_rewards: tuple[float, ...] | None = None


class ProgramScorer:
    """Scores programs with a reward model.

    The model reads the document that the critic reads: prompt, completion and the end-of-sequence token, cut
    to `data.train.max_length`, without a chat template. Where its tokenizer is not the base's, it reads the
    same text in its own tokens, and rewards are carried over by characters.

    Args:
        model: on its device.
        pair: the base's tokenizer and the reward model's.
        granularity: one reward at the last token, or one at every token.
        batch_size: programs scored at once.
    """

    def __init__(
        self,
        model: RewardModel,
        pair: TokenizerPair,
        *,
        granularity: Literal["sequence", "token"],
        batch_size: int,
    ) -> None:
        self._model = model
        self._pair = pair
        self._granularity = granularity
        self._batch_size = batch_size

    def reward(self, examples: Sequence[Example], source: ProgramSource) -> list[LabelledProgram]:
        """Reward programs; none of them is called right yet (see `label_by_median`).

        Examples without a token to learn within the length limit are left out, as in training.

        Raises:
            UserInputError: a score that is not finite, or a document the model has no room or no tokens for.
            DataError: a text that cannot be carried over between the tokenizers; the message names both.
        """
        by_row_id = {example.row_id: example for example in examples}
        features = self._pair.base.tokenize_dataset(examples)
        documents = self._read(features)
        programs = []
        for feature, document, scores in zip(features, documents, self._score(documents), strict=True):
            example = by_row_id[feature["row_id"]]
            if not all(map(math.isfinite, scores)):
                raise UserInputError(
                    f"the reward model's score of {example.row_id} is NaN or infinite",
                    remedy="check the model's files, or set devices.precision: fp32",
                )
            rewards = None if self._granularity == "sequence" else _token_rewards(scores, document)
            programs.append(LabelledProgram(replace(example, reward=scores[-1]), False, source, rewards))
        return programs

    def _read(self, features: Sequence[Feature]) -> list[_Document]:
        """The documents in the reward model's tokens."""
        if self._pair.relation != "characters":
            self._pair.require_shared(features)
            return [_Document(list(feature["input_ids"]), None) for feature in features]
        others = self._pair.read(
            [feature["input_ids"] for feature in features],
            [[label != IGNORE_INDEX for label in feature["labels"]] for feature in features],
        )
        return [_Document(other.input_ids, other) for other in others]

    def _score(self, documents: Sequence[_Document]) -> list[list[float]]:
        """Score of every prefix of every document; documents of like length share a batch."""
        for document in documents:
            self._check_fits(document.ids)
        order = sorted(range(len(documents)), key=lambda index: len(documents[index].ids))
        scores: list[list[float]] = [[] for _ in documents]
        for start in range(0, len(order), self._batch_size):
            indices = order[start : start + self._batch_size]
            lengths = torch.tensor([len(documents[index].ids) for index in indices])
            mask_BS = torch.arange(int(lengths.max())) < lengths[:, None]
            # Padding is known by the mask; which id stands there does not matter.
            input_ids_BS = torch.zeros(mask_BS.shape, dtype=torch.long)
            input_ids_BS[mask_BS] = torch.tensor([t for index in indices for t in documents[index].ids])
            device = self._model.device
            output = self._model(input_ids_BS.to(device), mask_BS.long().to(device))
            rows = output.token_scores_BS.tolist()
            for index, row, length in zip(indices, rows, lengths.tolist(), strict=True):
                scores[index] = row[:length]
        return scores

    def _check_fits(self, ids: list[int]) -> None:
        if not ids:
            raise UserInputError(
                "a program has no text for the reward model's tokenizer to read",
                remedy="raise data.train.max_length, or leave empty programs out of the data",
            )
        limit = self._model.context_length
        if limit is not None and len(ids) > limit:
            raise UserInputError(
                f"a program has {len(ids)} tokens, the reward model reads at most {limit}",
                remedy=f"set data.train.max_length to at most {limit}",
            )
        if max(ids) >= self._model.vocabulary_size:
            raise UserInputError(
                f"token {max(ids)} of the reward model's tokenizer is outside the model's vocabulary of "
                f"{self._model.vocabulary_size}",
                remedy="put the tokenizer that belongs to the reward model beside it",
            )


@dataclass(frozen=True, slots=True)
class _Document:
    """A document in the reward model's tokens; `other` where the base's tokens are others."""

    ids: list[int]
    other: OtherDocument | None


def _token_rewards(scores: Sequence[float], document: _Document) -> tuple[float, ...]:
    """Differences of the scores, as rewards of the base's tokens; they add up to the last score."""
    rewards = [score - before for before, score in pairwise((0.0, *scores))]
    if document.other is None:
        return tuple(rewards)
    return tuple(carry_over(rewards, document.other.spans, document.other.base_spans))


def label_by_median(programs: Sequence[LabelledProgram]) -> list[LabelledProgram]:
    """Call the programs right whose reward is above the median of all: a reward model names no threshold."""
    rewards = [program.example.reward for program in programs if program.example.reward is not None]
    median = statistics.median(rewards)
    return [
        replace(program, is_right=program.example.reward is not None and program.example.reward > median)
        for program in programs
    ]
