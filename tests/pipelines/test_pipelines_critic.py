"""Stage 1 of the critic on a tiny model: who learns from which programs, and what a resumed run finds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from wmtp.components.data import Example, MTPDataCollator
from wmtp.components.loader.builtin import build_micro_llama
from wmtp.components.pretrainer import ProgramScorer
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.tokenizer.pairs import compare_tokenizers
from wmtp.evaluation.microcode import build_tokenizer
from wmtp.modeling import MTPModel
from wmtp.modeling.reward_model import RewardModel
from wmtp.pipelines.critic import Critic, prepare_critic
from wmtp.pipelines.data import PreparedData
from wmtp.pipelines.environment import Environment, prepare_environment
from wmtp.settings import Config, Recipe

# Four prompts with a right and a wrong program each; all of them have a reward in the data.
EXAMPLES = [
    Example(f"{prompt}-{reward:g}", f"def {prompt}(x):\n", f"    return x + {reward:g}\n", reward=reward)
    for prompt in "abcd"
    for reward in (0.0, 1.0)
]


def _scorer(tokenizer: HfTokenizer) -> ProgramScorer:
    """A random reward model that rewards every token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    model = RewardModel(LlamaModel(config), torch.randn(1, 32))
    return ProgramScorer(model, compare_tokenizers(tokenizer, tokenizer), granularity="token", batch_size=4)


class _Stage1:
    """Stage 1 of a recipe with this reward source, in one folder."""

    def __init__(self, source: str, folder: Path) -> None:
        self.recipe = Recipe.model_validate(
            {
                "train": {"algo": "critic-wmtp", "max_steps": 2, "seed": 3},
                "data": {"train": {"sources": ["microcode"], "max_length": 64}},
                "critic": {
                    "reward": {"source": source},
                    "pretrain": {"max_steps": 2, "batch_size": 4, "num_rollouts": 0, "holdout_ratio": 0.5},
                },
            }
        )
        config = Config.model_validate({"devices": {"accelerator": "cpu", "precision": "fp32"}})
        self.environment: Environment = prepare_environment(config, self.recipe)
        self.tokenizer = HfTokenizer({"tokenizer": build_tokenizer(), "max_length": 64})
        self.model = MTPModel.from_causal_lm(build_micro_llama(), horizon=1)
        self.scorer = _scorer(self.tokenizer) if source == "reward_model" else None
        self.folder = folder
        self.data = self.read_data()

    def read_data(self) -> PreparedData:
        features = self.tokenizer.tokenize_dataset(EXAMPLES)
        collator = MTPDataCollator({"tokenizer": self.tokenizer.tokenizer, "horizon": 1})
        return PreparedData({e.row_id: e for e in EXAMPLES}, features, [], collator, self.recipe)

    def run(self, **changes: Any) -> Critic:
        arguments = {
            "folder": self.folder,
            "value_head": None,
            "load_scorer": lambda: self.scorer,
            "unsafe_execution": False,
            "is_resumed": False,
        }
        return prepare_critic(
            self.recipe, self.environment, self.model, self.tokenizer, self.data, **{**arguments, **changes}
        )


@pytest.mark.parametrize("source", ["column", "reward_model"])
def test_held_out_programs_reward_no_training_feature_and_share_no_prompt_with_one(
    source: str, tmp_path: Path
) -> None:
    stage = _Stage1(source, tmp_path)
    held_out = {feature["row_id"] for feature in stage.run().holdout.features}
    assert len(held_out) == 4
    assert len({row_id[0] for row_id in held_out}) == 2  # both programs of a prompt, or none
    for feature in stage.data.features:
        is_held_out = feature["row_id"] in held_out
        assert (feature.get("reward") is None) is is_held_out
        # Rewards of single tokens come from a reward model alone.
        assert (feature.get("rewards") is not None) is (source == "reward_model" and not is_held_out)


def test_a_reward_models_token_rewards_reach_both_stages_and_its_median_parts_right_from_wrong(
    tmp_path: Path,
) -> None:
    stage = _Stage1("reward_model", tmp_path)
    holdout = stage.run().holdout
    for feature in [*stage.data.features, *holdout.features]:
        if feature["reward"] is not None:
            assert len(feature["rewards"]) == len(feature["input_ids"])
            assert math.fsum(feature["rewards"]) == pytest.approx(feature["reward"], abs=1e-5)
    rewards = {feature["row_id"]: feature["reward"] for feature in [*stage.data.features, *holdout.features]}
    known = sorted(reward for reward in rewards.values() if reward is not None)
    rewards_held_out = [feature["reward"] for feature in holdout.features]
    assert len(known) == 8
    assert holdout.is_right == [reward > known[3] for reward in rewards_held_out]


def test_a_resumed_run_takes_programs_and_value_head_from_the_first_part(tmp_path: Path) -> None:
    stage = _Stage1("reward_model", tmp_path)
    first = stage.run()
    with torch.no_grad():  # something that training it again would not give
        first.value_head.value_map.bias.fill_(0.125)
    first.value_head.save(tmp_path / "value_head")
    rewarded = stage.data.features
    stage.data = stage.read_data()
    second = stage.run(is_resumed=True, load_scorer=lambda: pytest.fail("rewards are known"))
    assert second.holdout == first.holdout
    assert stage.data.features == rewarded
    weights = first.value_head.state_dict()
    assert all(torch.equal(weights[name], found) for name, found in second.value_head.state_dict().items())
