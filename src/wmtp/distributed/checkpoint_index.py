"""`index.json` of a checkpoint: where each tensor or part of one is, and which names mean one tensor.

    {"tensors": {"model/lm_head.weight": {
        "dtype": "F32", "shape": [V, D], "chunks": [
            {"offsets": [0, 0], "sizes": [V, D], "file": "model.safetensors", "key": "lm_head.weight"}]}},
     "aliases": {"model": {"embed.weight": "lm_head.weight"}}}

What it says decides how much memory is taken and where bytes go, so it is believed only where it agrees with
itself and with the files of the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from wmtp.distributed.safetensors_stream import dtype_named

Chunk = dict[str, Any]
Index = dict[str, dict[str, Any]]

_MAX_DIMS = 64
# Strides and sizes in bytes must fit 64 bits, also where another dimension is 0.
_MAX_ELEMENTS = 2**59


def check_index(content: object, sizes: Mapping[str, int]) -> tuple[Index, dict[str, dict[str, str]]]:
    """Check the content of an `index.json`.

    Args:
        content: what was parsed.
        sizes: bytes of each file that the manifest lists.

    Returns:
        `(tensors, aliases)`.

    Raises:
        ValueError: its form is another one, it names a file that the manifest does not list, the parts of a
            tensor leave gaps or overlap, or it claims more bytes than the files have.
    """
    if not isinstance(content, dict) or content.keys() != {"tensors", "aliases"}:
        raise ValueError("it does not list tensors and aliases")
    tensors, aliases = content["tensors"], content["aliases"]
    if not isinstance(tensors, dict) or not isinstance(aliases, dict):
        raise ValueError("it does not list tensors and aliases by name")
    left = dict(sizes)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, left)
    for group, names in aliases.items():
        _check_aliases(group, names, tensors)
    return tensors, aliases


def _check_tensor(name: str, tensor: object, left: dict[str, int]) -> None:
    """Check one tensor; `left` are the bytes of each file that no tensor before it has claimed."""
    if not isinstance(tensor, dict) or tensor.keys() != {"dtype", "shape", "chunks"} or "/" not in name:
        raise ValueError(f"{name!r} is not described as a tensor")
    shape, chunks = tensor["shape"], tensor["chunks"]
    if not _are_counts(shape) or not isinstance(chunks, list) or not isinstance(tensor["dtype"], str):
        raise ValueError(f"{name} has no shape, dtype or chunks that could be")
    num_bytes = dtype_named(tensor["dtype"]).itemsize
    for chunk in chunks:
        if not isinstance(chunk, dict) or chunk.keys() != {"offsets", "sizes", "file", "key"}:
            raise ValueError(f"{name} has a chunk of another form")
        if not all(_are_counts(chunk[key]) and len(chunk[key]) == len(shape) for key in ("offsets", "sizes")):
            raise ValueError(f"{name} has a chunk whose offsets or sizes do not fit its shape")
        file = chunk["file"]
        if not isinstance(chunk["key"], str) or not isinstance(file, str) or file not in left:
            raise ValueError(f"{name} is in {file!r}, which the manifest does not list")
        left[file] -= prod(chunk["sizes"]) * num_bytes
        if left[file] < 0:
            raise ValueError(f"{name} claims more bytes than {file} has")
    if not _are_tiles([chunk for chunk in chunks if all(chunk["sizes"])], shape):
        raise ValueError(f"the chunks of {name} leave gaps, overlap or go past its shape {shape}")


def _are_tiles(chunks: Sequence[Chunk], shape: Sequence[int]) -> bool:
    """Whether chunks that hold something cut a tensor along its dimensions, each part there once."""
    if not all(shape):
        return not chunks
    num_cells = 1
    for dim, length in enumerate(shape):
        end = 0
        cuts = sorted({(chunk["offsets"][dim], chunk["sizes"][dim]) for chunk in chunks})
        for offset, size in cuts:
            if offset != end:
                return False
            end += size
        if end != length:
            return False
        num_cells *= len(cuts)
    return len(chunks) == num_cells == len({tuple(chunk["offsets"]) for chunk in chunks})


def _check_aliases(group: str, names: object, tensors: Mapping[str, Any]) -> None:
    if not isinstance(names, dict):
        raise ValueError(f"the aliases of {group!r} are not listed by name")
    for name, kept in names.items():
        if not isinstance(kept, str) or f"{group}/{kept}" not in tensors or f"{group}/{name}" in tensors:
            raise ValueError(f"{group}/{name} is said to be {kept!r}, which is no tensor beside it")


def _are_counts(value: object) -> bool:
    """Whether this can be a shape: few whole numbers that are not negative, of a size that can be."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMS
        and all(type(item) is int and 0 <= item <= _MAX_ELEMENTS for item in value)
        and prod(max(item, 1) for item in value) <= _MAX_ELEMENTS
    )
