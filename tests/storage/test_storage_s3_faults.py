"""S3 through a proxy that breaks things: every fault is recovered from, or told once with what to do."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from fault_proxy import Fault, FaultProxy, run_fault_proxy
from s3_server import S3Server
from wmtp.exceptions import (
    StorageConflictError,
    StorageCredentialsError,
    StorageDamagedError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from wmtp.settings.config import S3Settings
from wmtp.storage import S3Manager

pytestmark = pytest.mark.s3

PART = 5 * 2**20
CONTENT = os.urandom(2 * PART + 17)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
MANY = 1000


def answer(code: str) -> bytes:
    """The body of an error as AWS writes it."""
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said so</Message></Error>".encode()


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with run_fault_proxy(s3_server.endpoint_url) as running:
        yield running


@pytest.fixture(scope="module")
def direct(s3_server: S3Server) -> S3Manager:
    """Access past the proxy."""
    manager = S3Manager(s3_server.settings)
    with manager.upload("faults/content") as stream:
        stream.write(CONTENT)
    return manager


@pytest.fixture
def settings(s3_server: S3Server, proxy: FaultProxy, direct: S3Manager) -> S3Settings:
    proxy.inject()
    changed = {
        "endpoint_url": proxy.endpoint_url,
        "part_size_mib": 5,
        "max_concurrency": 2,
        "deadline_s": 20.0,
    }
    return s3_server.settings.model_copy(update=changed)


@pytest.fixture
def manager(settings: S3Settings) -> S3Manager:
    return S3Manager(settings)


@pytest.fixture
def brisk(settings: S3Settings) -> S3Manager:
    """Gives up after five seconds, and on an answer after a quarter of that: a busy machine keeps up."""
    return S3Manager(settings.model_copy(update={"deadline_s": 5.0}))


@pytest.fixture
def hurried(settings: S3Settings) -> S3Manager:
    """Gives up after a second and a half."""
    return S3Manager(settings.model_copy(update={"deadline_s": 1.5}))


@pytest.fixture
def key() -> str:
    return f"faults/{uuid.uuid4().hex}"


def read_whole(manager: S3Manager) -> bytes:
    return manager.read_bytes("faults/content")[0]


def read_ranges(manager: S3Manager) -> bytes:
    with manager.stream_model("faults/content") as stream:
        return stream.read()


def read_sequentially(manager: S3Manager) -> bytes:
    with manager.open_sequential("faults/content", sha256=DIGEST) as stream:
        return stream.read()


READS = [read_whole, read_ranges, read_sequentially]

PASSING = {
    "503": Fault(method="GET", status=503, body=answer("SlowDown"), times=2),
    "500": Fault(method="GET", status=500, body=answer("InternalError"), times=2),
    "no XML": Fault(method="GET", status=502, body=b"<html>bad gateway</html>", times=2),
    "an answer to HEAD": Fault(method="HEAD", status=503, times=2),
    "cut at once": Fault(method="GET", cut_response_after=0, times=2),
    "cut within": Fault(method="GET", cut_response_after=3 * 2**20 + 5, times=2),
    "lost": Fault(method="GET", drop_response=True, times=2),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("fault", PASSING)
def test_reads_recover_from(
    proxy: FaultProxy, manager: S3Manager, fault: str, read: Callable[[S3Manager], bytes]
) -> None:
    proxy.inject(replace(PASSING[fault]))
    assert read(manager) == CONTENT


def test_a_read_that_was_cut_is_taken_up_where_it_ended(proxy: FaultProxy, manager: S3Manager) -> None:
    proxy.inject(Fault(method="GET", cut_response_after=PART - 100))
    with manager.stream_model("faults/content") as stream:
        assert stream.read() == CONTENT
    assert proxy.count("GET") == 3 + 1


LOST = {
    "503": {"status": 503, "body": answer("ServiceUnavailable")},
    "cut": {"cut_request_after": 100_000},
    "a lost answer": {"drop_response": True},
    "an altered byte": {"flip_request_byte": 77},
}


# The two requests around the parts are too short to be cut, and the first has no body at all.
STEPS = [("PUT", "", fault) for fault in LOST]
STEPS += [("POST", "?uploadId", fault) for fault in LOST if fault != "cut"]
STEPS += [("POST", "?uploads", "503"), ("POST", "?uploads", "a lost answer")]


@pytest.mark.parametrize(("method", "path", "fault"), STEPS)
def test_uploads_recover_from(
    proxy: FaultProxy, manager: S3Manager, direct: S3Manager, key: str, method: str, path: str, fault: str
) -> None:
    proxy.inject(Fault(method=method, path=path, times=2, **LOST[fault]))
    with manager.upload(key) as stream:
        stream.write(CONTENT)
    assert read_at(direct, key) == CONTENT


@pytest.mark.parametrize("condition", ["none", "if_absent", "if_match"])
@pytest.mark.parametrize("fault", LOST)
def test_writes_recover_from(
    proxy: FaultProxy, manager: S3Manager, direct: S3Manager, key: str, fault: str, condition: str
) -> None:
    old = direct.write_bytes(key, b"old") if condition == "if_match" else None
    proxy.inject(Fault(method="PUT", times=2, **LOST[fault]))
    etag = manager.write_bytes(key, CONTENT[:200_000], if_absent=condition == "if_absent", if_match=old)
    assert direct.read_bytes(key) == (CONTENT[:200_000], etag)


@pytest.mark.parametrize("condition", ["if_absent", "if_match"])
def test_another_writer_with_the_same_content_is_still_another(
    proxy: FaultProxy, manager: S3Manager, direct: S3Manager, key: str, condition: str
) -> None:
    """The first try never reaches the server, so the object that the second finds is not this writer's."""
    old = direct.write_bytes(key, b"old") if condition == "if_match" else None
    proxy.inject(Fault(method="PUT", status=500, body=answer("InternalError"), delay_s=0.3))
    with ThreadPoolExecutor(1) as threads:
        write = threads.submit(
            manager.write_bytes, key, b"same", if_absent=condition == "if_absent", if_match=old
        )
        direct.write_bytes(key, b"same")
        with pytest.raises(StorageConflictError):
            write.result()


