"""Publishing: all or nothing, and any later change is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wmtp.exceptions import UserInputError
from wmtp.storage.atomic import publish_directory, read_manifest, verify_manifest, write_json_atomic


def _publish(folder: Path) -> Path:
    with publish_directory(folder, extra={"note": "x"}) as staging:
        (staging / "a.bin").write_bytes(bytes(range(200)))
        (staging / "sub").mkdir()
        (staging / "sub/b.txt").write_text("hello")
    return folder


def test_a_published_folder_is_whole_and_listed(tmp_path: Path) -> None:
    folder = _publish(tmp_path / "parent/out")
    manifest = read_manifest(folder)
    assert manifest["note"] == "x"
    assert manifest["files"]["a.bin"]["size"] == 200
    assert set(manifest["files"]) == {"a.bin", "sub/b.txt"}
    assert verify_manifest(folder) == []
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with publish_directory(tmp_path / "out") as staging:
            (staging / "a").write_text("x")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_seen_under_the_name_before_the_end(tmp_path: Path) -> None:
    with publish_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("x")
        assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept_unless_replace_is_said(tmp_path: Path) -> None:
    folder = _publish(tmp_path / "out")
    with pytest.raises(UserInputError, match="exists already"), publish_directory(folder):
        pass
    assert verify_manifest(folder) == []
    with publish_directory(folder, replace=True) as staging:
        (staging / "new").write_text("x")
    assert set(read_manifest(folder)["files"]) == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path: Path) -> None:
    folder = _publish(tmp_path / "out")
    with pytest.raises(OSError, match="disk"), publish_directory(folder, replace=True):
        raise OSError("disk")
    assert verify_manifest(folder) == []


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    folder = _publish(tmp_path / "out")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        original = path.read_bytes()
        for position in range(len(original)):
            changed = bytearray(original)
            changed[position] ^= 0x10 if position % 2 else 0x01
            path.write_bytes(changed)
            assert verify_manifest(folder), f"{path.name} byte {position}"
        path.write_bytes(original)
    assert verify_manifest(folder) == []


def test_every_cut_lengthened_or_missing_file_is_found(tmp_path: Path) -> None:
    folder = _publish(tmp_path / "out")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        original = path.read_bytes()
        for content in (original[:-1], b"", original + b"\n"):
            path.write_bytes(content)
            assert verify_manifest(folder), path.name
        path.unlink()
        assert verify_manifest(folder), path.name
        path.write_bytes(original)


def test_without_hashes_sizes_are_still_compared(tmp_path: Path) -> None:
    folder = _publish(tmp_path / "out")
    (folder / "a.bin").write_bytes(bytes(200))
    assert verify_manifest(folder, hashes=False) == []
    (folder / "a.bin").write_bytes(bytes(199))
    assert verify_manifest(folder, hashes=False) == ["a.bin: has 199 bytes, the manifest says 200"]


def test_files_outside_the_folder_are_never_read(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.txt").write_text("hello")
    folder = _publish(tmp_path / "out")
    (folder / "sub/b.txt").unlink()
    (folder / "sub/b.txt").symlink_to(outside / "b.txt")
    assert verify_manifest(folder) == ["sub/b.txt: is not a plain file in the folder"]
    (folder / "sub/b.txt").unlink()
    (folder / "sub").rmdir()
    (folder / "sub").symlink_to(outside)
    assert verify_manifest(folder) == ["sub/b.txt: is not a plain file in the folder"]


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/../../x", ""])
def test_names_that_leave_the_folder_are_a_problem(tmp_path: Path, name: str) -> None:
    from wmtp.distributed.publishing import _digested

    body = {"schema": 1, "files": {name: {"size": 1, "sha256": "0"}}}
    (tmp_path / "manifest.json").write_bytes(_digested(body))
    assert verify_manifest(tmp_path) == [f"{name}: the name points out of the folder"]


@pytest.mark.parametrize("files", [None, [], {"a": 1}, {"a": {"size": "1", "sha256": "0"}}])
def test_a_manifest_of_another_form_is_a_problem(tmp_path: Path, files: object) -> None:
    from wmtp.distributed.publishing import _digested

    (tmp_path / "manifest.json").write_bytes(_digested({"schema": 1, "files": files}))
    assert "not understood" in verify_manifest(tmp_path)[0]


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_a_problem(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert len(verify_manifest(tmp_path)) == 1


def test_links_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain files"), publish_directory(tmp_path / "out") as staging:
        (staging / "link").symlink_to("/etc/hostname")


def test_json_is_replaced_in_one_step_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep/file.json"
    write_json_atomic(path, {"value": 0.1 + 0.2, "text": "한국어"})
    write_json_atomic(path, {"value": 0.1 + 0.2, "text": "한국어", "more": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "value": 0.1 + 0.2,
        "text": "한국어",
        "more": None,
    }
    with pytest.raises(TypeError):
        write_json_atomic(path, {"value": object()})
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
