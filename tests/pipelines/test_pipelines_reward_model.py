"""The critic with a reward model, from a recipe to a trained model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from wmtp.evaluation.microcode import build_tokenizer
from wmtp.exceptions import UserInputError
from wmtp.pipelines import run_training_pipeline
from wmtp.pipelines.outputs import RunOptions
from wmtp.pipelines.validation import validate_settings
from wmtp.settings import Config, Recipe

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "num_labels": 1,
}


def _save_reward_model(folder: Path, layout: str, *, vocabulary: int | None = None) -> Path:
    """A random reward model with the built-in models' tokenizer, or one with fewer merges, beside it."""
    tokenizer = build_tokenizer() if vocabulary is None else build_tokenizer(vocab_size=vocabulary)
    config = LlamaConfig(vocab_size=len(tokenizer), **SIZES)
    torch.manual_seed(0)
    if layout == "classifier":
        LlamaForSequenceClassification(config).save_pretrained(folder)
    else:
        causal_lm = LlamaForCausalLM(config)
        state = {f"model.{name}": tensor for name, tensor in causal_lm.state_dict().items()}
        state |= {f"transformer.{name}": tensor for name, tensor in causal_lm.model.state_dict().items()}
        state["transformer.layers.0.self_attn.rotary_emb.inv_freq"] = causal_lm.model.rotary_emb.inv_freq
        state["model.model.layers.0.self_attn.rotary_emb.inv_freq"] = causal_lm.model.rotary_emb.inv_freq
        state["v_head.weight"] = torch.randn(1, 32)
        folder.mkdir()
        torch.save(state, folder / "starling_RM.pth")
    tokenizer.save_pretrained(folder)
    return folder


def _settings(tmp_path: Path, reward_model: Path | None, **reward: Any) -> tuple[Config, Recipe]:
    models = {"base": "builtin:micro-llama", "rm": None if reward_model is None else str(reward_model)}
    config = Config.model_validate(
        {
            "paths": {"models": models, "output": str(tmp_path / "out")},
            "devices": {"accelerator": "cpu", "precision": "fp32", "num_threads": 1},
        }
    )
    recipe = Recipe.model_validate(
        {
            "train": {"algo": "critic-wmtp", "max_steps": 2, "log_every_steps": 1, "save_every_steps": 1},
            "model": {"mtp": {"horizon": 2}},
            "data": {
                "train": {"sources": ["microcode"], "batch_size": 2, "max_length": 96},
                "eval": {"batch_size": 2, "max_examples": 2},
                "microcode": {"num_examples": 32},
            },
            "critic": {
                "recalibrate_every_steps": 1,
                "reward": {"source": "reward_model", "num_programs": 20, **reward},
                "pretrain": {"max_steps": 3, "batch_size": 4, "num_rollouts": 4},
            },
            "optim": {"lr": 1e-3},
            "eval": {"max_new_tokens": 8, "batch_size": 4},
        }
    )
    return config, recipe