def read_at(manager: S3Manager, key: str) -> bytes:
    return manager.read_bytes(key)[0]


# ------------------------------------------------------------------------------- what does not pass

ANSWERS = {
    "SlowDown": (503, StorageUnavailableError, "check s3.endpoint_url, the network, and the server"),
    "AccessDenied": (403, StorageDeniedError, "check the access key"),
    "ExpiredToken": (400, StorageCredentialsError, "AWS_SESSION_TOKEN or s3.session_token"),
    "RequestTimeTooSkewed": (403, StorageCredentialsError, "set the clock"),
    "InsufficientStorage": (507, StorageFullError, "free space there"),
    "PermanentRedirect": (301, StorageError, "s3.region"),
    "NotImplemented": (405, StorageError, "check bucket and key"),
}


@pytest.mark.parametrize("code", ANSWERS)
def test_what_does_not_pass_is_told_with_what_to_do(
    proxy: FaultProxy, hurried: S3Manager, s3_server: S3Server, key: str, code: str
) -> None:
    status, kind, remedy = ANSWERS[code]
    for method, act in (
        ("GET", lambda: read_whole(hurried)),
        ("PUT", lambda: hurried.write_bytes(key, b"x")),
    ):
        proxy.inject(Fault(method=method, status=status, body=answer(code), times=MANY))
        with pytest.raises(kind, match=rf"s3://wmtp/faults/[^$]*remedy: [^$]*{remedy}") as error:
            act()
        assert type(error.value) is kind
        assert s3_server.secret_key not in str(error.value)
        if kind is not StorageUnavailableError:
            assert proxy.count(method) == 1


def test_tries_end_at_the_deadline_and_say_how_many_they_were(proxy: FaultProxy, hurried: S3Manager) -> None:
    proxy.inject(Fault(method="GET", status=503, body=answer("SlowDown"), times=MANY))
    begin = time.monotonic()
    with pytest.raises(
        StorageUnavailableError, match=r"503 SlowDown: said so \(after (\d+) tries in [12]\.\d s\)"
    ):
        read_whole(hurried)
    assert 1.4 < time.monotonic() - begin < 10.0
    assert 4 <= proxy.count("GET") <= 10  # they come more rarely as time goes on


def test_a_silent_server_is_given_up_at_the_deadline(proxy: FaultProxy, hurried: S3Manager) -> None:
    proxy.inject(Fault(method="GET", delay_s=3.0, times=MANY))
    begin = time.monotonic()
    with pytest.raises(StorageUnavailableError, match="Read timeout"):
        read_whole(hurried)
    assert time.monotonic() - begin < 3.0


def test_a_server_that_is_silent_once_is_asked_again(proxy: FaultProxy, brisk: S3Manager) -> None:
    proxy.inject(Fault(method="GET", delay_s=3.0))
    assert read_whole(brisk) == CONTENT


def test_a_bytes_change_on_the_way_is_found(
    proxy: FaultProxy, manager: S3Manager, direct: S3Manager, key: str
) -> None:
    direct.write_bytes(key, CONTENT[:1000])
    proxy.inject(Fault(method="GET", flip_response_byte=500))
    assert manager.read_bytes(key)[0] == CONTENT[:1000]
    proxy.inject(Fault(method="GET", flip_response_byte=500, times=MANY))
    with pytest.raises(StorageDamagedError, match=r"does not match its checksum[^$]*\(after 5 tries"):
        manager.read_bytes(key)
    for position in (0, PART - 1):
        proxy.inject(Fault(method="GET", flip_response_byte=position))
        with pytest.raises(StorageDamagedError, match=f"not {DIGEST}"):
            read_sequentially(manager)


@pytest.mark.parametrize("part", ["partNumber=1", "partNumber=3", "uploads", "uploadId"])
def test_a_failed_upload_is_told_and_leaves_nothing(
    proxy: FaultProxy, brisk: S3Manager, direct: S3Manager, key: str, part: str
) -> None:
    direct.write_bytes(key, b"old")
    method = "PUT" if "part" in part else "POST"
    proxy.inject(Fault(method=method, path=part, status=500, body=answer("Internal"), times=MANY))
    with pytest.raises(StorageUnavailableError, match="500 Internal"), brisk.upload(key) as stream:
        stream.write(CONTENT)
    assert read_at(direct, key) == b"old"
    assert proxy.count("DELETE") == (part != "uploads")


def test_an_object_that_is_replaced_while_it_is_read_is_told(
    proxy: FaultProxy, manager: S3Manager, direct: S3Manager, key: str
) -> None:
    with direct.upload(key) as stream:
        stream.write(CONTENT)
    for opened in (manager.stream_model(key), manager.open_sequential(key)):
        with opened as stream:
            assert stream.read(10) == CONTENT[:10]
            direct.write_bytes(key, CONTENT[::-1])
            with pytest.raises(StorageConflictError, match="was replaced while it was read"):
                stream.read()
        with direct.upload(key) as stream:
            stream.write(CONTENT)
