"""Stage 1 of the critic: what it learns, what it refuses, and how it says how good it is."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.components.data import Example, MTPDataCollator
from wmtp.components.pretrainer import (
    CriticHeadPretrainer,
    CriticQuality,
    LabelledProgram,
    PretrainerContext,
    RewardedPrograms,
    collect_programs,
    measure_critic,
    read_programs,
    write_programs,
)
from wmtp.components.pretrainer.value_loss import value_errors
from wmtp.evaluation import Task
from wmtp.exceptions import CheckpointError, UserInputError
from wmtp.modeling import MTPModel, ValueHead
from wmtp.settings import Recipe

GOOD, BAD = 5, 6


class FakeVocabulary:
    """All a collator asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 1


def _recipe(**critic: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "train": {"algo": "critic-wmtp", "max_steps": 2},
            "data": {"train": {"sources": ["microcode"], "max_length": 32}},
            "critic": {"pretrain": {"max_steps": 40, "lr": 1e-2, "batch_size": 8}, **critic},
        }
    )


def _model() -> MTPModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return MTPModel.from_causal_lm(LlamaForCausalLM(config), horizon=1)


def _programs(count: int, seed: int, rewards: tuple[float, float] = (0.0, 1.0)) -> RewardedPrograms:
    """Documents that are right when their second token is GOOD and wrong when it is BAD."""
    generator = torch.Generator().manual_seed(seed)
    features, is_right = [], []
    for index in range(count):
        right = index % 2 == 0
        length = int(torch.randint(4, 9, (), generator=generator))
        tail = torch.randint(7, 16, (length,), generator=generator).tolist()
        features.append(
            {"input_ids": [2, GOOD if right else BAD, *tail], "reward": rewards[right], "row_id": str(index)}
        )
        is_right.append(right)
    return RewardedPrograms(features, is_right)


def _context(model: MTPModel, train: RewardedPrograms, holdout: RewardedPrograms) -> PretrainerContext:
    return PretrainerContext(
        model=model,
        train=train,
        holdout=holdout,
        collator=MTPDataCollator({"tokenizer": FakeVocabulary(), "horizon": 1}),
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
    )