def _programs(tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "out/models/run/critic/programs.jsonl"
    return [json.loads(line) for line in file.read_bytes().splitlines()]


@pytest.mark.parametrize(
    ("layout", "granularity", "vocabulary"),
    [
        ("classifier", "sequence", None),
        ("starling", "token", 280),
        pytest.param("starling", "token", None, marks=pytest.mark.slow),
        pytest.param("classifier", "sequence", 280, marks=pytest.mark.slow),
    ],
)
def test_a_run_is_rewarded_by_the_reward_model(
    layout: str, granularity: str, vocabulary: int | None, tmp_path: Path
) -> None:
    path = _save_reward_model(tmp_path / "rm", layout, vocabulary=vocabulary)
    config, recipe = _settings(tmp_path, path, granularity=granularity)
    result = run_training_pipeline(config, recipe, options=RunOptions(run_name="run"))
    assert result.step == 2
    assert result.critic is not None
    assert result.critic.num_right + result.critic.num_wrong > 0
    assert math.isfinite(result.metrics["train/loss"])
    rows = _programs(tmp_path)
    assert {row["source"] for row in rows} == {"data", "rollout"}
    assert len({row["reward"] for row in rows}) > len(rows) // 2
    # Right is what lies above the median of all, rollouts included.
    above = sorted(row["reward"] for row in rows)[len(rows) // 2 :]
    assert {row["reward"] for row in rows if row["is_right"]} <= set(above)
    assert abs(sum(row["is_right"] for row in rows) - len(rows) / 2) <= 1
    for row in rows:
        if granularity == "sequence":
            assert row["token_rewards"] is None
        else:
            assert math.fsum(row["token_rewards"]) == pytest.approx(row["reward"], abs=1e-6)
            assert sum(reward != 0 for reward in row["token_rewards"]) > 2


def test_a_resumed_run_takes_its_rewards_from_the_first_part_and_needs_no_reward_model(
    tmp_path: Path,
) -> None:
    path = _save_reward_model(tmp_path / "rm", "classifier")
    config, recipe = _settings(tmp_path, path, granularity="token")
    whole = run_training_pipeline(config, recipe, options=RunOptions(run_name="run"))
    rewards = _programs(tmp_path)
    for file in path.iterdir():
        file.unlink()
    first = tmp_path / "out/models/run/step-1"
    resumed = run_training_pipeline(config, recipe, resume_checkpoint=str(first))
    assert _programs(tmp_path) == rewards
    assert resumed.metrics["train/loss"] == whole.metrics["train/loss"]
    assert resumed.metrics["critic/value_loss"] == whole.metrics["critic/value_loss"]


def test_a_dry_run_and_validation_use_the_reward_model_and_write_nothing(tmp_path: Path) -> None:
    path = _save_reward_model(tmp_path / "rm", "starling")
    config, recipe = _settings(tmp_path, path, granularity="token")
    result = run_training_pipeline(config, recipe, dry_run=True)
    assert result.dry_run is not None
    assert not (tmp_path / "out").exists()
    findings = {
        finding.subject: finding.detail for finding in validate_settings(config, recipe, RunOptions())
    }
    assert findings["reward model"].startswith(str(path))
    assert findings["reward tokenizer"] == "the same as the base's"
    assert "sandbox" not in findings


def test_validation_says_when_rewards_must_be_carried_over(tmp_path: Path) -> None:
    path = _save_reward_model(tmp_path / "rm", "classifier", vocabulary=280)
    config, recipe = _settings(tmp_path, path)
    findings = {
        finding.subject: finding.detail for finding in validate_settings(config, recipe, RunOptions())
    }
    assert findings["reward tokenizer"].endswith("by characters")


def test_validation_looks_into_the_files_for_what_a_model_is(tmp_path: Path) -> None:
    starling = _save_reward_model(tmp_path / "starling", "starling")
    LlamaConfig(vocab_size=len(build_tokenizer()), **SIZES).save_pretrained(starling)
    plain = tmp_path / "plain"
    LlamaForCausalLM(LlamaConfig(vocab_size=len(build_tokenizer()), **SIZES)).save_pretrained(plain)
    build_tokenizer().save_pretrained(plain)
    with pytest.raises(UserInputError, match="plain is a Hugging Face model, not a reward model"):
        validate_settings(*_settings(tmp_path, plain), RunOptions())
    config, recipe = _settings(tmp_path, starling)
    validate_settings(config, recipe, RunOptions())
    models = {"base": str(starling), "rm": str(starling)}
    wrong = Config.model_validate({"paths": {"models": models}, "devices": {"accelerator": "cpu"}})
    with pytest.raises(UserInputError, match="layout of Starling-RM, not a causal language model"):
        validate_settings(wrong, recipe, RunOptions())


@pytest.mark.parametrize("is_named", [True, False])
def test_a_missing_reward_model_stops_dry_run_and_validation(is_named: bool, tmp_path: Path) -> None:
    config, recipe = _settings(tmp_path, tmp_path / "nothing/here" if is_named else None)
    wanted = "nothing/here" if is_named else r"paths\.models\.rm is not set"
    with pytest.raises(UserInputError, match=wanted):
        run_training_pipeline(config, recipe, dry_run=True)
    with pytest.raises(UserInputError, match=wanted):
        validate_settings(config, recipe, RunOptions())


@pytest.mark.slow
def test_a_reward_model_that_likes_everything_alike_is_an_error_naming_the_source(tmp_path: Path) -> None:
    path = _save_reward_model(tmp_path / "rm", "starling")
    state = torch.load(path / "starling_RM.pth", weights_only=True)
    state["v_head.weight"].zero_()
    torch.save(state, path / "starling_RM.pth")
    config, recipe = _settings(tmp_path, path)
    with pytest.raises(UserInputError, match=r"same reward .*source 'reward_model'"):
        run_training_pipeline(config, recipe, options=RunOptions(run_name="run"))


def test_a_reward_model_without_a_tokenizer_says_where_to_put_one(tmp_path: Path) -> None:
    path = _save_reward_model(tmp_path / "rm", "starling")
    for file in path.glob("tokenizer*"):
        file.unlink()
    config, recipe = _settings(tmp_path, path)
    with pytest.raises(UserInputError, match="put the tokenizer the reward model was trained with"):
        run_training_pipeline(config, recipe, dry_run=True)
