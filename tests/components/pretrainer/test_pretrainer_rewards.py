"""Rewards from a reward model: per token, in other tokens, and what the value head is trained towards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from wmtp.components.data import Example, MTPDataCollator
from wmtp.components.pretrainer import (
    LabelledProgram,
    ProgramScorer,
    collect_programs,
    label_by_median,
    read_programs,
    write_programs,
)
from wmtp.components.pretrainer.value_loss import value_errors
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.tokenizer.pairs import compare_tokenizers
from wmtp.evaluation.microcode import build_tokenizer
from wmtp.exceptions import DataError, UserInputError
from wmtp.modeling.reward_model import RewardModel
from wmtp.settings import Recipe

EXAMPLES = [
    Example("a", "def add(a, b):\n", "    return a + b\n"),
    Example("b", "def double(x):\n", "    total = x\n    total += x\n    return total\n"),
    Example("c", "# ünïcode 한글 🙂\n", "x = '🙂'\n"),
    Example("d", "", "y = 1\n"),
]


@pytest.fixture(scope="module")
def tokenizer() -> HfTokenizer:
    return HfTokenizer({"tokenizer": build_tokenizer(), "max_length": 200})


@pytest.fixture(scope="module")
def other_tokenizer() -> HfTokenizer:
    """Bytes and hardly a merge: other tokens of the same texts."""
    return HfTokenizer({"tokenizer": build_tokenizer(vocab_size=270), "max_length": 200})


def _reward_model(vocabulary: int, **changes: Any) -> RewardModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    base = LlamaModel(LlamaConfig(**{**sizes, **changes}))
    return RewardModel(base, torch.randn(1, 32))


def _scorer(
    tokenizer: HfTokenizer,
    reward_tokenizer: HfTokenizer,
    granularity: str,
    batch_size: int = 3,
    **changes: Any,
) -> ProgramScorer:
    vocabulary = changes.pop("vocabulary", len(reward_tokenizer.tokenizer))
    return ProgramScorer(
        _reward_model(vocabulary, **changes),
        compare_tokenizers(tokenizer, reward_tokenizer),
        granularity=granularity,  # type: ignore[arg-type]
        batch_size=batch_size,
    )


def _final_scores(tokenizer: HfTokenizer) -> list[float]:
    """Score of each whole document, each by itself."""
    model = _reward_model(len(tokenizer.tokenizer))
    features = tokenizer.tokenize_dataset(EXAMPLES)
    return [float(model(torch.tensor([feature["input_ids"]])).pooled_B) for feature in features]


def test_a_sequence_reward_is_the_score_of_the_whole_document_whatever_shares_its_batch(
    tokenizer: HfTokenizer,
) -> None:
    wanted = _final_scores(tokenizer)
    assert max(wanted) - min(wanted) > 0.1
    for batch_size in (1, 3, 10):
        programs = _scorer(tokenizer, tokenizer, "sequence", batch_size).reward(EXAMPLES, "data")
        assert [program.example.row_id for program in programs] == ["a", "b", "c", "d"]
        assert [program.example.reward for program in programs] == pytest.approx(wanted, abs=1e-5)
        assert all(program.token_rewards is None for program in programs)


def test_token_rewards_are_the_changes_of_the_score_and_add_up_to_it(tokenizer: HfTokenizer) -> None:
    programs = _scorer(tokenizer, tokenizer, "token").reward(EXAMPLES, "rollout")
    model = _reward_model(len(tokenizer.tokenizer))
    features = tokenizer.tokenize_dataset(EXAMPLES)
    for program, feature, final in zip(programs, features, _final_scores(tokenizer), strict=True):
        assert program.source == "rollout"
        assert program.token_rewards is not None
        assert program.example.reward == pytest.approx(final, abs=1e-5)
        assert math.fsum(program.token_rewards) == pytest.approx(program.example.reward, abs=1e-9)
        ids = feature["input_ids"]
        before = 0.0
        for end, reward in enumerate(program.token_rewards, 1):
            score = float(model(torch.tensor([ids[:end]])).pooled_B)
            assert reward == pytest.approx(score - before, abs=1e-5)
            before = score


def test_a_document_that_is_cut_is_scored_as_far_as_it_is_kept(tokenizer: HfTokenizer) -> None:
    ids = tokenizer.tokenize_dataset(EXAMPLES[1:2])[0]["input_ids"]
    kept = len(ids) - 3
    short = HfTokenizer({"tokenizer": tokenizer.tokenizer, "max_length": kept})
    (program,) = _scorer(short, short, "token").reward(EXAMPLES[1:2], "data")
    score = _reward_model(len(tokenizer.tokenizer))(torch.tensor([ids[:kept]])).pooled_B
    assert program.example.reward == pytest.approx(float(score), abs=1e-5)
    assert program.token_rewards is not None
    assert len(program.token_rewards) == kept


def test_rewards_in_other_tokens_are_carried_over_with_their_sum(
    tokenizer: HfTokenizer, other_tokenizer: HfTokenizer
) -> None:
    programs = _scorer(tokenizer, other_tokenizer, "token").reward(EXAMPLES, "data")
    features = tokenizer.tokenize_dataset(EXAMPLES)
    theirs = other_tokenizer.tokenize_dataset(EXAMPLES)
    assert [len(feature["input_ids"]) for feature in features] != [len(each["input_ids"]) for each in theirs]
    for program, feature, final in zip(programs, features, _final_scores(other_tokenizer), strict=True):
        assert program.token_rewards is not None
        assert len(program.token_rewards) == len(feature["input_ids"])
        # The model reads the text in its own tokens, from beginning- to end-of-sequence token.
        assert program.example.reward == pytest.approx(final, abs=1e-5)
        assert math.fsum(program.token_rewards) == pytest.approx(final, abs=1e-5)


def test_the_reward_of_a_character_stays_with_its_character(
    tokenizer: HfTokenizer, other_tokenizer: HfTokenizer
) -> None:
    (program,) = _scorer(tokenizer, other_tokenizer, "token").reward(EXAMPLES[:1], "data")
    assert program.token_rewards is not None
    model = _reward_model(len(other_tokenizer.tokenizer))
    ids, their_ids = (
        each.tokenize_dataset(EXAMPLES[:1])[0]["input_ids"] for each in (tokenizer, other_tokenizer)
    )
    texts, their_texts = (
        [each.tokenizer.decode(tokens[:end]) for end in range(1, len(tokens))]
        for each, tokens in ((tokenizer, ids), (other_tokenizer, their_ids))
    )
    # Where both have read the same text, the rewards so far are the score of that text.
    shared = [text for text in texts if text in their_texts]
    assert len(shared) > 5
    for text in shared:
        score = float(model(torch.tensor([their_ids[: their_texts.index(text) + 1]])).pooled_B)
        received = math.fsum(program.token_rewards[: texts.index(text) + 1])
        assert received == pytest.approx(score, abs=1e-4)


def test_a_text_the_other_tokenizer_changes_is_an_error_naming_both(tokenizer: HfTokenizer) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "return": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", name_or_path="lossy/words")
    with pytest.raises(UserInputError, match=r"aligned between .*'lossy/words'"):
        _scorer(tokenizer, HfTokenizer({"tokenizer": lossy}), "sequence").reward(EXAMPLES, "data")


def test_what_the_reward_model_cannot_read_is_an_error_with_the_number(tokenizer: HfTokenizer) -> None:
    with pytest.raises(UserInputError, match="reads at most 8"):
        _scorer(tokenizer, tokenizer, "token", max_position_embeddings=8).reward(EXAMPLES, "data")
    with pytest.raises(UserInputError, match="outside the model's vocabulary of 60"):
        _scorer(tokenizer, tokenizer, "token", vocabulary=60).reward(EXAMPLES, "data")


def test_a_program_cut_before_its_first_character_is_an_error_in_words(tokenizer: HfTokenizer) -> None:
    short = HfTokenizer({"tokenizer": tokenizer.tokenizer, "max_length": 2})
    bare = build_tokenizer(vocab_size=270)
    bare.bos_token = bare.eos_token = None
    example = Example("e", "", "\U0001f642")
    assert len(short.tokenize_dataset([example])[0]["input_ids"]) == 2
    with pytest.raises(UserInputError, match=r"no text(.|\n)*max_length"):
        _scorer(short, HfTokenizer({"tokenizer": bare}), "token").reward([example], "data")


def test_a_score_that_is_not_finite_is_an_error_naming_the_row(tokenizer: HfTokenizer) -> None:
    model = _reward_model(len(tokenizer.tokenizer))
    model.head.weight.fill_(math.nan)
    scorer = ProgramScorer(
        model, compare_tokenizers(tokenizer, tokenizer), granularity="sequence", batch_size=2
    )
    with pytest.raises(UserInputError, match="score of a is NaN"):
        scorer.reward(EXAMPLES, "data")


def test_programs_above_the_median_are_right() -> None:
    programs = [
        LabelledProgram(Example(str(index), "p", "c", reward=reward), False, "data")
        for index, reward in enumerate([-3.0, 0.5, 2.0, 0.5, 9.0])
    ]
    assert [program.is_right for program in label_by_median(programs)] == [False, False, True, False, True]


def _recipe(**reward: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "train": {"algo": "critic-wmtp", "max_steps": 2},
            "data": {"train": {"sources": ["microcode"], "max_length": 64}},
            "critic": {"reward": {"source": "reward_model", **reward}},
        }
    )


def test_any_text_can_be_rewarded_but_no_chat(tokenizer: HfTokenizer) -> None:
    chat = Example("chat", "", "", messages=({"role": "user", "content": "hello"},))
    scorer = _scorer(tokenizer, tokenizer, "sequence")
    programs = collect_programs([chat, *EXAMPLES], _recipe(), unsafe_execution=False, scorer=scorer)
    assert [program.example.row_id for program in programs] == ["a", "b", "c", "d"]
    with pytest.raises(UserInputError, match="chats are not scored"):
        collect_programs([chat], _recipe(), unsafe_execution=False, scorer=scorer)


def test_kept_token_rewards_come_back_as_they_were(tmp_path: Path, tokenizer: HfTokenizer) -> None:
    programs = label_by_median(_scorer(tokenizer, tokenizer, "token").reward(EXAMPLES, "data"))
    write_programs(tmp_path / "programs.jsonl", programs)
    assert read_programs(tmp_path / "programs.jsonl") == programs


def _batch(features: list[Any], tokenizer: HfTokenizer) -> dict[str, Any]:
    return MTPDataCollator({"tokenizer": tokenizer.tokenizer, "horizon": 1})(features)


def test_token_rewards_stand_on_their_tokens_also_where_documents_share_a_row(tokenizer: HfTokenizer) -> None:
    batch = _batch(
        [
            [
                {"input_ids": [5, 6, 7], "reward": 0.5, "rewards": [1.0, -2.0, 1.5]},
                {"input_ids": [8, 9]},
                {"input_ids": [10, 11], "reward": 4.0},
            ],
            [{"input_ids": [12, 13], "rewards": (0.25, 0.5)}],
        ],
        tokenizer,
    )
    assert batch["token_rewards"].tolist() == [[1.0, -2.0, 1.5, 0, 0, 0, 4.0], [0.25, 0.5, 0, 0, 0, 0, 0]]
    assert batch["reward_mask"].tolist() == [
        [True, True, True, False, False, True, True],
        [True, True, False, False, False, False, False],
    ]


def test_rewards_on_a_features_own_padding_are_dropped_with_it(tokenizer: HfTokenizer) -> None:
    for mask, kept in (([1, 1, 0], [0, 1]), ([0, 1, 1], [1, 2]), ([1, 0, 1], [0, 2])):
        feature = {"input_ids": [5, 6, 7], "attention_mask": mask, "rewards": [1.0, 2.0, 3.0]}
        batch = _batch([feature], tokenizer)
        assert batch["input_ids"].tolist() == batch["token_labels"].tolist() == [[5 + at for at in kept]]
        assert batch["token_rewards"].tolist() == [[1.0 + at for at in kept]]


def test_rewards_that_do_not_fit_the_tokens_are_an_error(tokenizer: HfTokenizer) -> None:
    with pytest.raises(DataError, match="feature x has 3 input_ids but 2 rewards"):
        _batch([{"input_ids": [5, 6, 7], "rewards": [1.0, 2.0], "row_id": "x"}], tokenizer)


def _naive_targets(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Rewards received plus the GAE(lambda) return of what is still to come, summed term by term."""
    length = len(rewards)
    received = [math.fsum(rewards[: t + 1]) for t in range(length)]
    to_come = [value - got for value, got in zip(values, received, strict=True)]
    errors = [
        (rewards[t + 1] + gamma * to_come[t + 1] if t + 1 < length else 0.0) - to_come[t]
        for t in range(length)
    ]
    return [
        values[t] + math.fsum((gamma * lam) ** (k - t) * errors[k] for k in range(t, length))
        for t in range(length)
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (1.0, 0.0), (0.9, 0.7)])
def test_value_targets_with_rewards_at_every_token_are_those_of_a_naive_reference(
    gamma: float, lam: float, tokenizer: HfTokenizer
) -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = [torch.randn(n, generator=generator).tolist() for n in (5, 3, 4)]
    features = [{"input_ids": list(range(5, 5 + len(each))), "rewards": each} for each in rewards]
    batch = _batch([features[:2], features[2:]], tokenizer)  # two documents in a row, one and padding
    values_BS = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    errors_BS = value_errors(batch, values_BS, gamma=gamma, lam=lam)
    places = [(0, 0, 5), (0, 5, 8), (1, 0, 4)]
    for given, (row, start, end) in zip(rewards, places, strict=True):
        values = values_BS[row, start:end].tolist()
        given = torch.tensor(given).double().tolist()
        targets = values_BS[row, start:end] - errors_BS[row, start:end]
        torch.testing.assert_close(
            targets, torch.tensor(_naive_targets(given, values, gamma, lam), dtype=torch.float64)
        )
        # The last token's target is the document's total reward.
        assert float(targets[-1]) == pytest.approx(math.fsum(given), abs=1e-6)
    assert torch.equal(errors_BS[1, 4:], torch.zeros(4, dtype=torch.float64))


