"""safetensors as streams: tensors written one after the other, and read front to back straight into place.

The library reads and writes whole files on local disks; a checkpoint also goes to and comes from object
stores, and is hashed on the way. The format is the library's own: eight bytes that say how long the header
is, a JSON header, the bytes of the tensors. Nothing in a file can run code, and no number in it is believed:
a reader knows from elsewhere what the file must hold, and takes only the header that says so.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

_ALIGNMENT = 8
_METADATA = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class ByteSource(Protocol):
    """Bytes that are read front to back, into memory of the reader's."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the beginning of `buffer`; how many bytes that were, 0 at the end."""


class ByteSink(Protocol):
    """Takes bytes, all that it is given."""

    def write(self, content: bytes | memoryview, /) -> int:
        """Take everything and return how much that was."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: its name, form, and where its bytes begin, counted from the end of the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes it takes."""
        return prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """What the format calls a dtype.

    Raises:
        TypeError: the format has no such dtype.
    """
    if dtype not in _NAMES:
        raise TypeError(f"tensors of {dtype} cannot be stored in safetensors files")
    return _NAMES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """The dtype behind a name of the format; a ValueError for an unknown one."""
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}")
    return _DTYPES[name]


def plan_file(forms: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> tuple[bytes, list[StoredTensor]]:
    """Lay out a file: its header, and its tensors in the order their bytes must follow.

    Wide dtypes come first, as in the library, so that every tensor starts at a multiple of its item size.

    Raises:
        ValueError: two have one name, or a name means something else in the format.
    """
    names = {name for name, _, _ in forms}
    if len(names) != len(forms) or _METADATA in names:
        raise ValueError(f"tensor names of a file must differ from each other and from {_METADATA}")
    header: dict[str, object] = {_METADATA: {"format": "pt"}}
    entries = []
    start = 0
    for name, dtype, shape in sorted(forms, key=lambda form: (-form[1].itemsize, form[0])):
        entry = StoredTensor(name, dtype, tuple(shape), start)
        stop = start + entry.num_bytes
        header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [start, stop]}
        entries.append(entry)
        start = stop
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return struct.pack("<Q", len(raw)) + raw, entries


def write_tensors(file: ByteSink, header: bytes, tensors: Iterable[Tensor]) -> None:
    """Write what `plan_file` laid out; `tensors` in its order, taken one at a time, of any device."""
    file.write(header)
    for tensor in tensors:
        file.write(tensor_bytes(tensor.detach().cpu().contiguous()))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes, without a copy."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def read_into(stream: ByteSource, view: memoryview) -> None:
    """Fill `view` from the stream; a ValueError when the stream ends before."""
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise ValueError(f"it ends {len(view) - done} bytes early")
        done += count
