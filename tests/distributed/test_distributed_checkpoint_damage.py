"""Damaged and hostile checkpoints: found before a weight is used; nothing runs, nothing outside is read."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import FILES, assert_found, damages, save, tensors, use

from wmtp.distributed.checkpoint import find_latest_valid, save_checkpoint
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.distributed.publishing import file_sha256, manifest_bytes
from wmtp.exceptions import CheckpointError


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def step(store: LocalStore) -> Path:
    """The folder of a whole checkpoint, step-5."""
    return Path(save(store, 5).info.uri)


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("file", FILES)
def test_a_byte_flipped_cut_or_added_is_found_before_use(store: LocalStore, step: Path, file: str) -> None:
    use(store, "step-5")
    assert {path.name for path in step.iterdir()} == set(FILES)
    content = (step / file).read_bytes()
    for damage, changed in damages(content):
        (step / file).write_bytes(changed)
        assert_found(store, "step-5", file, f"{file} {damage}")
    (step / file).unlink()
    assert_found(store, "step-5", file, f"{file} deleted")
    (step / file).mkdir()
    assert_found(store, "step-5", file, f"{file} a folder")
    (step / file).rmdir()
    os.mkfifo(step / file)
    assert_found(store, "step-5", file, f"{file} a pipe")
    (step / file).unlink()
    (step / file).write_bytes(content)
    use(store, "step-5")


@pytest.mark.parametrize("file", FILES)
def test_a_link_is_refused_even_to_the_same_bytes(store: LocalStore, step: Path, file: str) -> None:
    (step / file).rename(step.parent / "elsewhere")
    (step / file).symlink_to(step.parent / "elsewhere")
    assert_found(store, "step-5", file, f"{file} a link")


def test_a_file_swapped_with_another_checkpoints_is_found(store: LocalStore, step: Path) -> None:
    other = Path(save(store, 6).info.uri)
    for file in ("model.safetensors", "state.json"):
        content = (step / file).read_bytes()
        (step / file).write_bytes((other / file).read_bytes())
        with pytest.raises(CheckpointError, match=file):
            use(store, "step-5")
        (step / file).write_bytes(content)


# ------------------------------------------------------------------------------------------ hostility


def _reseal(step: Path, *, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Write a manifest that fits the files as they are now, as somebody who means harm would."""
    manifest = json.loads((step / "manifest.json").read_bytes())
    del manifest["sha256"], manifest["schema"]
    for name, entry in manifest["files"].items():
        path = step / name
        if path.is_file():
            entry.update(size=path.stat().st_size, sha256=file_sha256(path))
    change(manifest)
    files = manifest.pop("files")
    (step / "manifest.json").write_bytes(manifest_bytes(files, manifest))


@contextmanager
def _bounded(max_mib: int = 24) -> Iterator[None]:
    """A second of this thread's time, and little memory: of Python, and of the process with torch's."""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    start, busy = time.monotonic(), time.process_time()
    yield
    # Others use this machine too: what counts is work, unless the time went by in waiting.
    assert time.process_time() - busy < 1.0
    assert time.monotonic() - start < 5.0
    assert tracemalloc.get_traced_memory()[1] < max_mib * 2**20
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 2 * max_mib * 1024


def _assert_refused(store: LocalStore, file: str, *, max_mib: int = 24) -> None:
    with pytest.raises(CheckpointError) as caught, _bounded(max_mib):
        use(store, "step-5")
    assert file in caught.value.message
    assert "Traceback" not in str(caught.value)


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_code_in_a_pickle_never_runs_whatever_file_it_is(
    store: LocalStore, step: Path, tmp_path: Path, file: str, form: str
) -> None:
    marker = tmp_path / "ran"
    if form == "pickle":
        (step / file).write_bytes(pickle.dumps(_Bomb(marker)))
    else:
        torch.save({"x": _Bomb(marker)}, step / file)
    if file != "manifest.json":
        _reseal(step)
    _assert_refused(store, file)
    find_latest_valid(store)
    assert not marker.exists()
    pickle.loads(pickle.dumps(_Bomb(marker)))
    assert marker.exists(), "the bomb was none"


