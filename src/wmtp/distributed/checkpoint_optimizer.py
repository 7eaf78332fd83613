"""Optimizer state as named tensors and JSON, and exactly back.

torch numbers parameters by position; here they are stored by name, so that a changed order of parameter
groups cannot silently give one parameter the moments of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from wmtp.exceptions import CheckpointError


def flatten_optimizer_state(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Parameter]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors and JSON values.

    Args:
        optimizer: any torch optimizer whose state values are tensors, numbers, strings, booleans or None.
        named_parameters: names of at least all parameters of the optimizer, as `model.named_parameters()`
            gives them.

    Returns:
        `(tensors, state)`: tensors are keyed `<parameter name>:<state key>`, e.g. `lm_head.weight:exp_avg`,
        and `group.<i>:<option>` for options that are tensors; `state` goes into the checkpoint's JSON state.
    """
    names = _names_by_parameter(optimizer, named_parameters)
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(optimizer.param_groups):
        options: dict[str, Any] = {}
        for key, value in group.items():
            if key == "params":
                continue
            if isinstance(value, Tensor):
                tensors[f"group.{index}:{key}"] = value
            else:
                options[key] = _encode(value)
        groups.append({"params": [names[parameter] for parameter in group["params"]], "options": options})
    for parameter, slots in optimizer.state.items():
        name = names[parameter]
        values[name] = {}
        for key, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{name}:{key}"] = value
            else:
                values[name][key] = _encode(value)
    return tensors, {"groups": groups, "values": values}


@torch.no_grad()
def restore_optimizer_state(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Parameter]],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Put back what `flatten_optimizer_state` returned, bit for bit, by parameter name.

    The tensors are the optimizer's from then on: it keeps those that need no conversion and changes them in
    place.

    Raises:
        CheckpointError: the parameter groups hold other parameters than the saved ones, or a state has
            another shape.
    """
    names = _names_by_parameter(optimizer, named_parameters)
    _check_groups(optimizer, names, state["groups"])
    slots: dict[str, dict[str, Any]] = {
        name: {key: _decode(value) for key, value in values.items()}
        for name, values in state["values"].items()
    }
    group_tensors: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(state["groups"]))}
    for full_name, tensor in tensors.items():
        owner, _, key = full_name.rpartition(":")
        if owner in slots:
            slots[owner][key] = tensor
        else:
            group_tensors[int(owner.removeprefix("group."))][key] = tensor

    indices = {
        name: index
        for index, name in enumerate(
            names[parameter] for group in optimizer.param_groups for parameter in group["params"]
        )
    }
    groups = []
    for index, saved in enumerate(state["groups"]):
        options = {key: _decode(value) for key, value in saved["options"].items()}
        members = [indices[name] for name in saved["params"]]
        groups.append({**options, **group_tensors[index], "params": members})
    by_index = {indices[name]: values for name, values in slots.items()}
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})
    _undo_casts(optimizer, names, slots)


def make_optimizer_tensor(
    parameters: Mapping[str, Parameter],
) -> Callable[[str, torch.Size, torch.dtype], Tensor]:
    """What a saved tensor of the optimizer is read into: sharded where its parameter of that shape is."""

    def make(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        parameter = parameters.get(name.rpartition(":")[0])
        if isinstance(parameter, DTensor) and parameter.shape == shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype)

    return make


def _undo_casts(
    optimizer: Optimizer, names: Mapping[Tensor, str], slots: Mapping[str, Mapping[str, Any]]
) -> None:
    # load_state_dict casts state to the parameter's dtype: fp32 moments of a bf16 parameter would lose bits.
    for parameter, loaded in optimizer.state.items():
        for key, value in loaded.items():
            saved = slots[names[parameter]][key]
            if isinstance(value, Tensor) and value.dtype != saved.dtype:
                loaded[key] = saved.to(device=value.device)


def _names_by_parameter(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Parameter]]
) -> dict[Tensor, str]:
    # Parameters hash by identity; a tied parameter keeps its first name.
    names: dict[Tensor, str] = {}
    for name, parameter in named_parameters:
        names.setdefault(parameter, name)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"named_parameters lacks a parameter of the optimizer, of shape {tuple(parameter.shape)}"
                )
    return names


def _check_groups(optimizer: Optimizer, names: Mapping[Tensor, str], saved: list[dict[str, Any]]) -> None:
    present = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    expected = [list(group["params"]) for group in saved]
    if [sorted(group) for group in present] == [sorted(group) for group in expected]:
        for group, members in zip(optimizer.param_groups, expected, strict=True):
            # The saved order, so that index i means the same parameter on both sides.
            by_name = {names[parameter]: parameter for parameter in group["params"]}
            group["params"] = [by_name[name] for name in members]
        return
    flat_present = {name for group in present for name in group}
    flat_expected = {name for group in expected for name in group}
    missing, unexpected = sorted(flat_expected - flat_present), sorted(flat_present - flat_expected)
    raise CheckpointError(
        "The optimizer's parameters are not those of the checkpoint: "
        f"{len(missing)} saved ones are missing here {missing[:3]}, "
        f"{len(unexpected)} here were not saved {unexpected[:3]}, "
        f"parameter groups {len(present)} here and {len(expected)} saved.",
        remedy="Resume with the recipe of the checkpoint (same model, horizon, heads and trainable parts).",
    )


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"optimizer state of type {type(value).__name__} cannot be stored as JSON")


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(_decode(item) for item in value["tuple"])
    return value
