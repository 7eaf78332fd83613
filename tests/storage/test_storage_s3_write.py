"""Writing to S3, against a real server: conditions, digests, uploads in parts, listings, deletions."""

from __future__ import annotations

import os
import pickle
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from botocore.config import Config as BotocoreConfig
from botocore.exceptions import ClientError
from pydantic import SecretStr

from s3_server import GUEST_KEY, S3Server
from wmtp.exceptions import (
    StorageConflictError,
    StorageCredentialsError,
    StorageDeniedError,
    StorageError,
    StorageMissingError,
)
from wmtp.storage import S3Manager

pytestmark = pytest.mark.s3

PART = 5 * 2**20
CONTENT = os.urandom(2 * PART + 17)


@pytest.fixture(scope="module")
def manager(s3_server: S3Server) -> S3Manager:
    return S3Manager(s3_server.settings.model_copy(update={"part_size_mib": 5, "max_concurrency": 2}))


@pytest.fixture
def prefix() -> str:
    return f"write/{uuid.uuid4().hex}/"


def test_an_object_is_created_once_and_replaced_only_over_the_content_that_was_read(
    manager: S3Manager, prefix: str
) -> None:
    key = f"{prefix}state.json"
    first = manager.write_bytes(key, b"one", if_absent=True)
    assert manager.read_bytes(key) == (b"one", first)
    with pytest.raises(StorageConflictError, match=r"state\.json: another writer was there first"):
        manager.write_bytes(key, b"two", if_absent=True)
    second = manager.write_bytes(key, b"two", if_match=first)
    with pytest.raises(StorageConflictError):
        manager.write_bytes(key, b"three", if_match=first)
    with pytest.raises(StorageConflictError):
        manager.write_bytes(f"{prefix}absent", b"three", if_match=first)
    assert manager.read_bytes(key) == (b"two", second)
    third = manager.write_bytes(key, b"three")
    assert manager.read_bytes(key) == (b"three", third)


def test_of_many_writers_at_once_one_creates_the_object(manager: S3Manager, prefix: str) -> None:
    start = threading.Barrier(8)

    def write(number: int) -> bool:
        start.wait()
        try:
            manager.write_bytes(f"{prefix}lock", b"same for all", if_absent=True)
        except StorageConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(write, range(8))) == 1


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, len(CONTENT)])
def test_an_upload_of_any_size_gives_the_bytes_that_were_written(
    manager: S3Manager, prefix: str, size: int
) -> None:
    key = f"{prefix}{size}"
    with manager.upload(key) as stream:
        for start in range(0, size, 1_300_000):
            piece = CONTENT[start : min(start + 1_300_000, size)]
            assert stream.write(piece) == len(piece)
        assert stream.tell() == size
        assert manager.stat(key) is None
    assert manager.read_bytes(key)[0] == CONTENT[:size]
    found = manager.stat(key)
    assert found is not None
    assert found.size == size


def test_memory_of_other_kinds_is_written_as_its_bytes(manager: S3Manager, prefix: str) -> None:
    import torch

    with manager.upload(f"{prefix}tensor") as stream:
        stream.write(memoryview(torch.tensor([1.0, -2.0]).numpy()))
    assert manager.read_bytes(f"{prefix}tensor")[0] == torch.tensor([1.0, -2.0]).numpy().tobytes()


@pytest.mark.parametrize("size", [3, len(CONTENT)])
def test_an_upload_that_is_broken_off_leaves_nothing_and_the_old_object_stays(
    manager: S3Manager, prefix: str, size: int, uploads: Callable[[str], int]
) -> None:
    manager.write_bytes(f"{prefix}old", b"old")
    for name in ("old", "new"):
        with pytest.raises(TypeError, match="bytes-like"), manager.upload(f"{prefix}{name}") as stream:
            stream.writelines([CONTENT[:size], "no bytes"])
        with pytest.raises(ValueError, match="closed"):
            stream.write(b"more")
    assert [found.key for found in manager.list_objects(prefix)] == [f"s3://wmtp/{prefix}old"]
    assert manager.read_bytes(f"{prefix}old")[0] == b"old"
    assert uploads(prefix) == 0


@pytest.fixture
def uploads(client: Any) -> Callable[[str], int]:
    """How many uploads under a prefix are neither complete nor ended."""

    def count(prefix: str) -> int:
        answer = client.list_multipart_uploads(Bucket="wmtp")
        return sum(entry["Key"].startswith(prefix) for entry in answer.get("Uploads", ()))

    return count


@pytest.fixture
def client(s3_server: S3Server) -> Any:
    """botocore's own client, to ask the server wrong things."""
    from botocore.session import Session

    return Session().create_client(
        "s3",
        region_name="eu-north-1",
        endpoint_url=s3_server.endpoint_url,
        aws_access_key_id=s3_server.access_key,
        aws_secret_access_key=s3_server.secret_key,
        config=BotocoreConfig(retries={"total_max_attempts": 1}),
    )


