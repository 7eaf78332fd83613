"""Freezing and LoRA through the whole training: what is frozen, what a checkpoint holds, and resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wmtp.components.loader.builtin import build_micro_llama, micro_tokenizer
from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling import MTPModel
from wmtp.pipelines import run_evaluation_pipeline, run_training_pipeline
from wmtp.pipelines.outputs import RunOptions, RunOutputs
from wmtp.settings import Config, Recipe

CONFIGS = Path(__file__).parents[1] / "configs"
NUM_STEPS = 4
HEADS_FIRST = {"trainable": "heads_then_all", "warmup_head_steps": 2}
LORA = {"lora": {"rank": 4, "dropout": 0.1}}
NF4 = {"lora": {"rank": 4, "quantization": "nf4"}}
# Parameters of the built-in model: H = 96, 4 layers, 4 heads; adapters on two 96 x 96 matrices of 3 layers.
LAYER = 4 * 96 * 96 + 3 * 96 * 256 + 2 * 96
ADAPTERS = 3 * 2 * 2 * 4 * 96

Run = Callable[..., RunOutputs]


def make_recipe(name: str = "mtp_baseline", **sections: dict[str, Any]) -> Recipe:
    """A shipped test recipe with a few changes, and no program run after it."""
    recipe = yaml.safe_load((CONFIGS / f"recipe.{name}.yaml").read_text())
    recipe["eval"] |= {"datasets": [], "types": ["perplexity"]}
    recipe["train"] |= {"max_steps": NUM_STEPS, "keep_last": 9}
    recipe["optim"]["lr"] = 1e-2
    for section, changes in sections.items():
        recipe[section] = {**recipe.get(section, {}), **changes}
    return Recipe.model_validate(recipe)


def make_config(output: Path, base: str = "builtin:micro-llama") -> Config:
    paths = {"models": {"base": base, "ref": "builtin:micro-llama"}, "output": str(output)}
    devices = {"accelerator": "cpu", "precision": "fp32", "num_threads": 1}
    return Config.model_validate({"paths": paths, "devices": devices})


@pytest.fixture
def train(tmp_path: Path) -> Run:
    """Return a function that trains under a name, or from a checkpoint."""

    def run(
        recipe: Recipe, name: str | None = None, resume: Path | None = None, **options: Any
    ) -> RunOutputs:
        config = make_config(tmp_path, **options)
        checkpoint = None if resume is None else str(resume)
        return run_training_pipeline(config, recipe, False, checkpoint, options=RunOptions(run_name=name))

    return run


def tensors_of(run: Path, group: str = "model", step: int = NUM_STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / f"step-{step}" / f"{group}.safetensors")


@pytest.mark.parametrize(
    "recipe",
    ["mtp_baseline", "critic_wmtp", pytest.param("rho1_wmtp_tokenskip", marks=pytest.mark.slow)],
)
def test_heads_only_leaves_the_base_bit_for_bit_whatever_weights_the_tokens(
    recipe: str, train: Run, tmp_path: Path
) -> None:
    train(make_recipe(recipe, model={"trainable": "heads_only"}, optim={"weight_decay": 0.5}), "run")
    trained = tensors_of(tmp_path / "models/run")
    base = MTPModel.from_causal_lm(build_micro_llama(), horizon=4).state_dict()
    assert trained.keys() == base.keys()
    assert all(trained[name].equal(base[name]) != name.startswith("extra_heads.") for name in base)
    moments = {name for name in tensors_of(tmp_path / "models/run", "optimizer") if name.startswith("model.")}
    assert moments
    assert all(name.startswith("model.extra_heads.") for name in moments)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "models/run/final")
    assert all(tensor.equal(base[f"causal_lm.{name}"]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize(
    ("model", "resumed_at"),
    [
        (HEADS_FIRST, (1, 3)),
        (LORA, (2,)),
        pytest.param(HEADS_FIRST, (2,), marks=pytest.mark.slow),
        pytest.param({**LORA, **HEADS_FIRST}, (1, 3), marks=pytest.mark.slow),
        pytest.param(NF4, (2,), marks=pytest.mark.slow),
        pytest.param({"trainable": "heads_only"}, (2,), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_the_whole_one_in_every_phase(
    model: dict[str, Any], resumed_at: tuple[int, ...], train: Run, tmp_path: Path
) -> None:
    if model is NF4:
        pytest.importorskip("bitsandbytes")
    recipe = make_recipe(model=model, train={"save_every_steps": 1}, optim={"warmup_steps": 2})
    whole = train(recipe, "whole")
    if model is HEADS_FIRST:
        base = MTPModel.from_causal_lm(build_micro_llama(), horizon=4).state_dict()
        for step in (1, 2, 3, 4):
            trained = tensors_of(tmp_path / "models/whole", step=step)
            unchanged = {name for name in base if trained[name].equal(base[name])}
            frozen = {name for name in base if name.startswith("causal_lm.")}
            assert unchanged == (frozen if step <= 2 else set())
    for step in resumed_at:
        folder = tmp_path / f"models/from-{step}"
        shutil.copytree(tmp_path / f"models/whole/step-{step}", folder / f"step-{step}")
        resumed = train(recipe, None, folder)
        assert resumed.metrics["train/loss"] == whole.metrics["train/loss"]
        for group in ("model", "optimizer"):
            one, other = tensors_of(tmp_path / "models/whole", group), tensors_of(folder, group)
            assert one.keys() == other.keys()
            assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("model", [LORA, pytest.param(NF4, marks=pytest.mark.slow)])
def test_a_lora_checkpoint_is_small_and_evaluates_like_the_export(
    model: dict[str, Any], train: Run, tmp_path: Path
) -> None:
    if model is NF4:
        pytest.importorskip("bitsandbytes")
    recipe = make_recipe(model=model)
    data = {"eval": recipe.data.eval.model_copy(update={"sources": ["microcode"]})}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
    outputs = train(recipe, "run")
    stored = tensors_of(tmp_path / "models/run")
    assert sum(tensor.numel() for tensor in stored.values()) == ADAPTERS + 4 * LAYER
    assert not any("embed_tokens" in name or "base_layer" in name for name in stored)
    perplexity = {}
    for checkpoint in ("step-4", "final"):
        evaluated = run_evaluation_pipeline(
            make_config(tmp_path),
            recipe,
            str(tmp_path / "models/run" / checkpoint),
            options=RunOptions(run_name=checkpoint),
        )
        perplexity[checkpoint] = evaluated.metrics
    names = [name for name in outputs.metrics if name.startswith("perplexity")]
    assert names
    for name in names:
        assert perplexity["step-4"][name] == outputs.metrics[name]
        assert perplexity["final"][name] == pytest.approx(outputs.metrics[name], rel=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "models/run/final")
    base = build_micro_llama().state_dict()
    assert plain.state_dict().keys() == base.keys()
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert plain.state_dict()[name].equal(base[name])
    adapted = "model.layers.0.self_attn.q_proj.weight"
    assert not plain.state_dict()[adapted].equal(base[adapted])


def test_adapters_are_not_put_on_another_base(train: Run, tmp_path: Path) -> None:
    recipe = make_recipe(model=LORA)
    train(recipe, "run")
    build_micro_llama(seed=1).save_pretrained(tmp_path / "other")
    micro_tokenizer().save_pretrained(tmp_path / "other")
    step = tmp_path / "models/run/step-4"
    config = make_config(tmp_path, str(tmp_path / "other"))
    with pytest.raises(ModelLoadError, match=r"another base model: .* \(lm_head.weight"):
        run_evaluation_pipeline(config, recipe, str(step), options=RunOptions(run_name="eval"))
    longer = make_recipe(model=LORA, train={"max_steps": NUM_STEPS + 1})
    with pytest.raises(ModelLoadError, match=r"model\.base_id or paths\.models\.base"):
        train(longer, None, step, base=str(tmp_path / "other"))
    with pytest.raises(ModelLoadError, match="the checkpoint has LoRA adapters and the recipe has none"):
        run_evaluation_pipeline(config, make_recipe(), str(step), options=RunOptions(run_name="eval"))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"trainable": "heads_only"}, 3 * LAYER),
        (HEADS_FIRST, 7 * LAYER + 2 * 512 * 96 + 96),
        (LORA, ADAPTERS + 4 * LAYER),
    ],
)
def test_a_dry_run_says_how_many_parameters_learn(
    model: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    facts = run_training_pipeline(make_config(tmp_path), make_recipe(model=model), True).dry_run
    assert facts is not None
    assert facts["trained parameters"] == expected


def test_an_unknown_target_is_told_before_training(train: Run, tmp_path: Path) -> None:
    recipe = make_recipe(model={"lora": {"rank": 4, "target_modules": ["c_attn"]}})
    with pytest.raises(UserInputError, match=r"'c_attn'[\s\S]*down_proj, gate_proj, k_proj"):
        train(recipe, "run")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"trainable": "heads_only", "mtp": {"horizon": 1}}}, "model.trainable"),
        ({"model": {**HEADS_FIRST, "mtp": {"horizon": 1}}}, "model.trainable"),
        ({"model": {"trainable": "heads_only", "mtp": {"adapter": "fallback"}}}, "model.trainable"),
        ({"model": {"trainable": "heads_only", "mtp": {"adapter": "teacher_forcing"}}}, "model.trainable"),
        ({"model": {"trainable": "heads_only", **LORA}}, "model.lora"),
        (
            {"model": {"trainable": "heads_then_all", "warmup_head_steps": NUM_STEPS}},
            "model.warmup_head_steps",
        ),
        ({"model": {"warmup_head_steps": 1}}, "model.warmup_head_steps"),
        (
            {"model": {"trainable": "heads_only"}, "critic": {"value_loss_into_trunk": True}},
            "critic.value_loss_into_trunk",
        ),
    ],
)
def test_what_contradicts_itself_is_a_settings_error(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_recipe(**sections)
    assert [violation.key for violation in caught.value.errors()[0]["ctx"]["violations"]] == [key]


@pytest.mark.parametrize(
    "lora", [{"rank": 0}, {"rank": 4, "quantization": "int8"}, {"rank": 4, "dropout": 1.0}]
)
def test_adapters_out_of_bounds_are_a_settings_error(lora: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"model\.lora"):
        make_recipe(model={"lora": lora})