def test_torchs_own_metadata_beside_a_checkpoint_is_never_read(
    store: LocalStore, step: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    for folder in (step, step.parent):
        (folder / ".metadata").write_bytes(pickle.dumps(_Bomb(marker)))
    use(store, "step-5")
    assert find_latest_valid(store)[0] is not None
    save_checkpoint(store, 6, tensors=tensors(), state={})
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", ""])
@pytest.mark.parametrize("is_prefix", [False, True])
def test_names_that_lead_out_of_the_folder_are_refused(
    store: LocalStore, step: Path, name: str, is_prefix: bool
) -> None:
    secret = step.parent / "secret"
    for file in FILES[1:]:
        (step.parent / f"secret{file}").write_bytes((step / file).read_bytes())
    secret.write_bytes((step / "model.safetensors").read_bytes())

    def change(manifest: dict[str, Any]) -> None:
        if is_prefix and name:
            manifest["prefix"] = name
            manifest["files"] = {name + file: entry for file, entry in manifest["files"].items()}
        else:
            manifest["files"][name] = manifest["files"]["model.safetensors"]

    index = json.loads((step / "index.json").read_bytes())
    for tensor in index["tensors"].values():
        for chunk in tensor["chunks"]:
            chunk["file"] = name if chunk["file"].startswith("model") else chunk["file"]
    (step / "index.json").write_text(json.dumps(index))
    _reseal(step, change=change)
    _assert_refused(store, "points out of the folder")
    assert "points out" in dict(find_latest_valid(store)[1])["step-5"]


def test_a_link_to_a_folder_outside_is_refused(store: LocalStore, step: Path) -> None:
    outside = step.parent / "outside"
    outside.mkdir()
    (step / "model.safetensors").rename(outside / "model.safetensors")
    (step / "in").symlink_to(outside)

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"]["in/model.safetensors"] = manifest["files"].pop("model.safetensors")

    text = (step / "index.json").read_text().replace('"model.safetensors"', '"in/model.safetensors"')
    (step / "index.json").write_text(text)
    _reseal(step, change=change)
    _assert_refused(store, "in/model.safetensors: cannot be read (it is not a plain file")


Change = Callable[[dict[str, Any]], Any]


def _of_weight(**values: Any) -> Change:
    return lambda index: index["tensors"]["model/w"].update(values)


def _of_chunk(**values: Any) -> Change:
    return lambda index: index["tensors"]["model/w"]["chunks"][0].update(values)


def _twice(index: dict[str, Any]) -> None:
    chunks = index["tensors"]["model/w"]["chunks"]
    chunks.append(dict(chunks[0]))


def _halves(first: tuple[int, int], second: tuple[int, int]) -> Change:
    def change(index: dict[str, Any]) -> None:
        weight = index["tensors"]["model/w"]
        chunk = weight["chunks"][0]
        weight["chunks"] = [
            {**chunk, "offsets": [start, 0], "sizes": [size, 5], "key": f"w@{start}"}
            for start, size in (first, second)
        ]

    return change


_WRONG_INDEXES: dict[str, Change] = {
    "a file that is not listed": _of_chunk(file="other.safetensors"),
    "a file outside": _of_chunk(file="../step-5/model.safetensors"),
    "the manifest as a file": _of_chunk(file="manifest.json"),
    "another kind of file": _of_chunk(file="state.json"),
    "a file that is no name": _of_chunk(file=["model.safetensors"]),
    "a key that is not in the file": _of_chunk(key="other"),
    "another tensor's key": _of_chunk(key="b"),
    "a key that is no name": _of_chunk(key=3),
    "negative offsets": _of_chunk(offsets=[-1, 0]),
    "negative sizes": _of_chunk(sizes=[-3, -5]),
    "huge offsets": _of_chunk(offsets=[2**62, 0]),
    "huge sizes": _of_chunk(sizes=[2**40, 2**40]),
    "fractions": _of_chunk(sizes=[3.0, 5]),
    "booleans": _of_chunk(offsets=[False, False]),
    "too few sizes": _of_chunk(sizes=[15]),
    "too many offsets": _of_chunk(offsets=[0, 0, 0]),
    "an offset past the end": _of_chunk(offsets=[1, 0]),
    "a smaller chunk": _of_chunk(sizes=[2, 5]),
    "no chunk": _of_weight(chunks=[]),
    "chunks that are no list": _of_weight(chunks={"0": 1}),
    "a chunk that is none": _of_weight(chunks=["x"]),
    "the same chunk twice": _twice,
    "overlapping chunks": _halves((0, 2), (1, 1)),
    "chunks with a gap": _halves((0, 1), (2, 1)),
    "chunks that are not in the file": _halves((0, 1), (1, 2)),
    "an unknown dtype": _of_weight(dtype="F128"),
    "a dtype that is no name": _of_weight(dtype=["F32"]),
    "a wider dtype": _of_weight(dtype="F64"),
    "another dtype of the same size": _of_weight(dtype="I32"),
    "a huge shape": _of_weight(shape=[2**40, 2**20]),
    "an impossible shape": _of_weight(shape=[2**62, 2**62]),
    "a shape of huge numbers": _of_weight(shape=[10**4000] * 60),
    "an empty shape of impossible sizes": _of_weight(shape=[0, 2**62, 2**62], chunks=[]),
    "a negative shape": _of_weight(shape=[-3, -5]),
    "a thousand dimensions": _of_weight(shape=[1] * 1000),
    "a shape that is none": _of_weight(shape="3x5"),
    "a missing shape": lambda index: index["tensors"]["model/w"].pop("shape"),
    "an unknown field": _of_weight(run="os.system"),
    "a tensor that is none": lambda index: index["tensors"].update({"model/w": 7}),
    "a tensor without a group": lambda index: index["tensors"].update(w=index["tensors"]["model/w"]),
    "a tensor that the file does not hold": lambda index: index["tensors"].update(
        {"model/v": index["tensors"]["model/w"]}
    ),
    "no tensors": lambda index: index.pop("tensors"),
    "tensors that are no names": lambda index: index.update(tensors=[1]),
    "no aliases": lambda index: index.pop("aliases"),
    "aliases that are no names": lambda index: index.update(aliases=[]),
    "an alias of nothing": lambda index: index["aliases"]["model"].update(w_tied="nothing"),
    "an alias of another group": lambda index: index["aliases"]["model"].update(w_tied="../rng/torch"),
    "an alias that is a tensor": lambda index: index["aliases"]["model"].update(b="w"),
    "an alias of a list": lambda index: index["aliases"]["model"].update(w_tied=["w"]),
    "a group of aliases that is none": lambda index: index["aliases"].update(model="w"),
    "an alias in a circle": lambda index: index["aliases"]["model"].update(x="y", y="x"),
}


@pytest.mark.parametrize("case", _WRONG_INDEXES)
def test_an_index_that_cannot_be_right_is_refused(store: LocalStore, step: Path, case: str) -> None:
    index = json.loads((step / "index.json").read_bytes())
    _WRONG_INDEXES[case](index)
    (step / "index.json").write_text(json.dumps(index))
    _reseal(step)
    with pytest.raises(CheckpointError, match=r"index\.json|model\.safetensors"), _bounded():
        use(store, "step-5")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "5"},
        {"step": None},
        {"sequence": 1.5},
        {"sequence": True},
        {"score": "nan"},
        {"score": [1]},
        {"permanent": 1},
        {"prefix": None},
        {"prefix": ["a"]},
        {"prefix": "elsewhere/"},
        {"format": "other"},
        {"files": {}},
        {"files": {"state.json": {"size": 1, "sha256": "0"}}},
        {"files": {"state.json": {"size": -1, "sha256": "0"}, "index.json": {"size": 2**62, "sha256": ""}}},
    ],
)
def test_a_manifest_of_another_form_is_refused(store: LocalStore, step: Path, change: dict[str, Any]) -> None:
    _reseal(step, change=lambda manifest: manifest.update(change))
    _assert_refused(store, "step-5")
    found, skipped = find_latest_valid(store)
    assert found is None
    assert dict(skipped).keys() == {"step-5"}
    save(store, 6)
    assert find_latest_valid(store)[0] is not None


