"""Tensors in files: what is there, and whether it is what a module needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from wmtp.exceptions import ModelLoadError


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a safetensors file, from its header alone.

    Raises:
        ModelLoadError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            return {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{file} is not a readable safetensors file: {error}",
            remedy="the file is damaged; fetch or save it again",
        ) from error


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(
    source: object, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the tensors a module needs with those a file has; both must be the same, name by name.

    Args:
        source: the file, for the message.
        wanted: name -> shape of what is needed.
        found: name -> shape of what is there.

    Raises:
        ModelLoadError: naming the file and the first tensor that is missing, misshapen or belongs to nothing.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise ModelLoadError(
                f"{source} lacks the tensor {name!r}", remedy="the file is incomplete; save it again"
            )
        if found[name] != shape:
            raise ModelLoadError(
                f"{source}: tensor {name!r} has shape {list(found[name])}, the model needs {list(shape)}",
                remedy="the file belongs to a model of another size",
            )
    for name in found:
        if name not in wanted:
            raise ModelLoadError(
                f"{source} has the unexpected tensor {name!r}", remedy="the file is of another model"
            )
