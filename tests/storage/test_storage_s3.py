"""S3 against a real server: ranged streams, folders as model sources, and errors with a remedy."""

from __future__ import annotations

import io
import os

import pytest
from pydantic import SecretStr

from s3_server import S3Server
from wmtp.exceptions import StorageError
from wmtp.settings import Config
from wmtp.settings.config import S3Settings
from wmtp.storage import S3Manager, create_s3_manager

pytestmark = pytest.mark.s3

CONTENT = os.urandom(12 * 2**20 + 17)


@pytest.fixture(scope="module")
def manager(s3_server: S3Server) -> S3Manager:
    filesystem = s3_server.filesystem()
    filesystem.pipe_file(f"{s3_server.bucket}/models/tiny/weights.bin", CONTENT)
    filesystem.pipe_file(f"{s3_server.bucket}/models/tiny/config.json", b"{}")
    filesystem.pipe_file(f"{s3_server.bucket}/models/tokenizer.model", b"spm")
    filesystem.pipe_file(f"{s3_server.bucket}/models/tiny/sub/x", b"x")
    settings = s3_server.settings.model_copy(update={"part_size_mib": 5, "max_concurrency": 3})
    return create_s3_manager(Config(s3=settings))


@pytest.mark.parametrize("key", ["models/tiny/weights.bin", "s3://wmtp/models/tiny/weights.bin"])
def test_a_stream_gives_the_bytes_whole_and_in_any_piece(manager: S3Manager, key: str) -> None:
    with manager.stream_model(key) as stream:
        assert stream.read() == CONTENT
        for start, length in ((0, 8), (5 * 2**20 - 3, 7), (len(CONTENT) - 4, 100), (3, 11 * 2**20)):
            stream.seek(start)
            assert stream.read(length) == CONTENT[start : start + length]
            assert stream.tell() == min(start + length, len(CONTENT))
        assert stream.seek(-5, io.SEEK_END) == len(CONTENT) - 5
        assert stream.read() == CONTENT[-5:]
        assert stream.read(1) == b""


def test_a_folder_lists_its_own_files_and_folders_and_the_folder_above(manager: S3Manager) -> None:
    folder = manager.folder("models/tiny/")
    assert folder.names() == {"weights.bin", "config.json"}
    assert folder.subfolders() == ["sub"]
    assert str(folder) == "s3://wmtp/models/tiny"
    assert folder.find("config.json") is None
    with folder.open("config.json") as stream:
        assert stream.read() == b"{}"
    above = folder.parent()
    assert above is not None
    assert above.names() == {"tokenizer.model"}


def test_what_is_not_there_is_named(manager: S3Manager) -> None:
    for key in ("models/none/weights.bin", "s3://no-such-bucket/x"):
        with pytest.raises(StorageError, match="does not exist"):
            manager.stream_model(key)
    with pytest.raises(StorageError, match=r"s3://wmtp/nothing does not exist"):
        manager.folder("nothing")
    with pytest.raises(StorageError, match=r"s3://wmtp/models/tiny has no ../secret"):
        manager.folder("models/tiny").open("../secret")


def test_a_wrong_secret_is_refused_with_a_remedy(s3_server: S3Server, manager: S3Manager) -> None:
    wrong = s3_server.settings.model_copy(update={"secret_access_key": SecretStr("wrong")})
    with pytest.raises(StorageError, match=r"refuses access[^$]*remedy: check the access key"):
        S3Manager(wrong).stream_model("models/tiny/config.json")


def test_a_server_that_is_not_there_is_named() -> None:
    settings = S3Settings(
        endpoint_url="http://127.0.0.1:9",
        access_key_id=SecretStr("a"),
        secret_access_key=SecretStr("b"),
        max_attempts=1,
    )
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9[^$]*remedy: check s3.endpoint_url"):
        S3Manager(settings).stream_model("s3://b/k")


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    settings = S3Settings(endpoint_url="http://127.0.0.1:9", max_attempts=1)
    with pytest.raises(StorageError, match=r"no credentials[^$]*AWS_ACCESS_KEY_ID"):
        S3Manager(settings).stream_model("s3://b/k")


def test_a_key_needs_a_bucket(s3_server: S3Server) -> None:
    settings = s3_server.settings.model_copy(update={"bucket": None})
    with pytest.raises(StorageError, match="names no bucket"):
        S3Manager(settings).stream_model("models/tiny")
