"""S3 when the server itself dies and comes back, stays away, or is full."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from s3_server import VOLUME_MIB, S3Server, run_s3_server
from wmtp.exceptions import StorageUnavailableError
from wmtp.storage import S3Manager

pytestmark = pytest.mark.s3

PART = 5 * 2**20
CONTENT = os.urandom(5 * PART + 17)
DOWN_S = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One of its own: the others' must not die."""
    with run_s3_server(tmp_path_factory.mktemp("s3-restart")) as running:
        yield running


@pytest.fixture
def manager(server: S3Server) -> S3Manager:
    changed = {"part_size_mib": 5, "max_concurrency": 2, "deadline_s": 60.0, "max_attempts": 1}
    manager = S3Manager(server.settings.model_copy(update=changed))
    manager.write_bytes("kept", b"committed before")
    return manager


@contextmanager
def outage(server: S3Server) -> Iterator[None]:
    """Kill the server, and have it back a while after the block began."""

    def revive() -> None:
        time.sleep(DOWN_S)
        server.start()

    server.kill()
    back = threading.Thread(target=revive)
    back.start()
    try:
        yield
    finally:
        back.join()


def test_reads_go_on_when_a_killed_server_is_back(server: S3Server, manager: S3Manager) -> None:
    with manager.upload("content") as stream:
        stream.write(CONTENT)
    digest = hashlib.sha256(CONTENT).hexdigest()
    with (
        manager.stream_model("content") as ranged,
        manager.open_sequential("content", sha256=digest) as sequential,
    ):
        starts = [ranged.read(PART + 3), sequential.read(PART + 3)]
        with outage(server), ThreadPoolExecutor(2) as threads:
            rests = threads.map(lambda stream: stream.read(), (ranged, sequential))
            assert [start + rest for start, rest in zip(starts, rests, strict=True)] == [CONTENT] * 2
            assert [entry.key for entry in manager.list_objects("")] == [
                "s3://wmtp/content",
                "s3://wmtp/kept",
            ]


def test_an_upload_goes_on_when_a_killed_server_is_back(server: S3Server, manager: S3Manager) -> None:
    with manager.upload("up") as stream:
        stream.write(CONTENT[: 3 * PART + 100])
        with outage(server):
            stream.write(CONTENT[3 * PART + 100 :])
    assert manager.read_bytes("up")[0] == CONTENT
    assert manager.read_bytes("kept")[0] == b"committed before"


def test_a_server_that_stays_away_is_told_and_no_half_of_an_object_is_ever_seen(
    server: S3Server, manager: S3Manager
) -> None:
    hurried = S3Manager(manager.settings.model_copy(update={"deadline_s": 1.0}))
    manager.write_bytes("old", b"old")
    begin = time.monotonic()
    with (
        pytest.raises(
            StorageUnavailableError, match=r"s3://wmtp/old cannot be reached at http://127[^$]*tries"
        ),
        hurried.upload("old") as stream,
    ):
        stream.writelines(_killing(server))
    # The deadline, for the parts under way, and once more for a clean-up that must fail too.
    assert time.monotonic() - begin < 10.0
    with pytest.raises(StorageUnavailableError, match=r"remedy: check s3\.endpoint_url"):
        hurried.read_bytes("old")
    server.start()
    assert manager.read_bytes("old")[0] == b"old"
    assert manager.read_bytes("kept")[0] == b"committed before"


def _killing(server: S3Server) -> Iterator[bytes]:
    yield CONTENT[: 2 * PART]
    server.kill()
    yield CONTENT[2 * PART :]


@pytest.mark.slow
def test_a_full_server_is_told_and_what_was_committed_stays(tmp_path: Path) -> None:
    with run_s3_server(tmp_path / "s3", num_volumes=1) as server:
        changed = {"part_size_mib": 8, "max_concurrency": 2, "deadline_s": 2.0}
        manager = S3Manager(server.settings.model_copy(update=changed))
        manager.write_bytes("kept", b"committed before")
        with (
            pytest.raises(StorageUnavailableError, match=r"500 InternalError[^$]*its free space"),
            manager.upload("big") as stream,
        ):
            stream.writelines(bytes(2**20) for _ in range(3 * VOLUME_MIB))
        assert manager.stat("big") is None
        assert manager.read_bytes("kept")[0] == b"committed before"