def _header(length: int, header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", length % 2**64) + header + data


_BOMB_SIZE = 100 * 10**6
_HEADERS: dict[str, Callable[[], bytes]] = {
    "a length of 2**63": lambda: _header(2**63, b"{}"),
    "a length of 2**64 - 1": lambda: _header(-1, b"{}"),
    "a length beyond the file": lambda: _header(1000, b"{}"),
    "no header": lambda: b"",
    "seven bytes": lambda: b"\0" * 7,
    "deep lists": lambda: _header(200_000, b"[" * 200_000),
    "deep objects": lambda: _header(500_000, b'{"a":' * 100_000),
    "100 MB of blanks": lambda: _header(_BOMB_SIZE, b" " * _BOMB_SIZE),
    "a huge shape": lambda: _tensor_file(shape=[2**62, 2**62], data_offsets=[0, 60]),
    "an overflowing shape": lambda: _tensor_file(shape=[2**32, 2**32, 15], data_offsets=[0, 60]),
    "negative offsets": lambda: _tensor_file(data_offsets=[-60, 0]),
    "offsets beyond the file": lambda: _tensor_file(data_offsets=[0, 2**62]),
    "duplicate keys": lambda: _header(
        104, b'{"w":' + b'{"dtype":"F32","shape":[3,5],"data_offsets":[0,60]},' * 2
    ),
    "an unknown dtype": lambda: _tensor_file(dtype="PICKLE"),
    "not UTF-8": lambda: _header(8, b"\xff" * 8),
}


def _tensor_file(**changes: Any) -> bytes:
    tensor = {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60], **changes}
    raw = json.dumps({"w": tensor}).encode()
    return _header(len(raw), raw, b"\0" * 60)


