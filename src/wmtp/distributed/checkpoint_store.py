"""Where the step folders of a run lie: what a checkpoint needs of a place, and a local disk as one.

The other place is an object store, see `wmtp.storage.step_store`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

from wmtp.distributed.publishing import (
    MANIFEST_NAME,
    STAGING_PATTERN,
    discard_directory,
    is_inside,
    read_manifest_bytes,
    rename_into_place,
    sync_folder,
    write_bytes_atomic,
    write_synced,
)
from wmtp.distributed.safetensors_stream import ByteSink, ByteSource
from wmtp.exceptions import CheckpointError

LATEST_NAME = "latest"
STEP_NAME = re.compile(r"^step-(?P<step>\d+)$")
_LOCK_NAME = ".checkpoint.lock"
# Workers of a killed process notice its end within five seconds; until then they hold its lock.
_LOCK_PATIENCE_S = 15.0

FolderKind = Literal["step", "unfinished", "replaced"]


@dataclass(frozen=True, slots=True)
class StepFolder:
    """A folder of a run: a step, what an unfinished save left, or a step set aside by its replacement."""

    name: str
    step: int
    kind: FolderKind


class StepDraft(Protocol):
    """A step on its way into a store; nobody sees it as a step before `commit`.

    `prefix` is where its files lie below the step's folder ("" or "<id>/"); the manifest names it.
    """

    prefix: str

    def create(self, name: str) -> AbstractContextManager[ByteSink]:
        """A new file to write; it is on the disk (or in the store) when the block ends without an error."""

    def commit(self, manifest: bytes) -> None:
        """Write the manifest last and let the step appear, replacing an older state of the same step."""

    def abandon(self) -> None:
        """Remove what was written."""


class StepStore(Protocol):
    """The step folders of one run."""

    def uri(self, name: str = "") -> str:
        """Where a folder of the run is, for people and for `--resume`."""

    def folders(self) -> list[StepFolder]:
        """Everything that is or was to be a step, in no particular order."""

    def manifest(self, name: str) -> bytes:
        """Raw manifest of a folder; a ValueError with the reason when there is none to read."""

    def size(self, name: str, file: str) -> int:
        """Bytes of a file of a step; an OSError or StorageError when it cannot be had."""

    def open(self, name: str, file: str) -> AbstractContextManager[ByteSource]:
        """A file of a step, to be read front to back with `readinto`; errors are those of `size`."""

    def draft(self, name: str, draft_id: str) -> StepDraft:
        """Begin a step; several ranks take part by the same id."""

    def discard(self, name: str) -> None:
        """Delete a step so that a crash on the way leaves none with holes."""

    def clean(self) -> None:
        """Remove what unfinished saves left; only called by the one writer."""

    def point_latest(self, name: str) -> None:
        """Let `latest` name a step."""

    def only_writer(self) -> AbstractContextManager[None]:
        """Be the only process that writes into the run; a CheckpointError when another one is.

        Held for a whole run by whoever trains; the saves within it take it once more.
        """


class LocalStore:
    """Step folders below a folder of this machine: built as `step-N.tmp-<id>`, synced, then renamed."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.run_dir = Path(os.path.abspath(run_dir))
        self._lock: IO[str] | None = None
        # When the lock was taken, by the clock of the file system.
        self._locked_ns = 0

    def uri(self, name: str = "") -> str:
        """The absolute path."""
        return str(self.run_dir / name)

    def folders(self) -> list[StepFolder]:
        """See `StepStore.folders`."""
        if not self.run_dir.is_dir():
            return []
        found = (_step_folder(path.name) for path in self.run_dir.iterdir() if path.is_dir())
        return [folder for folder in found if folder is not None]

    def manifest(self, name: str) -> bytes:
        """See `StepStore.manifest`."""
        if not (self.run_dir / name).is_dir():
            raise ValueError("there is no such folder")
        return read_manifest_bytes(self.run_dir / name)

    def size(self, name: str, file: str) -> int:
        """See `StepStore.size`; a link, or a file reached through one, is an OSError."""
        folder = self.run_dir / name
        path = folder / file
        if not is_inside(file):
            raise OSError(f"{file!r} points out of the folder")
        status = path.lstat()
        # It could be changed from outside after the check.
        if not stat.S_ISREG(status.st_mode) or path.resolve() != folder.resolve() / file:
            raise OSError("it is not a plain file in the folder")
        return status.st_size

    def open(self, name: str, file: str) -> AbstractContextManager[ByteSource]:
        """See `StepStore.open`; refuses what `size` refuses."""
        self.size(name, file)
        return open(self.run_dir / name / file, "rb", buffering=0)

    def draft(self, name: str, draft_id: str) -> StepDraft:
        """See `StepStore.draft`."""
        staging = self.run_dir / f"{name}.tmp-{draft_id}"
        staging.mkdir(parents=True, exist_ok=True)
        return _LocalDraft(staging, self.run_dir / name)

    def discard(self, name: str) -> None:
        """See `StepStore.discard`."""
        discard_directory(self.run_dir / name)

    def clean(self) -> None:
        """See `StepStore.clean`; goes for what is published beside the steps too (`final`, `latest`, ...).

        Of that, only what nobody has changed since this writer began: an export by another process is left.
        """
        staged = ((path, STAGING_PATTERN.match(path.name)) for path in self.run_dir.iterdir())
        leftovers = [
            (path, match) for path, match in staged if match is not None and self._is_left(path, match)
        ]
        # Of several that were set aside, the newest comes back.
        for path, match in sorted(leftovers, key=lambda found: -found[0].lstat().st_mtime_ns):
            original = self.run_dir / match["name"]
            if match["kind"] == "replaced" and not original.exists():
                # The replacement was cut off between its two renames: the old one is what there is.
                path.rename(original)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def point_latest(self, name: str) -> None:
        """See `StepStore.point_latest`."""
        write_bytes_atomic(self.run_dir / LATEST_NAME, f"{name}\n".encode())

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """See `StepStore.only_writer`; a lock of the operating system, gone with the process."""
        if self._lock is not None:
            yield
            return
        with self._taken_lock() as lock:
            self._lock = lock
            try:
                yield
            finally:
                self._lock = None

    def _is_left(self, path: Path, match: re.Match[str]) -> bool:
        """Whether something with a staging name is what a process that has ended left."""
        if STEP_NAME.match(match["name"]):
            # Only the one writer makes these.
            return True
        try:
            return max(found.lstat().st_ctime_ns for found in (path, *path.rglob("*"))) <= self._locked_ns
        except FileNotFoundError:
            # Somebody is at work on it.
            return False

    def _taken_lock(self) -> IO[str]:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            lock = open(self.run_dir / _LOCK_NAME, "w", encoding="utf-8")  # noqa: SIM115 - given to the caller
            try:
                self._wait_for(lock)
                os.utime(lock.fileno())
                self._locked_ns = os.fstat(lock.fileno()).st_ctime_ns
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            raise CheckpointError(
                f"Checkpoints cannot be written into {self.run_dir}: {error.strerror or error}",
                remedy="Check that it is a folder (or can be made one), its permissions and its free space.",
            ) from error
        return lock

    def _wait_for(self, lock: IO[str]) -> None:
        give_up = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > give_up:
                    raise CheckpointError(
                        f"Another process is writing checkpoints into {self.run_dir}.",
                        remedy="Give each run its own --run-name; two runs must not share a folder.",
                    ) from error
            time.sleep(0.1)


class _LocalDraft:
    prefix = ""

    def __init__(self, staging: Path, final: Path) -> None:
        self._staging = staging
        self._final = final

    @contextmanager
    def create(self, name: str) -> Iterator[ByteSink]:
        with open(self._staging / name, "wb", buffering=0) as file:
            yield _FullWrites(file)
            os.fsync(file.fileno())

    def commit(self, manifest: bytes) -> None:
        write_synced(self._staging / MANIFEST_NAME, manifest)
        sync_folder(self._staging)
        rename_into_place(self._staging, self._final)

    def abandon(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)


class _FullWrites:
    """Unbuffered writes that go on until everything is written; the system takes at most 2 GiB at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        return done


def _step_folder(name: str) -> StepFolder | None:
    match = STEP_NAME.match(name)
    if match is not None:
        return StepFolder(name, int(match["step"]), "step")
    staged = STAGING_PATTERN.match(name)
    match = None if staged is None else STEP_NAME.match(staged["name"])
    if staged is None or match is None:
        return None
    return StepFolder(name, int(match["step"]), "unfinished" if staged["kind"] == "tmp" else "replaced")