def test_the_change_of_value_is_the_error_of_the_step_wherever_the_rewards_fall(
    tokenizer: HfTokenizer,
) -> None:
    # With lambda 0 the target is one step ahead: target_t - V_t is the TD error of token t + 1. It must be
    # V_{t+1} - V_t for rewards at the end and for rewards at every token alike.
    values_BS = torch.tensor([[0.3, -0.2, 0.9, 0.4]], dtype=torch.float64)
    rewards = [0.5, -1.25, 2.0, 0.75]
    for feature in ({"rewards": rewards}, {"reward": sum(rewards)}):
        batch = _batch([{"input_ids": [5, 6, 7, 8], **feature}], tokenizer)
        errors_BS = -value_errors(batch, values_BS, gamma=1.0, lam=0.0)
        torch.testing.assert_close(errors_BS[0, :-1], values_BS.diff(dim=1)[0])
        assert float(errors_BS[0, -1]) == pytest.approx(sum(rewards) - 0.4)


def test_a_value_that_knows_the_total_at_every_token_has_no_error(tokenizer: HfTokenizer) -> None:
    batch = _batch([{"input_ids": [5, 6, 7], "rewards": [2.0, -3.0, 0.5]}], tokenizer)
    values_BS = torch.full((1, 3), -0.5, dtype=torch.float64)
    assert value_errors(batch, values_BS, gamma=1.0, lam=0.95).abs().max() < 1e-12
