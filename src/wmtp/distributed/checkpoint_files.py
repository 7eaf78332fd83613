"""The files of a checkpoint, written and read by the planners of `torch.distributed.checkpoint`.

The planners decide which rank writes or reads which part of which tensor (replicated tensors once, sharded
ones where they are, at any later number of ranks). torch's own file format is not used: its metadata is a
pickle that runs code when it is loaded, and it has no digests. Here a rank writes one safetensors file for
each group of tensors it has a part of, hashed while it is written, and `index.json` says where
they are, see `checkpoint_index`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from wmtp.distributed.checkpoint_index import Chunk, Index
from wmtp.distributed.checkpoint_store import StepDraft, StepStore
from wmtp.distributed.hashing import StreamDigest, create_hashed
from wmtp.distributed.safetensors_stream import (
    ByteSource,
    StoredTensor,
    dtype_name,
    dtype_named,
    plan_file,
    read_into,
    tensor_bytes,
    write_tensors,
)
from wmtp.exceptions import CheckpointError, StorageDamagedError, StorageError, StorageMissingError

FileEntries = dict[str, dict[str, Any]]

_SCRATCH_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class _Share:
    """Which of how many ranks a plan is for."""

    rank: int
    num_ranks: int


@dataclass(frozen=True, slots=True)
class _WrittenChunk:
    """Where one part of a tensor went, and the size and digest of that file."""

    file: str
    key: str
    dtype: str
    shape: list[int]
    offsets: list[int]
    sizes: list[int]
    entry: dict[str, Any]


class SafetensorsWriter(StorageWriter):
    """Writes a rank's share of a checkpoint; the coordinator's `index` and `files` describe all of it."""

    def __init__(self, open_draft: Callable[[], StepDraft]) -> None:
        self._open_draft = open_draft
        self.draft: StepDraft | None = None
        self.index: Index = {}
        self.files: FileEntries = {}

    def reset(self, checkpoint_id: object = None) -> None:
        """Nothing is kept between checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing depends on the role."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The planner's plan is taken as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank which one it is, for the names of its files."""
        return [
            dataclasses.replace(plan, storage_data=_Share(rank, len(plans)))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's parts, a file for each group."""
        self.draft = self._open_draft()
        groups: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            groups.setdefault(item.index.fqn.partition("/")[0], []).append(item)
        results: list[WriteResult] = []
        for group, items in sorted(groups.items()):
            results += self._write_group(group, items, plan.storage_data, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_group(
        self, group: str, items: list[WriteItem], share: _Share, planner: SavePlanner
    ) -> list[WriteResult]:
        part = f"-{share.rank + 1:05d}-of-{share.num_ranks:05d}" if share.num_ranks > 1 else ""
        file = f"{group}{part}.safetensors"
        by_key = {_key(item): item for item in items}
        forms = []
        for item in items:
            assert item.tensor_data is not None, "only tensors go through the planners"
            forms.append((_key(item), item.tensor_data.properties.dtype, item.tensor_data.chunk.sizes))
        header, entries = plan_file(forms)
        assert self.draft is not None

        def tensors() -> Iterator[Tensor]:
            for entry in entries:
                data = planner.resolve_data(by_key[entry.name])
                assert isinstance(data, Tensor)
                yield data

        with create_hashed(self.draft, file) as writer:
            write_tensors(writer, header, tensors())
        return [
            WriteResult(by_key[e.name].index, e.num_bytes, _written(file, e, by_key[e.name], writer.entry()))
            for e in entries
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Gather where everything went."""
        for result in (result for of_rank in results for result in of_rank):
            chunk: _WrittenChunk = result.storage_data
            tensor = self.index.setdefault(
                result.index.fqn, {"dtype": chunk.dtype, "shape": chunk.shape, "chunks": []}
            )
            tensor["chunks"].append(
                {"offsets": chunk.offsets, "sizes": chunk.sizes, "file": chunk.file, "key": chunk.key}
            )
            self.files[chunk.file] = chunk.entry

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Stores are given, not found by an id."""
        return False


class SafetensorsReader(StorageReader):
    """Reads parts of tensors into place, each file once from front to back, and compares its digest.

    Args:
        store: holds the step.
        name: folder of the step.
        prefix: where its files lie below that, from the manifest.
        index: the tensors of its `index.json`, checked.
        files: the manifest's entries, by path.
    """

    def __init__(
        self,
        store: StepStore,
        name: str,
        *,
        prefix: str,
        index: Index,
        files: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._store = store
        self._name = name
        self._prefix = prefix
        self._index = index
        self._files = files
        # A file's header is not parsed: there is one that the index allows.
        self._forms: dict[str, list[tuple[str, torch.dtype, list[int]]]] = {}
        for tensor in index.values():
            for chunk in tensor["chunks"]:
                form = (chunk["key"], dtype_named(tensor["dtype"]), chunk["sizes"])
                self._forms.setdefault(chunk["file"], []).append(form)

    def reset(self, checkpoint_id: object = None) -> None:
        """Nothing is kept between reads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in the planners' terms."""
        return Metadata({name: _tensor_metadata(tensor) for name, tensor in self._index.items()})

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing depends on the role."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The planner's plan is taken as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The planner's plans are taken as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs.

        Raises:
            CheckpointError: a file is not what its manifest and the index say.
        """
        wanted: dict[str, dict[str, list[ReadItem]]] = {}
        for item in plan.items:
            chunk = _chunk(self._index[item.storage_index.fqn], item.storage_index)
            wanted.setdefault(chunk["file"], {}).setdefault(chunk["key"], []).append(item)
        for file, items in sorted(wanted.items()):
            self._read_file(file, items, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(self, file: str, items: dict[str, list[ReadItem]], planner: LoadPlanner) -> None:
        entry = self._files[self._prefix + file]
        try:
            header, stored = plan_file(self._forms[file])
            if len(header) + sum(tensor.num_bytes for tensor in stored) != entry["size"]:
                raise ValueError("its size is not that of the tensors that the index says are in it")
            with self._store.open(self._name, self._prefix + file) as stream, StreamDigest() as digest:
                found = bytearray(len(header))
                read_into(stream, memoryview(found))
                if found != header:
                    raise ValueError("its header is not that of the tensors that the index says are in it")
                digest.update(memoryview(found))
                for tensor in stored:
                    _read_tensor(stream, tensor, items.get(tensor.name, []), planner, digest)
                sha256 = digest.finish()
        except (StorageMissingError, StorageDamagedError) as error:
            raise damaged(self._store, self._name, file, error.message) from error
        except StorageError:
            # It cannot be reached now, which says nothing of the file.
            raise
        except (OSError, ValueError) as error:
            raise damaged(self._store, self._name, file, str(error)) from error
        if sha256 != entry["sha256"]:
            raise damaged(self._store, self._name, file, "its SHA-256 differs from the manifest's")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Stores are given, not found by an id."""
        return False


def damaged(store: StepStore, name: str, file: str, reason: str) -> CheckpointError:
    """The error of a file that is not what was written."""
    return CheckpointError(
        f"{store.uri(name)}: {file}: {reason}",
        remedy="Resume from another step folder of the run, or start without --resume.",
    )


def _read_tensor(
    stream: ByteSource,
    stored: StoredTensor,
    items: list[ReadItem],
    planner: LoadPlanner,
    digest: StreamDigest,
) -> None:
    """Read one tensor of a file to where it is wanted, or past it."""
    if not items:
        left = stored.num_bytes
        while left:
            view = memoryview(bytearray(min(left, _SCRATCH_BYTES)))
            read_into(stream, view)
            digest.update(view)
            left -= len(view)
        return
    target = planner.resolve_tensor(items[0])
    is_direct = (
        len(items) == 1
        and target.device.type == "cpu"
        and target.dtype == stored.dtype
        and tuple(target.shape) == stored.shape
        and target.is_contiguous()
    )
    buffer = target.detach() if is_direct else torch.empty(stored.shape, dtype=stored.dtype)
    view = tensor_bytes(buffer)
    for start in range(0, len(view), _SCRATCH_BYTES):
        piece = view[start : start + _SCRATCH_BYTES]
        read_into(stream, piece)
        digest.update(piece)
    for item in items:
        if not is_direct:
            target = planner.resolve_tensor(item).detach()
            part = buffer
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, offset, length)
            target.copy_(part)
        planner.commit_tensor(item, target)


def _key(item: WriteItem) -> str:
    """A tensor's name in its file: its own, with the offsets where it is a part."""
    assert item.tensor_data is not None
    name = item.index.fqn.partition("/")[2]
    if tuple(item.tensor_data.chunk.sizes) == tuple(item.tensor_data.size):
        return name
    return f"{name}@{','.join(map(str, item.tensor_data.chunk.offsets))}"


def _written(file: str, stored: StoredTensor, item: WriteItem, entry: dict[str, Any]) -> _WrittenChunk:
    data = item.tensor_data
    assert data is not None
    return _WrittenChunk(
        file=file,
        key=stored.name,
        dtype=dtype_name(stored.dtype),
        shape=list(data.size),
        offsets=list(data.chunk.offsets),
        sizes=list(data.chunk.sizes),
        entry=entry,
    )


def _tensor_metadata(tensor: Mapping[str, Any]) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype_named(tensor["dtype"])),
        size=torch.Size(tensor["shape"]),
        chunks=[
            ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
            for chunk in tensor["chunks"]
        ],
    )


def _chunk(tensor: Mapping[str, Any], index: MetadataIndex) -> Chunk:
    assert index.offset is not None
    offsets = list(index.offset)
    # A rank without a share of it has written one of size 0.
    found: Chunk = next(c for c in tensor["chunks"] if c["offsets"] == offsets and all(c["sizes"]))
    return found