@pytest.mark.parametrize("case", _HEADERS)
def test_a_bomb_in_a_safetensors_header_is_refused(store: LocalStore, step: Path, case: str) -> None:
    (step / "model.safetensors").write_bytes(_HEADERS[case]())
    _reseal(step)
    # The index claims as many bytes as the bomb has.
    _assert_refused(store, "model.safetensors")


@pytest.mark.parametrize("fill", [b"[", b" ", b"\xff", b"\0"])
def test_another_header_of_the_same_length_is_refused(store: LocalStore, step: Path, fill: bytes) -> None:
    content = (step / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    (step / "model.safetensors").write_bytes(content[:8] + fill * length + content[8 + length :])
    _reseal(step)
    _assert_refused(store, "model.safetensors: its header is not")


def test_a_shape_that_agrees_with_everything_but_the_file_takes_no_memory(
    store: LocalStore, step: Path
) -> None:
    """Index and manifest claim a terabyte, and the file has a few bytes: nothing is allocated for it."""
    index = json.loads((step / "index.json").read_bytes())
    weight = index["tensors"]["model/w"]
    weight["shape"] = weight["chunks"][0]["sizes"] = [2**19, 2**19]
    (step / "index.json").write_text(json.dumps(index))

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"]["model.safetensors"]["size"] = 2**40 + 1000

    _reseal(step, change=change)
    _assert_refused(store, "model.safetensors")


@pytest.mark.parametrize("file", ["state.json", "index.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"n": ' + b"9" * 100_000 + b"}",
        b"[]",
        b"null",
        b'"step"',
        b"\xff\xfe",
        b"",
        b"NaN",
    ],
)
def test_json_that_is_a_bomb_or_no_object_is_refused(
    store: LocalStore, step: Path, file: str, content: bytes
) -> None:
    (step / file).write_bytes(content)
    _reseal(step)
    _assert_refused(store, file)


def test_a_json_file_of_terabytes_is_not_read(store: LocalStore, step: Path) -> None:
    with (step / "state.json").open("wb") as file:
        file.truncate(2**40)

    manifest = json.loads((step / "manifest.json").read_bytes())
    manifest["files"]["state.json"] = {"size": 2**40, "sha256": "0" * 64}
    extra = {key: manifest[key] for key in manifest.keys() - {"files", "sha256", "schema"}}
    (step / "manifest.json").write_bytes(manifest_bytes(manifest["files"], extra))
    _assert_refused(store, "state.json")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"null", b"[]", b"7", b'{"sha256": {}}', b"9" * 10_000])
def test_a_manifest_that_is_a_bomb_or_no_object_is_refused(
    store: LocalStore, step: Path, content: bytes
) -> None:
    (step / "manifest.json").write_bytes(content)
    _assert_refused(store, "manifest.json")
    with (step / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    _assert_refused(store, "manifest.json")


def test_a_checkpoint_whose_numbers_are_huge_is_only_a_newer_one(store: LocalStore, step: Path) -> None:
    _reseal(step, change=lambda manifest: manifest.update(sequence=10**3000, score=10**300))
    checkpoint = save(store, 6, score=0.5)
    assert checkpoint.info.sequence == 10**3000 + 1
    found, _ = find_latest_valid(store)
    assert found is not None
    assert found.name == "step-6"
    assert Checkpoint(store, "step-5").problems() == []
