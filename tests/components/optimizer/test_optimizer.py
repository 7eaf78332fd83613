"""Schedules by their shape, AdamW by its groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wmtp.components.optimizer import AdamWOptimizer, OptimizerContext, learning_rate_factor
from wmtp.exceptions import UserInputError
from wmtp.settings import OptimSettings


def _factors(schedule: str, **options: float) -> list[float]:
    settings = {"max_steps": 20, "warmup_steps": 4, "min_lr_ratio": 0.1, **options}
    return [learning_rate_factor(step, schedule=schedule, **settings) for step in range(20)]  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_warm_up_rises_linearly_to_the_peak(schedule: str) -> None:
    assert _factors(schedule)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
def test_the_last_step_is_at_the_minimum_and_none_before_is_lower(schedule: str) -> None:
    factors = _factors(schedule)
    assert factors[-1] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[-2] > 0.1


def test_wsd_stays_at_the_peak_until_its_decay() -> None:
    factors = _factors("wsd", decay_ratio=0.25)
    assert factors[4:16] == [1.0] * 12
    assert factors[16] < 1.0 or factors[17] < 1.0


def test_cosine_is_half_way_down_in_the_middle() -> None:
    factors = [
        learning_rate_factor(step, schedule="cosine", max_steps=11, min_lr_ratio=0.0) for step in range(11)
    ]
    assert factors[5] == pytest.approx(0.5)


def test_constant_has_no_end() -> None:
    assert _factors("constant")[4:] == [1.0] * 16


def test_only_matrices_decay_and_embeddings_do_not() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    module[2].bias.requires_grad_(False)
    settings = OptimSettings(lr=0.5, weight_decay=0.3)
    bundle = AdamWOptimizer(settings).run(OptimizerContext({"model": module}, 10, {}))
    decay = {
        id(parameter): group["weight_decay"]
        for group in bundle.optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay[id(module[1].weight)] == 0.3
    assert decay[id(module[0].weight)] == decay[id(module[1].bias)] == decay[id(module[2].weight)] == 0.0
    assert id(module[2].bias) not in decay


def test_a_module_may_have_its_own_learning_rate() -> None:
    modules = {"model": nn.Linear(2, 2), "value_head": nn.Linear(2, 1)}
    settings = OptimSettings(lr=0.5, scheduler="constant")
    bundle = AdamWOptimizer(settings).run(OptimizerContext(modules, 10, {"value_head": 0.125}))
    rates = {group["module"]: group["lr"] for group in bundle.optimizer.param_groups}
    assert rates == {"model": 0.5, "value_head": 0.125}


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserInputError, match="trainable"):
        AdamWOptimizer(OptimSettings()).run(
            OptimizerContext({"model": nn.Linear(2, 2).requires_grad_(False)}, 10, {})
        )


def test_a_flagged_step_leaves_parameters_and_moments_alone() -> None:
    # What the non-finite gate relies on: the fused kernel reads `found_inf`.
    module = nn.Linear(3, 3)
    bundle = AdamWOptimizer(OptimSettings(lr=0.1)).run(OptimizerContext({"model": module}, 10, {}))
    before = module.weight.detach().clone()
    module(torch.ones(1, 3)).sum().backward()
    bundle.optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    bundle.optimizer.step()
    assert torch.equal(module.weight, before)
    bundle.optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    bundle.optimizer.step()
    assert not torch.equal(module.weight, before)
