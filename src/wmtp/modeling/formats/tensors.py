"""Tensors in files: what is there, read when it is asked for, and whether it is what a module needs.

Nothing that is read here can run code: safetensors files hold numbers, names and shapes; torch files are read
with `weights_only=True` alone.
"""

from __future__ import annotations

import io
import json
import math
import operator
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.sources import (
    TORCH_SUFFIXES,
    ModelSource,
    check_plain_name,
    read_source_json,
)
from wmtp.modeling.formats.torch_files import load_torch_file, unreadable

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
# In the order of `SINGLE_FILES`: the index of the shards of each.
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# The format's own bound, which its library keeps too.
_MAX_HEADER_BYTES = 100_000_000
_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still in its file; `stored[...]` reads a copy, as with the slices of safetensors.

    Attributes:
        name: its name in the file.
        file: the file, for messages.
        shape: as the file says.
        dtype: as the file says.
        read: gives it. It may share memory with the file: what is kept has to be copied, or it would change
            when the file is written anew.
        becomes: the dtype it is converted to after `stored[...]`, which then leaves the copy to that.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    becomes: torch.dtype | None = None

    def __getitem__(self, index: Any) -> Tensor:
        piece = self.read()[index]
        # Contiguous too: a torch file may hold transposed views, which could be loaded and not be saved.
        if self.becomes not in (None, self.dtype) and piece.is_contiguous():
            return piece
        return piece.clone(memory_format=torch.contiguous_format)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one or several files by name; each is read when it is asked for, and not kept.

    A tensor may share memory with its file, see `StoredTensor.read`.
    """

    def __init__(self, stored: Iterable[StoredTensor]) -> None:
        self._stored = {tensor.name: tensor for tensor in stored}

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def stored(self) -> dict[str, StoredTensor]:
        """The tensors with their files and shapes, unread."""
        return dict(self._stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by the files' headers."""
        return {name: tensor.shape for name, tensor in self._stored.items()}


def open_weights(source: ModelSource) -> StoredTensors:
    """Open the weights of the Hugging Face layout, one file or shards, safetensors before pickle.

    Raises:
        ModelLoadError: no weights; a shard that is missing or outside the folder; a tensor that the index
            lists and its shard lacks; a damaged file. The message names file and tensor.
    """
    names = source.names()
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if single in names:
            return open_tensors(source, single)
        if index in names:
            return _open_shards(source, index)
    raise ModelLoadError(
        f"{source} has no weights ({', '.join(SINGLE_FILES)}, or an index of shards)",
        remedy="copy the whole model directory again",
    )


def open_tensors(source: ModelSource, name: str) -> StoredTensors:
    """Open one file of tensors, safetensors or torch by its ending.

    Raises:
        ModelLoadError: the file is missing, damaged, or would run code.
    """
    if name.endswith(".safetensors"):
        return StoredTensors(_open_safetensors(source, name))
    if name.endswith(TORCH_SUFFIXES):
        return StoredTensors(_open_torch(source, name))
    raise ModelLoadError(
        f"{source}/{name} is no file of tensors by its ending",
        remedy=f"the endings are .safetensors {' '.join(TORCH_SUFFIXES)}",
    )