@pytest.mark.parametrize("form", ["transformer", "mlp", "linear"])
def test_the_value_head_learns_to_tell_right_from_wrong_and_leaves_the_base_alone(form: str) -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pretrainer = CriticHeadPretrainer(_recipe(head={"form": form}))
    result = pretrainer.run(_context(model, _programs(48, 1), _programs(32, 2)))
    assert result.quality.auc > 0.9
    assert result.quality.explained_variance > 0.2
    assert (result.quality.num_right, result.quality.num_wrong) == (16, 16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_untrained_head_is_blind_and_therefore_without_strength() -> None:
    model, holdout = _model(), _programs(32, 2)
    head = ValueHead.from_model(model)
    quality = measure_critic(
        model,
        head,
        holdout,
        collator=MTPDataCollator({"tokenizer": FakeVocabulary(), "horizon": 1}),
        batch_size=8,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
    )
    assert quality.auc == 0.5
    assert quality.strength == 0.0


@pytest.mark.parametrize(("auc", "strength"), [(1.0, 1.0), (0.75, 0.5), (0.5, 0.0), (0.2, 0.0)])
def test_strength_is_twice_auc_minus_one_and_never_negative(auc: float, strength: float) -> None:
    assert CriticQuality(auc, 0.0, 0.0, 1, 1).strength == pytest.approx(strength)


def test_unknown_auc_gives_no_strength() -> None:
    assert CriticQuality(float("nan"), 0.0, 0.0, 0, 4).strength == 0.0


def test_rewards_that_do_not_vary_are_an_error_that_names_the_source() -> None:
    pretrainer = CriticHeadPretrainer(_recipe())
    with pytest.raises(UserInputError, match=r"same reward \(1.0\), from critic.reward.source 'execution'"):
        pretrainer.run(_context(_model(), _programs(8, 1, (1.0, 1.0)), _programs(8, 2)))


def test_a_critic_below_the_asked_explained_variance_stops_the_run() -> None:
    recipe = _recipe(min_explained_variance=0.9, pretrain={"max_steps": 1, "lr": 1e-6})
    with pytest.raises(UserInputError, match=r"below critic.min_explained_variance 0.9"):
        CriticHeadPretrainer(recipe).run(_context(_model(), _programs(16, 1), _programs(16, 2)))


def test_value_targets_are_the_lambda_returns_and_unknown_rewards_count_nothing() -> None:
    # One document of three tokens, reward 1 at its end, V as given; one document without a reward.
    values_BS = torch.tensor([[0.2, 0.5, 0.4], [9.0, 9.0, 9.0]], requires_grad=True)
    batch = {
        "token_rewards": torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        "reward_mask": torch.tensor([[True, True, True], [False, False, False]]),
        "document_ids": torch.zeros(2, 3, dtype=torch.long),
    }
    lam = 0.5
    # G_2 = R; G_1 = (1 - lam) V_2 + lam G_2; G_0 = (1 - lam) V_1 + lam G_1.
    target_2, target_1 = 1.0, 0.5 * 0.4 + 0.5 * 1.0
    target_0 = 0.5 * 0.5 + 0.5 * target_1
    errors_BS = value_errors(batch, values_BS, gamma=1.0, lam=lam)
    expected = torch.tensor([[0.2 - target_0, 0.5 - target_1, 0.4 - target_2], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(errors_BS.detach(), expected)
    errors_BS.sum().backward()
    assert torch.equal(values_BS.grad, torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))


def test_execution_rewards_are_the_fraction_of_asserts_passed() -> None:
    tests = "assert f(1) == 2\nassert f(2) == 3\nassert f(3) == 4\nassert f(4) == 6\n"
    task = Task("t", "def f(x):\n", tests, program_prefix="def f(x):\n")
    examples = [
        Example("right", task.prompt, "    return x + 1 + (x > 3)\n", task=task),
        Example("wrong", task.prompt, "    return x + 1\n", task=task),
        Example("broken", task.prompt, "    return y\n", task=task),
    ]
    programs = collect_programs(examples, _recipe(), unsafe_execution=False)
    found = {program.example.row_id: (program.example.reward, program.is_right) for program in programs}
    assert found == {"right": (1.0, True), "wrong": (0.75, False), "broken": (0.0, False)}


def test_column_rewards_are_taken_as_they_are() -> None:
    examples = [Example(str(index), "p", "c", reward=reward) for index, reward in enumerate((1.0, -1.0))]
    recipe = _recipe(reward={"source": "column"})
    programs = collect_programs(examples, recipe, unsafe_execution=False)
    assert [(each.example.reward, each.is_right) for each in programs] == [(1.0, True), (-1.0, False)]


@pytest.mark.parametrize(("source", "named"), [("column", "`reward` field"), ("execution", "tests")])
def test_data_without_rewards_is_an_error_that_says_what_is_missing(source: str, named: str) -> None:
    with pytest.raises(UserInputError, match=named):
        collect_programs([Example("1", "p", "c")], _recipe(reward={"source": source}), unsafe_execution=False)


def test_kept_programs_come_back_as_they_were(tmp_path: Path) -> None:
    programs = [
        LabelledProgram(
            Example("a:1", "프롬프트", "return '\u2028\x85\udc80'\n", reward=0.25), False, "data"
        ),
        LabelledProgram(Example("a:1#rollout-0", "p", "", reward=1.0), True, "rollout"),
    ]
    write_programs(tmp_path / "critic/programs.jsonl", programs)
    assert read_programs(tmp_path / "critic/programs.jsonl") == programs


def test_missing_programs_of_a_resumed_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"programs\.jsonl"):
        read_programs(tmp_path / "programs.jsonl")