WRONG_DIGESTS = {"ContentMD5": "AAAAAAAAAAAAAAAAAAAAAA==", "ChecksumSHA256": "A" * 43 + "="}


@pytest.mark.parametrize("field", WRONG_DIGESTS)
def test_the_server_itself_refuses_content_that_has_another_digest(
    client: Any, manager: S3Manager, prefix: str, field: str
) -> None:
    target = {"Bucket": "wmtp", "Key": f"{prefix}x"}
    wrong = {field: WRONG_DIGESTS[field], "Body": b"content"}
    with pytest.raises(ClientError, match="BadDigest"):
        client.put_object(**target, **wrong)
    upload = client.create_multipart_upload(**target)["UploadId"]
    with pytest.raises(ClientError, match="BadDigest"):
        client.upload_part(**target, **wrong, UploadId=upload, PartNumber=1)
    assert manager.stat(f"{prefix}x") is None


@pytest.mark.parametrize("page_size", [1, 4, 1000])
def test_all_objects_under_a_prefix_are_listed_over_the_pages(
    manager: S3Manager, prefix: str, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    monkeypatch.setattr("wmtp.storage.s3._PAGE_SIZE", page_size)
    monkeypatch.setattr("wmtp.storage.s3._MAX_DELETED_AT_ONCE", page_size)
    names = sorted(f"{prefix}{number % 3}/{number:04d} +%41 ö" for number in range(9))
    for name in names:
        manager.write_bytes(name, name.encode()[:3])
    found = manager.list_objects(prefix)
    assert [entry.key for entry in found] == [f"s3://wmtp/{name}" for name in names]
    assert {entry.size for entry in found} == {3}
    assert found[0] == manager.stat(found[0].key)
    assert manager.list_folders(prefix) == ["0", "1", "2"]
    assert manager.list_folders(f"{prefix}1") == []
    assert manager.list_folders(f"{prefix}none") == []
    assert manager.list_objects(f"{prefix}none") == []
    manager.delete([*names[:-1], f"{prefix}never there"])
    assert [entry.key for entry in manager.list_objects(prefix)] == [f"s3://wmtp/{names[-1]}"]


def test_what_an_account_may_not_do_is_told(s3_server: S3Server, manager: S3Manager, prefix: str) -> None:
    guest = S3Manager(s3_server.settings.model_copy(update={"access_key_id": SecretStr(GUEST_KEY)}))
    guest.write_bytes(f"{prefix}x", b"x")
    for act in (lambda: guest.list_objects(prefix), lambda: guest.folder(prefix)):
        with pytest.raises(StorageDeniedError, match=r"refuses access[^$]*remedy: check the access key"):
            act()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("secret_access_key", "wrong-secret", "SignatureDoesNotMatch"),
        ("access_key_id", "nobody", "InvalidAccessKeyId"),
    ],
)
def test_wrong_keys_are_told_at_once_and_without_the_secret(
    s3_server: S3Server, prefix: str, field: str, value: str, said: str
) -> None:
    wrong = S3Manager(s3_server.settings.model_copy(update={field: SecretStr(value)}))
    for act in (wrong.read_bytes, wrong.stat, wrong.list_objects, lambda key: wrong.write_bytes(key, b"x")):
        with pytest.raises(
            StorageCredentialsError, match=rf"{said}[^$]*remedy: check the access key"
        ) as error:
            act(f"{prefix}x")
        assert s3_server.secret_key not in str(error.value)
        assert "wrong-secret" not in str(error.value)


def test_a_missing_bucket_is_told_from_a_missing_object(
    s3_server: S3Server, manager: S3Manager, prefix: str
) -> None:
    assert manager.stat(f"{prefix}x") is None
    with pytest.raises(StorageMissingError, match="x does not exist\n"):
        manager.read_bytes(f"{prefix}x")
    guest = S3Manager(s3_server.settings.model_copy(update={"access_key_id": SecretStr(GUEST_KEY)}))
    acts: list[Callable[[str], object]] = [manager.read_bytes, manager.stat, manager.list_objects]
    # The account of the tests may create buckets, and this server does so on the way.
    for act in (*acts, lambda key: guest.write_bytes(key, b"x")):
        with pytest.raises(StorageError, match="no-such-bucket") as error:
            act("s3://no-such-bucket/x")
        assert "no bucket 'no-such-bucket'" in str(error.value) or "refuses access" in str(error.value)


def test_a_manager_works_in_another_process_and_after_a_fork(manager: S3Manager, prefix: str) -> None:
    manager.write_bytes(f"{prefix}x", b"x")
    again: S3Manager = pickle.loads(pickle.dumps(manager))
    assert again.read_bytes(f"{prefix}x")[0] == b"x"
    child = os.fork()
    if child == 0:
        os._exit(0 if manager.read_bytes(f"{prefix}x")[0] == b"x" else 1)
    assert manager.read_bytes(f"{prefix}x")[0] == b"x"
    assert os.waitpid(child, 0)[1] == 0
