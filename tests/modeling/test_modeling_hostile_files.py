"""Damaged and hostile files: one error that names file and tensor, soon, and nothing runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from modeling_families import build_causal_lm, build_mtp
from safetensors.torch import load_file, save_file

from wmtp.exceptions import ModelLoadError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.kinds import detect_kind
from wmtp.modeling.formats.sources import LocalSource, locate_source
from wmtp.modeling.formats.tensors import open_tensors

_NAME = "model.layers.1.mlp.up_proj.weight"
_WITHIN_S = 2.0  # a second, and another for a machine that is busy
_MARKER = "executed"


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def _plain(folder: Path) -> dict[str, torch.Tensor]:
    build_causal_lm("llama").save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _sharded(folder: Path) -> dict:
    build_causal_lm("llama").save_pretrained(folder, max_shard_size="20KB")
    return json.loads((folder / "model.safetensors.index.json").read_text())


def _edit_index(folder: Path, entry: str) -> None:
    index = _sharded(folder)
    index["weight_map"][_NAME] = entry
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _edit_tensors(folder: Path, edit: Callable[[dict], object], *, as_bin: bool = False) -> None:
    state = _plain(folder)
    edit(state)
    if as_bin:
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **changes: object) -> None:
    _plain(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _replace(folder: Path, name: str, content: bytes) -> None:
    _plain(folder)
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)


def _cut(folder: Path, *, as_bin: bool) -> None:
    _edit_tensors(folder, lambda state: None, as_bin=as_bin)
    file = folder / ("pytorch_model.bin" if as_bin else "model.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _swap_shards(folder: Path) -> None:
    """The index lists a tensor in a shard that does not have it."""
    index = _sharded(folder)
    files = sorted(set(index["weight_map"].values()))
    own = index["weight_map"][_NAME]
    index["weight_map"][_NAME] = next(file for file in files if file != own)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _link_out(folder: Path) -> None:
    _plain(folder)
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def _claims_more_than_it_has(folder: Path) -> None:
    """A tensor of a few bytes whose strides of 0 make it a million times as large."""
    huge = torch.zeros(1).expand(1_000_000, 1_000_000)
    _edit_tensors(folder, lambda state: state.update({_NAME: huge}), as_bin=True)


def _compressed(folder: Path) -> None:
    _edit_tensors(folder, lambda state: None, as_bin=True)
    file = folder / "pytorch_model.bin"
    packed = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
        new.writestr("archive/data.pkl.more", bytes(50_000_000))
    file.write_bytes(packed.getvalue())


def _native_with_code(folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 2, "n_heads": 4}))
    torch.save({"norm.weight": _Payload(folder / _MARKER)}, folder / "consolidated.pth")


def _header(length: int, content: bytes = b"{}") -> bytes:
    return length.to_bytes(8, "little") + content


def _json_header(header: object, tensors: bytes = b"") -> bytes:
    content = json.dumps(header).encode()
    return _header(len(content), content) + tensors


_DEEP = b'{"a":' * 100_000
_SAFE = r"model\.safetensors is not a readable safetensors file"
_BIN = r"pytorch_model\.bin is not a readable torch file"

CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut safetensors": (lambda f: _cut(f, as_bin=False), _SAFE),
    "cut pickle": (lambda f: _cut(f, as_bin=True), _BIN),
    "empty safetensors": (lambda f: _replace(f, "model.safetensors", b""), _SAFE),
    "empty pickle": (lambda f: _replace(f, "pytorch_model.bin", b""), _BIN),
    "noise for safetensors": (lambda f: _replace(f, "model.safetensors", os.urandom(4096)), _SAFE),
    "noise for pickle": (lambda f: _replace(f, "pytorch_model.bin", os.urandom(4096)), _BIN),
    "header of many GB": (lambda f: _replace(f, "model.safetensors", _header(2**40)), _SAFE),
    "header above the bound": (
        lambda f: _replace(f, "model.safetensors", _header(150_000_000, b"{}" + b" " * 1000)),
        _SAFE,
    ),
    "misshapen": (
        lambda f: _edit_tensors(f, lambda s: s.update({_NAME: torch.ones(47, 32)})),
        rf"model\.safetensors: tensor '{_NAME}' has shape \[47, 32\], the model needs \[48, 32\]",
    ),
    "misshapen pickle": (
        lambda f: _edit_tensors(f, lambda s: s.update({_NAME: torch.ones(48)}), as_bin=True),
        rf"pytorch_model\.bin: tensor '{_NAME}' has shape \[48\], the model needs \[48, 32\]",
    ),
    "missing tensor": (
        lambda f: _edit_tensors(f, lambda s: s.pop(_NAME)),
        rf"model\.safetensors lacks the tensor '{_NAME}'",
    ),
    "missing tensor of a pickle": (
        lambda f: _edit_tensors(f, lambda s: s.pop(_NAME), as_bin=True),
        rf"pytorch_model\.bin lacks the tensor '{_NAME}'",
    ),
    "no tensors at all": (
        lambda f: _edit_tensors(f, lambda s: s.clear(), as_bin=True),
        r"weights have 0 tensors",
    ),
    "tensor in another shard": (
        _swap_shards,
        rf"model-0000.*\.safetensors lacks the tensor '{_NAME}', which",
    ),
    "absent shard": (
        lambda f: _edit_index(f, "absent.safetensors"),
        rf"absent\.safetensors is missing.*'{_NAME}'",
    ),
    "index entry upwards": (
        lambda f: _edit_index(f, "../up.safetensors"),
        r"index\.json.*'\.\./up.*not a plain",
    ),
    "absolute index entry": (
        lambda f: _edit_index(f, "/etc/passwd"),
        r"index\.json.*'/etc/passwd' is not a plain",
    ),
    "index entry of another kind": (
        lambda f: _edit_index(f, "config.json"),
        r"config\.json is no file of tensors",
    ),
    "link out of the folder": (_link_out, r"model\.safetensors is a link to .*outside\.safetensors"),
    "pickle with code": (
        lambda f: _edit_tensors(f, lambda s: s.update({_NAME: _Payload(f / _MARKER)}), as_bin=True),
        rf"{_BIN}: its pickle asks for posix\.mkdir",
    ),
    "bare pickle with code": (
        lambda f: _replace(f, "pytorch_model.bin", pickle.dumps(_Payload(f / _MARKER))),
        rf"{_BIN}",
    ),
    "native file with code": (
        _native_with_code,
        r"consolidated\.pth is not a readable torch file: .*posix\.mkdir",
    ),
    "not tensors": (
        lambda f: _edit_tensors(f, lambda s: s.update({_NAME: "text"}), as_bin=True),
        rf"{_BIN}: the entry '{_NAME}' is str",
    ),
    "claims more than it has": (_claims_more_than_it_has, rf"{_BIN}: tensor '{_NAME}'"),
    "compressed pickle": (_compressed, rf"{_BIN}: its entry .* is compressed"),
    "config that is no JSON": (lambda f: _replace(f, "config.json", b"{"), r"config\.json cannot be read"),
    "config that is a list": (
        lambda f: _replace(f, "config.json", b"[]"),
        r"config\.json must hold a JSON object",
    ),
    "config nested too deep": (lambda f: _replace(f, "config.json", _DEEP), r"config\.json cannot be read"),
    "config nested deep": (
        lambda f: _replace(f, "config.json", b'{"a":' * 500 + b"1" + b"}" * 500),
        r"config\.json cannot be read: .*nested",
    ),
    "unknown architecture": (lambda f: _edit_config(f, model_type="nosuch"), r"config\.json cannot be used"),
    "no architecture": (lambda f: _edit_config(f, model_type=None), r"config\.json has no model_type"),
    "values of another type": (lambda f: _edit_config(f, hidden_size="wide"), r"config\.json cannot be used"),
    "a thousand million layers": (
        lambda f: _edit_config(f, num_hidden_layers=10**9),
        r"config\.json has num_hidden_layers 1000000000",
    ),
    "huge vocabulary": (
        lambda f: _edit_config(f, vocab_size=10**9),
        r"tensor 'model\.embed_tokens\.weight' has shape \[97, 32\], the model needs \[1000000000, 32\]",
    ),
    "code key": (lambda f: _edit_config(f, auto_map={"AutoModel": "x.Y"}), r"config\.json has 'auto_map'"),
    "quantisation key": (
        lambda f: _edit_config(f, quantization_config={"quant_method": "bitsandbytes"}),
        r"config\.json has 'quantization_config'",
    ),
    "adapter": (
        lambda f: (_plain(f), (f / "adapter_config.json").write_text("{}")),
        r"holds an adapter \(adapter_config\.json\)",
    ),
    "broken generation config": (
        lambda f: (_plain(f), (f / "generation_config.json").write_text("[1]")),
        r"generation_config\.json must hold a JSON object",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_error_names_what_is_wrong_and_nothing_runs(case: str, tmp_path: Path) -> None:
    write, message = CASES[case]
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder)
    start = time.perf_counter()
    with pytest.raises(ModelLoadError, match=message) as caught:
        MTPModel.from_pretrained(folder)
    assert time.perf_counter() - start < _WITHIN_S
    assert str(folder) in str(caught.value)
    assert not (folder / _MARKER).exists()


def test_a_link_within_the_folder_and_the_hubs_cache_of_links_are_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    _plain(snapshot)
    (tmp_path / "models--org--name" / "blobs").mkdir()
    blob = tmp_path / "models--org--name" / "blobs" / "123"
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/123"))
    assert MTPModel.from_pretrained(snapshot).horizon == 1
    (tmp_path / "link").symlink_to(snapshot, target_is_directory=True)
    assert MTPModel.from_pretrained(tmp_path / "link").horizon == 1


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    _plain(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is a link to nothing"):
        MTPModel.from_pretrained(tmp_path)


def test_code_in_a_lone_reward_model_file_does_not_run(tmp_path: Path) -> None:
    torch.save({"v_head.weight": _Payload(tmp_path / _MARKER)}, tmp_path / "starling.pt")
    with pytest.raises(ModelLoadError, match=r"starling\.pt is not a readable torch file: .*posix\.mkdir"):
        detect_kind(locate_source(tmp_path))
    assert not (tmp_path / _MARKER).exists()


def test_heads_that_a_description_claims_and_the_file_lacks_are_not_built(tmp_path: Path) -> None:
    build_mtp("llama", horizon=2).save_pretrained(tmp_path)
    description = json.loads((tmp_path / "wmtp.json").read_text())
    many = {"horizon": 100_000, "offsets": list(range(1, 100_001))}
    (tmp_path / "wmtp.json").write_text(json.dumps({**description, **many}))
    start = time.perf_counter()
    with pytest.raises(ModelLoadError, match=r"mtp_heads\.safetensors has no tensor of head 2"):
        MTPModel.from_pretrained(tmp_path)
    assert time.perf_counter() - start < _WITHIN_S


class _Stream(LocalSource):
    """Files that can only be streamed, so that the own reader of headers is used."""

    def find(self, name: str) -> None:
        return None

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO((self.directory / name).read_bytes())


_FOUR = bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        _header(2**40),
        _header(150_000_000),
        _header(4, b"[1]x"),
        _header(len(_DEEP), _DEEP),
        _json_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, _FOUR),
        _json_header({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, _FOUR),
        _json_header({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]}}, _FOUR),
        _json_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, _FOUR),
        _json_header({"a": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}}, _FOUR),
        _json_header({"a": {"shape": [4], "data_offsets": [0, 16]}}, _FOUR),
        _json_header({"a": [1]}, _FOUR),
        _json_header({"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, _FOUR),
        _json_header({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, _FOUR),
    ],
)
def test_a_streamed_header_that_lies_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"x\.safetensors"):
        open_tensors(_Stream(tmp_path), "x.safetensors")
