"""What the models themselves accept, refuse and default to."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from wmtp.settings import Config, LossSettings, OptimSettings, Recipe
from wmtp.settings.fields import list_fields


def make_recipe(**sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "train": {"algo": "baseline-mtp", "max_steps": 100},
        "data": {"train": {"sources": ["microcode"]}},
    }
    return Recipe.model_validate({**base, **sections})


def test_defaults_are_those_of_the_contract() -> None:
    recipe = make_recipe()
    assert recipe.model.mtp.horizon == 4
    assert recipe.data.train.batch_size == 1
    assert recipe.data.train.max_tokens_per_batch is None
    assert (recipe.loss.lambda_, recipe.loss.scale, recipe.loss.temperature) == (1.0, 1.0, 0.7)
    assert (recipe.loss.epsilon, recipe.loss.w_max) == (0.05, 3.0)
    assert (recipe.rho1.percentile_top_p, recipe.rho1.ratio, recipe.rho1.alpha) == (0.15, 0.6, 0.0)
    assert (recipe.critic.gamma, recipe.critic.lambda_, recipe.critic.strength) == (1.0, 0.95, "calibrated")
    assert recipe.eval.types == ["meta-mtp"]
    assert recipe.eval.k == [1, 10, 100]
    assert Config().paths.output == "runs"
    assert Config().s3.region == "eu-north-1"


def test_config_and_recipe_share_no_top_level_key() -> None:
    assert not set(Config.model_fields) & set(Recipe.model_fields)


def test_lambda_is_written_lambda_and_read_lambda_() -> None:
    recipe = make_recipe(loss={"lambda": 0.5}, critic={"lambda": 0.25})
    assert (recipe.loss.lambda_, recipe.critic.lambda_) == (0.5, 0.25)
    dump = recipe.model_dump(mode="json")
    assert (dump["loss"]["lambda"], dump["critic"]["lambda"]) == (0.5, 0.25)
    with pytest.raises(ValidationError):
        LossSettings.model_validate({"lambda_": 0.5})


def test_a_dump_is_read_back_as_the_same_settings() -> None:
    recipe = make_recipe(model={"mtp": {"offsets": [1, 2, 4, 8]}, "lora": {"rank": 4}})
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    config = Config.model_validate({"paths": {"models": {"base": "x"}}})
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_settings_do_not_change_after_they_are_checked() -> None:
    with pytest.raises(ValidationError):
        make_recipe().train.max_steps = -1


def test_a_section_with_nothing_under_it_has_its_defaults() -> None:
    assert make_recipe(loss=None).loss == LossSettings()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e-3, "1e-3", True, None])
def test_learning_rate_is_a_finite_number_above_zero(value: object) -> None:
    with pytest.raises(ValidationError):
        OptimSettings.model_validate({"lr": value})


@pytest.mark.parametrize(
    ("section", "field", "bad"),
    [
        ("loss", "lambda", 1.01),
        ("loss", "temperature", 0.0),
        ("loss", "epsilon", 1.0),
        ("loss", "w_max", 1.0),
        ("loss", "scale", 0.0),
        ("rho1", "percentile_top_p", 0.0),
        ("rho1", "percentile_top_p", 1.1),
        ("rho1", "alpha", -0.1),
        ("rho1", "ratio", 0.0),
        ("critic", "gamma", 0.0),
        ("critic", "lambda", 1.5),
        ("critic", "min_explained_variance", 1.5),
        ("optim", "betas", [0.9]),
        ("optim", "betas", [0.9, 1.0]),
        ("optim", "grad_clip", 0.0),
        ("optim", "decay_ratio", 0.0),
        ("eval", "k", [0]),
        ("eval", "k", []),
        ("eval", "temperatures", [-0.5]),
        ("eval", "temperatures", []),
        ("eval", "types", ["pass@1"]),
        ("eval", "num_samples", 0),
        ("eval", "top_p", 0.0),
        ("model", "mtp", {"horizon": 0}),
        ("model", "mtp", {"horizon": 65}),
        ("model", "mtp", {"horizon": 4.0}),
        ("model", "mtp", {"horizon": True}),
        ("model", "base_id", ""),
        ("model", "lora", {"alpha": 8.0}),
        ("train", "seed", 2**32),
    ],
)
def test_a_value_out_of_bounds_is_refused(section: str, field: str, bad: object) -> None:
    base = {"algo": "baseline-mtp", "max_steps": 100} if section == "train" else {}
    with pytest.raises(ValidationError):
        make_recipe(**{section: {**base, field: bad}})


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": {"algo": "mtp-weighted-ce", "max_steps": 1}}, "train.scorer"),
        ({"train": {"algo": "rho1-wmtp", "max_steps": 1, "scorer": "dft"}}, "train.scorer"),
        ({"data": {"train": {"sources": ["x"], "max_length": 4}}}, "model.mtp.horizon"),
        (
            {"data": {"train": {"sources": ["x"], "max_tokens_per_batch": 9}}},
            "data.train.max_tokens_per_batch",
        ),
        ({"optim": {"warmup_steps": 101}}, "optim.warmup_steps"),
        ({"optim": {"warmup_steps": 81, "scheduler": "wsd"}}, "optim.decay_ratio"),
        ({"rho1": {"reference": "precomputed"}}, "rho1.reference_scores"),
        ({"critic": {"reward": {"granularity": "token"}}}, "critic.reward.granularity"),
        ({"model": {"mtp": {"offsets": [1, 2]}}}, "model.mtp.offsets"),
        ({"model": {"mtp": {"offsets": [1, 3, 2, 4]}}}, "model.mtp.offsets"),
        ({"model": {"mtp": {"offsets": [2, 3, 4, 5]}}}, "model.mtp.offsets"),
        ({"model": {"mtp": {"offsets": [1, 2, 4, 2048]}}}, "model.mtp.offsets"),
        ({"model": {"trainable": "heads_then_all"}}, "model.warmup_head_steps"),
    ],
)
def test_a_rule_over_several_fields_names_the_key_to_change(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_recipe(**sections)
    assert [violation.key for violation in caught.value.errors()[0]["ctx"]["violations"]] == [key]


def test_the_largest_horizon_that_fits_is_accepted() -> None:
    recipe = make_recipe(
        data={"train": {"sources": ["x"], "max_length": 5}}, optim={"warmup_steps": 80, "scheduler": "wsd"}
    )
    assert recipe.model.mtp.horizon == recipe.data.train.max_length - 1


def test_k_above_the_number_of_samples_is_no_error() -> None:
    assert make_recipe(eval={"k": [1, 100], "num_samples": 1}).eval.k == [1, 100]


@pytest.mark.parametrize(
    "given", [{"access_key_id": "a"}, {"secret_access_key": "a"}, {"session_token": "a"}]
)
def test_an_s3_key_without_the_rest_of_its_credentials_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({"s3": given})


@pytest.mark.parametrize("schema", [Config, Recipe])
def test_every_field_has_one_line_of_documentation(schema: type[Config] | type[Recipe]) -> None:
    for doc in list_fields(schema).values():
        assert 10 < len(doc.description) < 110, doc.key
        assert "\n" not in doc.description, doc.key
        assert doc.description.endswith("."), doc.key


def test_every_required_field_has_an_example_that_is_valid() -> None:
    required = [doc for doc in list_fields(Recipe).values() if doc.is_required and doc.section is None]
    assert {doc.key for doc in required} == {
        "train.algo",
        "train.max_steps",
        "data.train.sources",
        "model.lora.rank",
    }
    assert all(doc.examples for doc in required)
