"""Reading committed checkpoints, of which nothing is taken without its digest."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from wmtp.distributed.checkpoint_files import FileEntries, SafetensorsReader
from wmtp.distributed.checkpoint_store import StepStore
from wmtp.distributed.checkpoint_tensors import TensorGroup
from wmtp.distributed.publishing import is_inside, parse_manifest
from wmtp.distributed.safetensors_stream import ByteSource, dtype_named
from wmtp.exceptions import CheckpointError, StorageDamagedError, StorageError, StorageMissingError

FORMAT = "wmtp-checkpoint"
STATE_NAME = "state.json"
INDEX_NAME = "index.json"
_HASH_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint, by its manifest alone.

    Attributes:
        name: its folder in the run.
        uri: where that is.
        step: optimizer steps done.
        sequence: counts the saves of a run, so the highest was saved last.
        score: the metric it is judged by; None where that was not measured at this step.
        is_permanent: never deleted by later saves.
        manifest_sha256: digest of its manifest, which holds the digests of everything else.
    """

    name: str
    uri: str
    step: int
    sequence: int
    score: float | None
    is_permanent: bool
    manifest_sha256: str


class Checkpoint:
    """A committed checkpoint, read on demand; nothing that is read from it is taken without its digest.

    Args:
        store: the run's step folders.
        name: the folder in it.

    Raises:
        CheckpointError: it is missing or unfinished, or its manifest was changed.
    """

    def __init__(self, store: StepStore, name: str) -> None:
        self.store = store
        self.name = name
        try:
            raw = store.manifest(name)
            self._manifest = parse_manifest(raw)
            self.info = checkpoint_info(store, name, raw, self._manifest)
        except StorageError:
            raise
        except ValueError as error:
            raise _invalid(store, name, str(error)) from error
        self._files: FileEntries = self._manifest["files"]
        self._prefix = str(self._manifest.get("prefix", ""))
        self._index: dict[str, Any] | None = None
        self._state: dict[str, Any] | None = None

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state, as given to `save_checkpoint`."""
        if self._state is None:
            self._state = self._read_json(STATE_NAME)
        return self._state

    @property
    def groups(self) -> list[str]:
        """Names of its tensor groups."""
        return sorted({name.partition("/")[0] for name in self._tensors()} | self._aliases().keys())

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of each file, by its name without the folder of its save."""
        return {path.removeprefix(self._prefix): entry for path, entry in self._files.items()}

    @contextmanager
    def open(self, file: str) -> Iterator[ByteSource]:
        """A file of it, to be read front to back; the reader compares its digest with that in `files`."""
        with self.store.open(self.name, self._prefix + file) as stream:
            yield stream

    def problems(self, *, hashes: bool = True) -> list[str]:
        """What is wrong with its files, by name; without `hashes` only presence and sizes are looked at."""
        found = []
        for path, entry in self._files.items():
            reason = self._file_problem(path, entry, hashes=hashes)
            if reason is not None:
                found.append(f"{path.removeprefix(self._prefix)}: {reason}")
        return found

    def verify(self) -> None:
        """Read every file and compare its digest.

        Raises:
            CheckpointError: it is damaged; the message names each file that is.
        """
        problems = self.problems()
        if problems:
            raise _invalid(self.store, self.name, "; ".join(problems))

    def read(
        self, group: str, *, make: Callable[[str, torch.Size, torch.dtype], Tensor] | None = None
    ) -> TensorGroup:
        """Read a group of tensors.

        Args:
            group: name of the group.
            make: (name, shape, dtype) -> the tensor to fill, e.g. a sharded one; None makes them on the CPU.

        Returns:
            The tensors by name; tied ones come back as one tensor.

        Raises:
            CheckpointError: there is no such group, or a file is damaged.
        """
        self._require(group)
        made: TensorGroup = {}
        for full_name, tensor in self._tensors().items():
            owner, _, name = full_name.partition("/")
            if owner == group:
                shape, dtype = torch.Size(tensor["shape"]), dtype_named(tensor["dtype"])
                made[name] = torch.empty(shape, dtype=dtype) if make is None else make(name, shape, dtype)
        self._fill({group: made})
        for name, source in self._aliases().get(group, {}).items():
            made[name] = made[source]
        return made

    def load_into(self, targets: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill tensors in place: all tensors of these groups, and no others.

        Args:
            targets: group -> name -> tensor of the saved shape; of any device and dtype, sharded (DTensor) or
                not.

        Raises:
            CheckpointError: names or shapes differ, or a file is damaged. Some targets may then hold new
                values.
        """
        wanted: dict[str, dict[str, Tensor]] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        for group, tensors in targets.items():
            self._require(group)
            aliases = self._aliases().get(group, {})
            saved = {n.partition("/")[2]: t for n, t in self._tensors().items() if n.startswith(f"{group}/")}
            self._check_names(group, tensors.keys(), saved.keys() | aliases.keys())
            for name, tensor in tensors.items():
                shape = tuple(saved[aliases.get(name, name)]["shape"])
                if tuple(tensor.shape) != shape:
                    raise self._misfit(f"{group}: {name} is {tuple(tensor.shape)} here and was {shape}")
            wanted[group] = {name: tensor for name, tensor in tensors.items() if name in saved}
            # Tied when saved, two tensors here.
            copies += [(tensors[name], tensors[source]) for name, source in aliases.items()]
        self._fill(wanted)
        with torch.no_grad():
            for target, source in copies:
                if target is not source and target.data_ptr() != source.data_ptr():
                    target.copy_(source)

    def _fill(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        flat = {f"{group}/{name}": t for group, tensors in groups.items() for name, t in tensors.items()}
        if not flat:
            return
        reader = SafetensorsReader(
            self.store, self.name, prefix=self._prefix, index=self._tensors(), files=self._files
        )
        run_planners(lambda: load(flat, storage_reader=reader))

    def _file_problem(self, path: str, entry: Mapping[str, Any], *, hashes: bool) -> str | None:
        if not is_inside(path):
            return "the name points out of the folder"
        try:
            size = self.store.size(self.name, path)
            if size != entry["size"]:
                return f"has {size} bytes, the manifest says {entry['size']}"
            if hashes and self._sha256(path) != entry["sha256"]:
                return "its SHA-256 differs from the manifest's"
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        except (StorageMissingError, StorageDamagedError) as error:
            return error.message
        return None

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        view = memoryview(bytearray(_HASH_CHUNK_BYTES))
        with self.store.open(self.name, path) as stream:
            while count := stream.readinto(view):
                digest.update(view[:count])
        return digest.hexdigest()

    def _read_json(self, file: str) -> dict[str, Any]:
        path = self._prefix + file
        problem = self._file_problem(path, self._files[path], hashes=False)
        if problem is None:
            with self.store.open(self.name, path) as stream:
                raw = bytearray(self._files[path]["size"])
                done = 0
                while count := stream.readinto(memoryview(raw)[done:]):
                    done += count
            if hashlib.sha256(raw).hexdigest() == self._files[path]["sha256"]:
                content: dict[str, Any] = json.loads(raw)
                return content
            problem = "its SHA-256 differs from the manifest's"
        raise _invalid(self.store, self.name, f"{file}: {problem}")

    def _tensors(self) -> dict[str, Any]:
        if self._index is None:
            self._index = self._read_json(INDEX_NAME)
        tensors: dict[str, Any] = self._index["tensors"]
        return tensors

    def _aliases(self) -> dict[str, dict[str, str]]:
        self._tensors()
        assert self._index is not None
        aliases: dict[str, dict[str, str]] = self._index["aliases"]
        return aliases

    def _require(self, group: str) -> None:
        if group not in self.groups:
            raise self._misfit(f"it has no {group!r}; it holds {', '.join(self.groups)}")

    def _check_names(self, group: str, here: Any, saved: Any) -> None:
        missing, unexpected = sorted(saved - here), sorted(here - saved)
        if missing or unexpected:
            raise self._misfit(
                f"{group}: {len(missing)} saved tensors are unknown here {missing[:3]}, "
                f"{len(unexpected)} here were not saved {unexpected[:3]}"
            )

    def _misfit(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint {self.info.uri} does not fit this recipe: {reason}",
            remedy="resume with the recipe the run was started with",
        )


def checkpoint_info(store: StepStore, name: str, raw: bytes, manifest: Mapping[str, Any]) -> CheckpointInfo:
    """What a manifest says of its checkpoint; a ValueError where it is another kind of folder's."""
    prefix = str(manifest.get("prefix", ""))
    listed = {prefix + STATE_NAME, prefix + INDEX_NAME} <= manifest["files"].keys()
    if manifest.get("format") != FORMAT or not listed:
        raise ValueError("it was not written as a training checkpoint by this version")
    return CheckpointInfo(
        name=name,
        uri=store.uri(name),
        step=manifest["step"],
        sequence=manifest["sequence"],
        score=manifest["score"],
        is_permanent=manifest["permanent"],
        manifest_sha256=hashlib.sha256(raw).hexdigest(),
    )


def _invalid(store: StepStore, name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{store.uri(name)} is not a valid checkpoint: {reason}",
        remedy="Resume from another step folder of the run, or start without --resume.",
    )


def run_planners(call: Callable[[], object]) -> None:
    """Run torch's planners; a failure comes out as it went in, not in torch's wrapping."""
    try:
        with warnings.catch_warnings():
            # One process is no mistake.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            call()
    except CheckpointException as error:
        failure = error.failures[min(error.failures)][0]
        raise failure from None
