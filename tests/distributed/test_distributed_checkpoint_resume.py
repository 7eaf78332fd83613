"""What a checkpoint must hold for a resume to be exact: optimizer and random state."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from wmtp.distributed.checkpoint import save_checkpoint
from wmtp.distributed.checkpoint_optimizer import (
    flatten_optimizer_state,
    make_optimizer_tensor,
    restore_optimizer_state,
)
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.checkpoint_rng import capture_rng_state, restore_rng_state
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.exceptions import CheckpointError


def _model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 3))
    return model.to(dtype)


def _optimizer(model: nn.Module, **options: object) -> torch.optim.AdamW:
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **options)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> list[str]:
    losses = []
    for _ in range(num_steps):
        # Draws from all three generators, so that each one's state matters.
        scale = random.random() + float(np.random.normal()) + random.gauss(0, 1)
        inputs = torch.randn(4, 6, dtype=next(model.parameters()).dtype) * scale
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    return losses


def _seed() -> None:
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True}, {"foreach": True}])
def test_five_steps_save_load_five_steps_equal_ten_bit_for_bit(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    model = _model()
    optimizer = _optimizer(model, **options)
    _seed()
    expected = _train(model, optimizer, 10)
    expected_weights = copy.deepcopy(model.state_dict())

    model = _model()
    optimizer = _optimizer(model, **options)
    _seed()
    losses = _train(model, optimizer, 5)
    optimizer_tensors, optimizer_state = flatten_optimizer_state(optimizer, model.named_parameters())
    groups = {"model": model.state_dict(), "optimizer": optimizer_tensors, "rng": capture_rng_state()}
    store = LocalStore(tmp_path)
    info = save_checkpoint(store, 5, tensors=groups, state={"optimizer": optimizer_state})

    torch.randn(99)
    random.seed(0)
    np.random.seed(0)
    model = _model()
    optimizer = _optimizer(model, **options)
    checkpoint = Checkpoint(store, info.name)
    checkpoint.load_into({"model": model.state_dict()})
    named = dict(model.named_parameters())
    moments = checkpoint.read("optimizer", make=make_optimizer_tensor(named))
    restore_optimizer_state(optimizer, named.items(), moments, checkpoint.state["optimizer"])
    restore_rng_state(checkpoint.read("rng"))
    losses += _train(model, optimizer, 5)
    assert losses == expected
    assert all(torch.equal(value, expected_weights[name]) for name, value in model.state_dict().items())


def test_an_optimizer_comes_back_exactly_before_and_after_its_first_step() -> None:
    model = _model()
    optimizer = _optimizer(model)
    for num_steps in (0, 2):
        _train(model, optimizer, num_steps)
        tensors, state = flatten_optimizer_state(optimizer, model.named_parameters())
        fresh = _optimizer(model)
        restore_optimizer_state(fresh, model.named_parameters(), tensors, state)
        old, new = optimizer.state_dict(), fresh.state_dict()
        assert old["param_groups"] == new["param_groups"]
        assert type(new["param_groups"][0]["betas"]) is tuple
        assert old["state"].keys() == new["state"].keys()
        for index, slots in old["state"].items():
            assert all(torch.equal(value, new["state"][index][key]) for key, value in slots.items())


def test_restored_state_takes_the_tensors_that_were_read_without_a_copy() -> None:
    model = _model()
    optimizer = _optimizer(model)
    _train(model, optimizer, 1)
    tensors, state = flatten_optimizer_state(optimizer, model.named_parameters())
    read = {name: tensor.clone() for name, tensor in tensors.items()}
    fresh = _optimizer(model)
    restore_optimizer_state(fresh, model.named_parameters(), read, state)
    held = {slot.data_ptr() for slots in fresh.state.values() for slot in slots.values()}
    assert {tensor.data_ptr() for name, tensor in read.items() if "exp_avg" in name} <= held


def test_fp32_moments_of_bf16_parameters_keep_all_their_bits() -> None:
    model = _model(torch.bfloat16)
    optimizer = _optimizer(model)
    for parameter in model.parameters():
        moment = torch.randn(parameter.shape, dtype=torch.float32)
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": moment,
            "exp_avg_sq": moment.square(),
        }
    tensors, state = flatten_optimizer_state(optimizer, model.named_parameters())
    fresh = _optimizer(model)
    restore_optimizer_state(fresh, model.named_parameters(), tensors, state)
    for parameter in model.parameters():
        assert torch.equal(fresh.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
        assert fresh.state[parameter]["exp_avg"].dtype == torch.float32


def test_moments_follow_names_when_the_order_of_parameters_changes() -> None:
    model = _model()
    forward = torch.optim.AdamW(list(model.parameters()))
    _train(model, forward, 1)
    tensors, state = flatten_optimizer_state(forward, model.named_parameters())
    backward = torch.optim.AdamW(list(model.parameters())[::-1])
    restore_optimizer_state(backward, model.named_parameters(), tensors, state)
    for parameter in model.parameters():
        assert torch.equal(backward.state[parameter]["exp_avg"], forward.state[parameter]["exp_avg"])


def test_a_tensor_learning_rate_comes_back() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25), capturable=False, foreach=False)
    tensors, state = flatten_optimizer_state(optimizer, model.named_parameters())
    fresh = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5), foreach=False)
    restore_optimizer_state(fresh, model.named_parameters(), tensors, state)
    assert torch.equal(fresh.param_groups[0]["lr"], torch.tensor(0.25))


def test_other_parameters_are_refused_by_name() -> None:
    model = _model()
    optimizer = _optimizer(model)
    tensors, state = flatten_optimizer_state(optimizer, model.named_parameters())
    other = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with pytest.raises(CheckpointError, match=r"3\.weight.*1\.weight"):
        restore_optimizer_state(_optimizer(other), other.named_parameters(), tensors, state)


def test_a_parameter_without_a_name_is_refused() -> None:
    model = _model()
    with pytest.raises(ValueError, match=r"shape \(8, 6\)"):
        flatten_optimizer_state(_optimizer(model), list(model.named_parameters())[1:])


def test_random_states_are_integers_and_exact_with_a_cached_normal_draw() -> None:
    _seed()
    random.gauss(0, 1)
    np.random.normal()
    torch.randn(3)
    states = capture_rng_state()
    assert {tensor.dtype for tensor in states.values()} <= {torch.int64, torch.uint8}

    def draw() -> list[float]:
        return [
            random.gauss(0, 1),
            random.random(),
            np.random.normal(),
            np.random.rand(),
            float(torch.randn(1)),
        ]

    expected = [draw() for _ in range(3)]
    restore_rng_state(states)
    assert [draw() for _ in range(3)] == expected


def test_damaged_random_states_are_a_clear_error() -> None:
    states = capture_rng_state()
    with pytest.raises(CheckpointError, match="random states"):
        restore_rng_state({name: state for name, state in states.items() if name != "numpy"})
    with pytest.raises(CheckpointError, match="random states"):
        restore_rng_state({**states, "python": states["python"][:100]})
