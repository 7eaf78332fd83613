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
from wmtp.distributed.checkpoint_index import Index, check_index
from wmtp.distributed.checkpoint_store import StepStore
from wmtp.distributed.checkpoint_tensors import TensorGroup
from wmtp.distributed.publishing import is_inside, parse_manifest
from wmtp.distributed.safetensors_stream import ByteSource, dtype_named, read_into
from wmtp.exceptions import CheckpointError, StorageDamagedError, StorageError, StorageMissingError

FORMAT = "wmtp-checkpoint"
STATE_NAME = "state.json"
INDEX_NAME = "index.json"
# Of state and index: 100 times what large runs have, and little enough to be parsed.
MAX_JSON_BYTES = 256 * 2**20
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
        self._checked_index: tuple[Index, dict[str, dict[str, str]]] | None = None
        self._state: dict[str, Any] | None = None

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state, as given to `save_checkpoint`."""
        if self._state is None:
            state = self._read_json(STATE_NAME)
            if not isinstance(state, dict):
                raise _invalid(self.store, self.name, f"{STATE_NAME}: it is no JSON object")
            self._state = state
        return self._state

    @property
    def groups(self) -> list[str]:
        """Names of its tensor groups."""
        tensors, aliases = self._index()
        return sorted({name.partition("/")[0] for name in tensors} | aliases.keys())

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
        tensors, aliases = self._index()
        made: TensorGroup = {}
        for full_name, tensor in tensors.items():
            owner, _, name = full_name.partition("/")
            if owner == group:
                shape, dtype = torch.Size(tensor["shape"]), dtype_named(tensor["dtype"])
                made[name] = torch.empty(shape, dtype=dtype) if make is None else make(name, shape, dtype)
        self._fill({group: made})
        for name, source in aliases.get(group, {}).items():
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
            all_saved, all_aliases = self._index()
            aliases = all_aliases.get(group, {})
            saved = {n.partition("/")[2]: t for n, t in all_saved.items() if n.startswith(f"{group}/")}
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
            self.store, self.name, prefix=self._prefix, index=self._index()[0], files=self._files
        )
        run_planners(lambda: load(flat, storage_reader=reader))

    def _file_problem(self, path: str, entry: Mapping[str, Any], *, hashes: bool) -> str | None:
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

    def _read_json(self, file: str) -> Any:
        path = self._prefix + file
        entry = self._files[path]
        self._require_size(path)
        try:
            if entry["size"] > MAX_JSON_BYTES:
                raise ValueError(f"{entry['size']} bytes are more than such a file has")
            raw = bytearray(entry["size"])
            with self.store.open(self.name, path) as stream:
                read_into(stream, memoryview(raw))
            if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
                raise ValueError("its SHA-256 differs from the manifest's")
            return json.loads(raw)
        except (StorageMissingError, StorageDamagedError) as error:
            raise _invalid(self.store, self.name, f"{file}: {error.message}") from error
        except StorageError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise _invalid(self.store, self.name, f"{file}: {error}") from error

    def _index(self) -> tuple[Index, dict[str, dict[str, str]]]:
        """Tensors and aliases of `index.json`, checked against the manifest."""
        if self._checked_index is None:
            content = self._read_json(INDEX_NAME)
            try:
                self._checked_index = check_index(content, {n: e["size"] for n, e in self.files.items()})
            except ValueError as error:
                raise _invalid(self.store, self.name, f"{INDEX_NAME}: {error}") from error
        return self._checked_index

    def _require(self, group: str) -> None:
        """Raise where there is no such group, or a file of it has not the size that memory is taken for."""
        if group not in self.groups:
            raise self._misfit(f"it has no {group!r}; it holds {', '.join(self.groups)}")
        tensors = (t for name, t in self._index()[0].items() if name.startswith(f"{group}/"))
        for file in sorted({chunk["file"] for tensor in tensors for chunk in tensor["chunks"]}):
            self._require_size(self._prefix + file)

    def _require_size(self, path: str) -> None:
        problem = self._file_problem(path, self._files[path], hashes=False)
        if problem is not None:
            raise _invalid(self.store, self.name, f"{path.removeprefix(self._prefix)}: {problem}")

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
    """What a manifest says of its checkpoint; a ValueError where that cannot be one."""
    prefix, files = manifest.get("prefix"), manifest["files"]
    step, sequence, score = manifest.get("step"), manifest.get("sequence"), manifest.get("score")
    is_permanent = manifest.get("permanent")
    if (
        manifest.get("format") != FORMAT
        or not isinstance(prefix, str)
        or not {prefix + STATE_NAME, prefix + INDEX_NAME} <= files.keys()
        or type(step) is not int
        or type(sequence) is not int
        or not isinstance(score, int | float | None)
        or type(is_permanent) is not bool
    ):
        raise ValueError("it was not written as a training checkpoint by this version")
    for path in files:
        if not is_inside(path) or not path.startswith(prefix):
            raise ValueError(f"the name {path!r} in its manifest points out of the folder")
    digest = hashlib.sha256(raw).hexdigest()
    return CheckpointInfo(name, store.uri(name), step, sequence, score, is_permanent, digest)


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
