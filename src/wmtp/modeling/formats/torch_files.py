"""Torch files, opened without running anything of them."""

from __future__ import annotations

import io
import re
import zipfile
from typing import Any, BinaryIO

import torch

from wmtp.exceptions import ModelLoadError
from wmtp.modeling.formats.sources import ModelSource

# A torch file's pickle holds names and shapes, about 100 bytes a tensor; tensors are records of their own.
_MAX_PICKLE_BYTES = 256 * 2**20
_FETCH_AGAIN = "the file is damaged; fetch or save it again"


def load_torch_file(source: ModelSource, name: str) -> Any:
    """Read what a torch file holds, with `weights_only=True`; tensors of a local file stay in the file.

    Raises:
        ModelLoadError: the file is missing, damaged, would run code, or unpacks to more than it is.
    """
    path = source.find(name)
    file = f"{source}/{name}" if path is None else str(path)
    with source.open(name) as stream:
        is_zip = _check_zip(file, stream)
        stream.seek(0)
        try:
            # What is not on this machine is read whole; a local file is mapped, if it is not of the format
            # before torch 1.6.
            return torch.load(
                path or stream, map_location="cpu", weights_only=True, mmap=path is not None and is_zip
            )
        # A hostile pickle can make its reader raise anything.
        except Exception as error:
            raise unreadable(file, "torch", _pickle_problem(error)) from error


def unreadable(file: str, kind: str, problem: object) -> ModelLoadError:
    """The error of a file that cannot be read as what it should be."""
    return ModelLoadError(f"{file} is not a readable {kind} file: {problem}", remedy=_FETCH_AGAIN)


def _check_zip(file: str, stream: BinaryIO) -> bool:
    """Whether the file is in torch's zip format; if so it must unpack to what it is, and to no more.

    Raises:
        ModelLoadError: it is cut off, or its entries unpack to more bytes than the file has.
    """
    total = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if stream.read(4) != b"PK\x03\x04":
        return False
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise unreadable(file, "torch", error) from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise unreadable(file, "torch", f"its entry {entry.filename!r} is compressed")
        if entry.filename.endswith("data.pkl") and entry.file_size > _MAX_PICKLE_BYTES:
            raise unreadable(file, "torch", f"its entry {entry.filename!r} has {entry.file_size} bytes")
    if sum(entry.file_size for entry in entries) > total:
        raise unreadable(file, "torch", "its entries claim more bytes than it has")
    return True


def _pickle_problem(error: Exception) -> str:
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted is not None:
        return f"its pickle asks for {wanted[1]}, which is code and not data; nothing of it was run"
    return next(iter(str(error).splitlines()), type(error).__name__)
