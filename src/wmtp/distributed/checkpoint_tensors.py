"""Groups of tensors as safetensors files, with tied tensors stored once.

Nothing here can run code when it is read: a file holds numbers, names and shapes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wmtp.exceptions import CheckpointError

TensorGroup = dict[str, Tensor]


def write_group(path: Path, group: Mapping[str, Tensor]) -> dict[str, str]:
    """Write one group to a safetensors file, bit for bit, whatever the dtype.

    Returns:
        Aliases: name -> the name under which the same memory was stored. Tied embeddings are the usual case;
            two names for
        one tensor come back as one tensor.
    """
    stored: TensorGroup = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[object, ...], str] = {}
    for name in sorted(group):
        tensor = group[name].detach()
        identity = (
            tensor.device,
            tensor.dtype,
            tensor.data_ptr(),
            tuple(tensor.shape),
            tuple(tensor.stride()),
        )
        if tensor.numel() and identity in first_name:
            aliases[name] = first_name[identity]
            continue
        first_name[identity] = name
        stored[name] = tensor.cpu().contiguous()
    _separate_storages(stored)
    try:
        save_file(stored, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} of the checkpoint could not be written: {error}",
            remedy=f"Check free space and permissions of {path.parent.parent}; earlier saves are untouched.",
        ) from error
    return aliases


def read_group(path: Path, aliases: Mapping[str, str]) -> TensorGroup:
    """Read a file that `write_group` wrote, onto the CPU; `aliases` is what it returned."""
    try:
        group: TensorGroup = load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {error}", remedy="Resume from another checkpoint."
        ) from error
    for name, source in aliases.items():
        group[name] = group[source]
    return group


def _separate_storages(stored: TensorGroup) -> None:
    # Views that overlap without being the same tensor (rows of one buffer): safetensors refuses shared
    # memory.
    seen: set[int] = set()
    for name, tensor in stored.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen:
            stored[name] = tensor.clone()
        elif tensor.numel():
            seen.add(pointer)
