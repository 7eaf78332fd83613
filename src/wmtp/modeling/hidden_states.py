"""Finding the last hidden states in whatever a model returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from wmtp.exceptions import UserInputError

FIELDS = ("hidden_states", "last_hidden_state")


def extract_hidden_states(outputs: Any) -> Tensor:
    """Return the hidden states of the last layer, [B,S,D].

    Args:
        outputs: a mapping or an object with `hidden_states` (a tensor, or a list with one tensor a layer, of
            which the last is taken) or, where that is absent or None, `last_hidden_state`; or a tuple that
            holds a list of layers, or tensors of which those with three dimensions are taken as layers.

    Raises:
        UserInputError: (a ValueError) nothing of shape [B,S,D] is there; the message lists what was there.
    """
    if isinstance(outputs, Mapping):
        return _from_fields(dict(outputs), outputs)
    if isinstance(outputs, Sequence) and not isinstance(outputs, str):
        return _from_sequence(outputs)
    # By contract any object may come in, so this is the one place that has to ask what it has.
    return _from_fields({name: getattr(outputs, name, None) for name in FIELDS}, outputs)


def _from_fields(fields: dict[str, Any], outputs: Any) -> Tensor:
    for name in FIELDS:
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, Sequence):
            if not value:
                raise _error(f"`{name}` is an empty list", outputs)
            value = value[-1]
        if not _is_hidden(value):
            raise _error(f"`{name}` must be [B,S,D], got {_describe(value)}", outputs)
        return value
    raise _error("no `hidden_states` and no `last_hidden_state`", outputs)


def _from_sequence(outputs: Sequence[Any]) -> Tensor:
    for item in outputs:
        if isinstance(item, Sequence) and item and all(_is_hidden(layer) for layer in item):
            last: Tensor = item[-1]
            return last
    candidates = [item for item in outputs if _is_hidden(item)]
    if not candidates:
        raise _error("no tensor of shape [B,S,D]", outputs)
    if len({tuple(item.shape) for item in candidates}) > 1:
        raise _error("several tensors with three dimensions and different shapes", outputs)
    return candidates[-1]


def _is_hidden(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _error(problem: str, outputs: Any) -> UserInputError:
    return UserInputError(
        f"hidden states not found: {problem}. The output holds: {_list_contents(outputs)}",
        remedy="call the model with output_hidden_states=True, or pass a dict with `hidden_states`",
    )


def _list_contents(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        items = [f"{key}: {_describe(value)}" for key, value in outputs.items()]
    elif isinstance(outputs, Sequence):
        items = [f"[{index}]: {_describe(value)}" for index, value in enumerate(outputs)]
    else:
        names = [name for name in dir(outputs) if not name.startswith("_")]
        items = [f"{type(outputs).__name__} with attributes {', '.join(names) or 'none'}"]
    return ", ".join(items) or "nothing"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__name__} {list(value.shape)} {value.dtype}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        inner = f" of {_describe(value[-1])}" if value else ""
        return f"{type(value).__name__} with {len(value)} items{inner}"
    return type(value).__name__