def read_shard_index(source: ModelSource, name: str) -> dict[str, str]:
    """Read which shard every tensor is in.

    Raises:
        ModelLoadError: the file is no index, or names a shard that is not a plain file name.
    """
    weight_map = read_source_json(source, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{source}/{name} has no weight_map", remedy="fetch or save it again")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ModelLoadError(
                f"{source}/{name} gives tensor {tensor!r} the shard {shard!r}", remedy="fetch it again"
            )
        # A shard index is data from outside: an entry such as ../../x must not leave the folder.
        check_plain_name(f"{source}/{name}", shard)
    return weight_map


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a safetensors file, from its header alone.

    Raises:
        ModelLoadError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            return {name: tuple(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise unreadable(str(file), "safetensors", error) from error


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


def _open_shards(source: ModelSource, index: str) -> StoredTensors:
    weight_map = read_shard_index(source, index)
    names = source.names()
    stored: list[StoredTensor] = []
    for shard in sorted(set(weight_map.values())):
        if shard not in names:
            tensor = next(name for name, file in weight_map.items() if file == shard)
            raise ModelLoadError(
                f"{source}/{shard} is missing; {index} says that it holds {tensor!r} and others",
                remedy="copy the whole model directory again",
            )
        found = open_tensors(source, shard).stored()
        for tensor, file in weight_map.items():
            if file == shard and tensor not in found:
                raise ModelLoadError(
                    f"{source}/{shard} lacks the tensor {tensor!r}, which {index} says it holds",
                    remedy="the files are of different models; copy the whole model directory again",
                )
        stored += (tensor for name, tensor in found.items() if weight_map.get(name, shard) == shard)
    return StoredTensors(stored)


# ------------------------------------------------------------------------------------------- safetensors


def _open_safetensors(source: ModelSource, name: str) -> list[StoredTensor]:
    path = source.find(name)
    if path is not None:
        return _map_safetensors(path)
    stream = source.open(name)
    try:
        return _stream_safetensors(f"{source}/{name}", stream)
    except BaseException:
        stream.close()
        raise


def _map_safetensors(path: Path) -> list[StoredTensor]:
    try:
        reader: Any = safe_open(path, framework="pt")
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise unreadable(str(path), "safetensors", error) from error

    def stored(name: str, piece: Any) -> StoredTensor:
        return StoredTensor(
            name,
            str(path),
            tuple(piece.get_shape()),
            _dtype(str(path), name, piece.get_dtype()),
            lambda: reader.get_tensor(name),
        )

    return [stored(name, piece) for name, piece in slices.items()]


def _stream_safetensors(file: str, stream: BinaryIO) -> list[StoredTensor]:
    """Read the header of a file that is not on this machine; its tensors are ranges of the stream."""
    try:
        header, start, size = _read_header(stream)
        entries = [
            (name, str(entry["dtype"]), tuple(map(operator.index, entry["shape"])), *entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise unreadable(file, "safetensors", error) from error
    lock = threading.Lock()

    def stored(name: str, dtype_name: str, shape: tuple[int, ...], begin: int, end: int) -> StoredTensor:
        dtype = _dtype(file, name, dtype_name)
        num_bytes = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or not 0 <= begin <= end <= size or end - begin != num_bytes:
            problem = f"its header gives tensor {name!r} {list(shape)} the bytes {begin} to {end} of {size}"
            raise unreadable(file, "safetensors", problem)

        def read() -> Tensor:
            with lock:  # several threads read, and the stream has one position
                stream.seek(start + begin)
                content = bytearray(stream.read(num_bytes))
            if len(content) != num_bytes:
                raise unreadable(file, "safetensors", f"it ends within tensor {name!r}")
            if not content:
                return torch.empty(shape, dtype=dtype)
            return torch.frombuffer(content, dtype=dtype).reshape(shape)

        return StoredTensor(name, file, shape, dtype, read)

    return [stored(*entry) for entry in entries]


def _read_header(stream: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """Return the header, where the tensors start, and how many bytes of tensors there are."""
    total = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if total < 8 or length > min(_MAX_HEADER_BYTES, total - 8):
        raise ValueError(f"it says that its header has {length} bytes, and it has {total} altogether")
    header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, 8 + length, total - 8 - length


def _dtype(file: str, name: str, dtype: str) -> torch.dtype:
    if dtype not in _SAFETENSORS_DTYPES:
        raise ModelLoadError(
            f"{file}: tensor {name!r} has the number format {dtype!r}, which cannot be read",
            remedy="use a model in bf16, fp16 or fp32",
        )
    return _SAFETENSORS_DTYPES[dtype]


# ------------------------------------------------------------------------------------------- torch files


def _open_torch(source: ModelSource, name: str) -> list[StoredTensor]:
    loaded = load_torch_file(source, name)
    file = f"{source}/{name}"
    if not isinstance(loaded, dict):
        raise unreadable(file, "torch", f"it holds {type(loaded).__name__}, not tensors by name")
    return [stored_in_torch(file, tensor_name, value) for tensor_name, value in loaded.items()]


def stored_in_torch(file: str, name: object, value: object) -> StoredTensor:
    """Take an entry of a torch file for a tensor.

    Raises:
        ModelLoadError: it is none, or claims more numbers than the file has.
    """
    if not isinstance(name, str) or not isinstance(value, Tensor):
        problem = f"the entry {name!r} is {type(value).__name__}, not a tensor"
        raise unreadable(file, "torch", problem)
    tensor = value.detach()
    is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    # A few bytes with strides of 0 can claim any size, which a copy would then have.
    if not is_plain or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        problem = f"tensor {name!r} {list(tensor.shape)} is not stored as plain numbers of this many"
        raise unreadable(file, "torch", problem)
    return StoredTensor(name, file, tuple(tensor.shape), tensor.dtype, lambda: tensor)


@contextmanager
def disk_errors_of_safetensors(path: Path) -> Iterator[None]:
    """Raise what a disk answers to safetensors as the OSError it is, with `path` as its file."""
    try:
        yield
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
