"""Step folders of a run in an object store, where nothing can be renamed and nobody can lock.

<run>/step-200/<id>/model.safetensors ...   the files of one save; unseen until the manifest names <id>
<run>/step-200/manifest.json                written last, if it still is as it was: the commit
<run>/writer.json                           who writes here, renewed while that process lives
<run>/latest                                name of the step that was saved last, for people and scripts
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from wmtp.distributed.checkpoint_store import LATEST_NAME, STEP_NAME, StepFolder
from wmtp.distributed.publishing import MANIFEST_NAME, MAX_MANIFEST_BYTES, is_inside, parse_manifest
from wmtp.distributed.safetensors_stream import ByteSink, ByteSource
from wmtp.exceptions import (
    CheckpointError,
    StorageConflictError,
    StorageDamagedError,
    StorageError,
    StorageMissingError,
)
from wmtp.storage.s3 import S3Manager

logger = logging.getLogger(__name__)

_WRITER_NAME = "writer.json"
_RENEWALS_PER_LEASE = 4


class S3Store:
    """A `wmtp.distributed.checkpoint_store.StepStore` under an `s3://` prefix.

    Args:
        manager: access to S3.
        run_uri: `s3://bucket/prefix` of the run.
    """

    def __init__(self, manager: S3Manager, run_uri: str) -> None:
        self._manager = manager
        self._run_uri = run_uri.rstrip("/")
        self._claim: _Claim | None = None

    def uri(self, name: str = "") -> str:
        """See `StepStore.uri`."""
        return f"{self._run_uri}/{name}" if name else self._run_uri

    def folders(self) -> list[StepFolder]:
        """See `StepStore.folders`; what has no manifest is told by that."""
        found = ((name, STEP_NAME.match(name)) for name in self._manager.list_folders(self._run_uri))
        return [StepFolder(name, int(match["step"]), "step") for name, match in found if match is not None]

    def manifest(self, name: str) -> bytes:
        """See `StepStore.manifest`."""
        found = self._manager.stat(self._manifest_uri(name))
        try:
            if found is None:
                raise _UnfinishedError(f"it has no {MANIFEST_NAME}: the save was not finished")
            if found.size > MAX_MANIFEST_BYTES:
                raise ValueError(f"{MANIFEST_NAME} is not of a sensible size")
            return self._manager.read_bytes(found.key)[0]
        except StorageMissingError as error:
            raise _UnfinishedError(f"its {MANIFEST_NAME} has just been deleted") from error

    def size(self, name: str, file: str) -> int:
        """See `StepStore.size`."""
        found = self._manager.stat(self._file_uri(name, file))
        if found is None:
            raise OSError("it does not exist")
        return found.size

    @contextmanager
    def open(self, name: str, file: str) -> Iterator[ByteSource]:
        """See `StepStore.open`."""
        with self._manager.open_sequential(self._file_uri(name, file)) as stream:
            yield cast(ByteSource, stream)

    def draft(self, name: str, draft_id: str) -> _S3Draft:
        """See `StepStore.draft`."""
        return _S3Draft(self._manager, self.uri(name), f"{draft_id}/", self._claim)

    def discard(self, name: str) -> None:
        """See `StepStore.discard`; without its manifest a step is one that was never finished."""
        self._manager.delete([self._manifest_uri(name)])
        self._manager.delete([found.key for found in self._manager.list_objects(f"{self.uri(name)}/")])

    def clean(self) -> None:
        """See `StepStore.clean`."""
        for folder in self.folders():
            uri = self.uri(folder.name)
            kept: tuple[str, ...] = ()
            try:
                prefix = str(parse_manifest(self.manifest(folder.name)).get("prefix", ""))
                kept = (f"{uri}/{prefix}", f"{uri}/{MANIFEST_NAME}")
            except _UnfinishedError:
                pass
            except StorageDamagedError:
                continue
            except StorageError:
                raise
            except ValueError:
                # Damaged, not unfinished: what it holds may be all there is.
                continue
            objects = self._manager.list_objects(f"{uri}/")
            self._manager.delete([found.key for found in objects if not found.key.startswith(kept)])

    def point_latest(self, name: str) -> None:
        """See `StepStore.point_latest`."""
        self._manager.write_bytes(f"{self._run_uri}/{LATEST_NAME}", f"{name}\n".encode())

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """See `StepStore.only_writer`: an object that is renewed while this process lives.

        Another process's is waited for until it has not been renewed for `s3.lease_s`, by this machine's own
        clock; that of a process that has ended on this machine, since its last start, is taken over at once.
        """
        if self._claim is not None:
            yield
            return
        self._claim = _Claim(self._manager, f"{self._run_uri}/{_WRITER_NAME}")
        try:
            with self._claim.held():
                yield
        finally:
            self._claim = None

    def _manifest_uri(self, name: str) -> str:
        return f"{self.uri(name)}/{MANIFEST_NAME}"

    def _file_uri(self, name: str, file: str) -> str:
        if not is_inside(file):
            raise OSError(f"{file!r} points out of the folder")
        return f"{self.uri(name)}/{file}"


class _UnfinishedError(ValueError):
    """A step folder without a manifest."""


class _S3Draft:
    def __init__(self, manager: S3Manager, step_uri: str, prefix: str, claim: _Claim | None) -> None:
        self.prefix = prefix
        self._manager = manager
        self._step_uri = step_uri
        self._claim = claim
        self._replaced = manager.stat(f"{step_uri}/{MANIFEST_NAME}")
        self._may_be_committed = False

    @contextmanager
    def create(self, name: str) -> Iterator[ByteSink]:
        with self._manager.upload(f"{self._step_uri}/{self.prefix}{name}") as stream:
            yield stream

    def commit(self, manifest: bytes) -> None:
        if self._claim is not None:
            self._claim.require()
        etag = None if self._replaced is None else self._replaced.etag
        self._may_be_committed = True
        try:
            self._manager.write_bytes(
                f"{self._step_uri}/{MANIFEST_NAME}", manifest, if_absent=etag is None, if_match=etag
            )
        except StorageConflictError as error:
            self._may_be_committed = False
            raise CheckpointError(
                f"Another process has saved {self._step_uri} in the meantime.",
                remedy="Give each run its own --run-name; two runs must not share a folder.",
            ) from error

    def abandon(self) -> None:
        if self._may_be_committed:
            # The answer to the manifest may have been lost: files of a committed step must stay.
            return
        try:
            objects = self._manager.list_objects(f"{self._step_uri}/{self.prefix}")
            self._manager.delete([found.key for found in objects])
        except StorageError as error:
            # The store may be why the save failed; the next save removes what is left.
            logger.warning("what an unfinished save left could not be removed: %s", error.message)


class _Claim:
    """This process's right to write into a run."""

    def __init__(self, manager: S3Manager, uri: str) -> None:
        self._manager = manager
        self._uri = uri
        self._owner = {"id": uuid.uuid4().hex, "process": _this_process()}
        self._lease_s = manager.settings.lease_s
        self._etag = ""
        self._lost: str | None = None
        self._renewing = threading.Lock()
        self._ended = threading.Event()

    @contextmanager
    def held(self) -> Iterator[None]:
        self._take()
        thread = threading.Thread(target=self._renew_until_ended, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self._release()

    def require(self) -> None:
        """Raise a CheckpointError when another process has taken the run over; asks the store.

        Raises:
            StorageError: it cannot be asked.
        """
        # A process that was suspended for a while has not noticed yet.
        self._renew()
        if self._lost is not None:
            raise CheckpointError(
                f"Another process has taken over {self._uri.rpartition('/')[0]}: {self._lost}",
                remedy="Give each run its own --run-name; go on with --resume when the other one has ended.",
            )

    def _take(self) -> None:
        present = self._read()
        while present is not None and not _has_ended(present[0].get("process")):
            content, etag = present
            later = self._wait_for_change(etag)
            if later is not None and later[1] == etag:
                break
            if later is not None and later[0].get("id") == content.get("id"):
                raise CheckpointError(
                    f"Another process is writing checkpoints into {self._uri.rpartition('/')[0]}: "
                    f"{content.get('process')}",
                    remedy="Give each run its own --run-name; two runs must not share a folder.",
                )
            present = later
        try:
            self._etag = self._write(if_match=None if present is None else present[1])
        except StorageConflictError:
            # Two took it at once; the other one was first.
            self._take()

    def _wait_for_change(self, etag: str) -> tuple[dict[str, Any], str] | None:
        logger.warning("waiting up to %.0f s: another process may be writing to %s", self._lease_s, self._uri)
        give_up = time.monotonic() + self._lease_s
        while True:
            found = self._read()
            if found is None or found[1] != etag or time.monotonic() > give_up:
                return found
            time.sleep(self._lease_s / 20)

    def _read(self) -> tuple[dict[str, Any], str] | None:
        try:
            raw, etag = self._manager.read_bytes(self._uri)
        except StorageMissingError:
            return None
        try:
            content = json.loads(raw)
        except ValueError:
            content = None
        return (content if isinstance(content, dict) else {}), etag

    def _write(self, *, if_match: str | None) -> str:
        # The time makes every renewal another content, and so another ETag.
        content = json.dumps({**self._owner, "time": time.time_ns()}).encode()
        return self._manager.write_bytes(self._uri, content, if_absent=if_match is None, if_match=if_match)

    def _renew_until_ended(self) -> None:
        while self._lost is None and not self._ended.wait(self._lease_s / _RENEWALS_PER_LEASE):
            try:
                self._renew()
            except StorageError as error:
                logger.warning("the claim on %s could not be renewed: %s", self._uri, error.message)

    def _renew(self) -> None:
        with self._renewing:
            if self._lost is not None:
                return
            try:
                self._etag = self._write(if_match=self._etag)
            except (StorageConflictError, StorageMissingError):
                present = self._read()
                if present is None or present[0].get("id") != self._owner["id"]:
                    self._lost = "ended since" if present is None else str(present[0].get("process"))
                    return
                # An earlier renewal was written and its answer lost.
                self._etag = present[1]

    def _release(self) -> None:
        try:
            present = self._read()
            if present is not None and present[0].get("id") == self._owner["id"]:
                self._manager.delete([self._uri])
        except StorageError as error:
            logger.warning("%s could not be removed: %s", self._uri, error.message)


def _this_process() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _has_ended(process: object) -> bool:
    """Whether a process of this machine has ended: its number is free, or another's by now."""
    if not isinstance(process, dict) or process.get("host") != _host():
        return False
    started, boot = process.get("started"), _boot_id()
    # Virtual machines of one image have the same name and namespaces; only a boot is one machine's alone.
    if not isinstance(started, str) or boot is None or not started.startswith(f"{boot}:"):
        return False
    return _start_of(process.get("pid")) != started


def _host() -> str:
    """This machine, as far as process numbers mean the same in it: containers count their own."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: object) -> str | None:
    """When a process of this machine began, with the boot it belongs to; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            # The name in parentheses may hold blanks; the start is the 22nd field, the 20th after it.
            start = stat.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    return f"{_boot_id()}:{start}"


def _boot_id() -> str | None:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None
