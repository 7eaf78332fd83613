"""What kind of model a folder holds is told by its files."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import mistral_common
import pytest
import sentencepiece
import torch
from huggingface_hub import constants
from modeling_families import build_causal_lm, build_mtp, random_tokens
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, LlamaForSequenceClassification, MambaConfig

from wmtp.components.tokenizer import HfTokenizer, TokenizerSettings
from wmtp.exceptions import ModelLoadError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.configuration import context_length
from wmtp.modeling.formats.kinds import (
    ModelKind,
    detect_causal_lm,
    detect_described_kind,
    detect_kind,
    detect_reward_model,
    native_weights,
)
from wmtp.modeling.formats.load import load_mtp_model
from wmtp.modeling.formats.sources import LocalSource, ModelSource, locate_source
from wmtp.modeling.formats.tensors import open_tensors, open_weights
from wmtp.modeling.heads import HeadRequest


def _hugging_face(folder: Path) -> None:
    build_causal_lm("llama").save_pretrained(folder)


def _sharded(folder: Path) -> None:
    build_causal_lm("llama").save_pretrained(folder, max_shard_size="20KB")


def _sharded_pickle(folder: Path) -> None:
    """Sheared-LLaMA's layout."""
    _sharded(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in sorted(folder.glob("model-*.safetensors")):
        torch.save(load_file(file), folder / _as_bin(file.name))
        file.unlink()
    index["weight_map"] = {name: _as_bin(file) for name, file in index["weight_map"].items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors.index.json").unlink()


def _as_bin(name: str) -> str:
    return name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")


def _pickle(folder: Path) -> None:
    _hugging_face(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _old_pickle(folder: Path) -> None:
    """As written before torch 1.6."""
    _hugging_face(folder)
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()


def _native(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps({"dim": 32}))
    torch.save({"norm.weight": torch.ones(32)}, folder / "consolidated.pth")


def _export(folder: Path) -> None:
    build_mtp("llama", horizon=2).save_pretrained(folder)


def _step(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("manifest.json", "index.json", "state.json", "model.safetensors", "optimizer.safetensors"):
        (folder / name).write_bytes(b"")


def _run(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    _step(folder / "step-20")


def _starling(folder: Path, name: str = "starling_RM.pth") -> None:
    folder.mkdir(exist_ok=True)
    torch.save({"transformer.norm.weight": torch.ones(8), "v_head.weight": torch.ones(1, 8)}, folder / name)


def _starling_with_config(folder: Path) -> None:
    _starling(folder, "pytorch_model.bin")
    LlamaConfig().save_pretrained(folder)


def _classifier(folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_labels=1, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (_hugging_face, ModelKind.HUGGING_FACE),
        (_sharded, ModelKind.HUGGING_FACE),
        (_pickle, ModelKind.HUGGING_FACE),
        (_old_pickle, ModelKind.HUGGING_FACE),
        (_sharded_pickle, ModelKind.HUGGING_FACE),
        (_native, ModelKind.META_NATIVE),
        (_export, ModelKind.WMTP_EXPORT),
        (_step, ModelKind.WMTP_CHECKPOINT),
        (_run, ModelKind.WMTP_CHECKPOINT),
        (_starling, ModelKind.STARLING_REWARD),
        (_starling_with_config, ModelKind.STARLING_REWARD),
        (_classifier, ModelKind.SEQUENCE_CLASSIFICATION),
    ],
)
def test_each_kind_is_told_by_its_files(write, kind: ModelKind, tmp_path: Path) -> None:
    write(tmp_path / "any-name")
    assert detect_kind(locate_source(tmp_path / "any-name")) is kind


@pytest.mark.parametrize(
    ("write", "weights"),
    [
        (_hugging_face, "model.safetensors"),
        (_native, "consolidated.pth"),
        (_export, "model.safetensors"),
        (_classifier, "model.safetensors"),
    ],
)
def test_the_description_alone_tells_the_same_kind_with_and_without_weights(
    write, weights: str, tmp_path: Path
) -> None:
    write(tmp_path)
    source = locate_source(tmp_path)
    kind = detect_kind(source)
    assert detect_described_kind(source) is kind
    (tmp_path / weights).unlink()
    assert detect_described_kind(source) is kind


def test_params_beside_a_hugging_face_model_are_no_second_model_without_native_weights(
    tmp_path: Path,
) -> None:
    """Mistral publishes its models in one folder with params.json and consolidated.safetensors."""
    _hugging_face(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps({"dim": 32}))
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    source = locate_source(tmp_path)
    assert detect_kind(source) is detect_described_kind(source) is ModelKind.HUGGING_FACE
    torch.save({}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ModelLoadError, match="two models"):
        detect_described_kind(source)


def test_the_context_length_is_found_by_the_familys_own_name() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=99)) == 99
    assert context_length(MambaConfig()) is None


def test_a_lone_reward_model_file_may_be_named_itself(tmp_path: Path) -> None:
    _starling(tmp_path)
    (tmp_path / "other.pt").write_bytes(b"not read")
    assert detect_kind(locate_source(tmp_path / "starling_RM.pth")) is ModelKind.STARLING_REWARD


@pytest.mark.parametrize("write", [_sharded, _pickle, _old_pickle, _sharded_pickle])
def test_weights_in_every_form_load_alike(write, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _hugging_face(tmp_path / "plain")
    torch.manual_seed(0)
    write(tmp_path / "other")
    wanted, found = (MTPModel.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "other"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("write", [_hugging_face, _pickle])
def test_a_loaded_model_does_not_share_memory_with_its_files(write, tmp_path: Path) -> None:
    write(tmp_path)
    model = MTPModel.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = next(iter([*tmp_path.glob("model.safetensors"), *tmp_path.glob("*.bin")]))
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(bytes(size))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_transposed_views_in_a_torch_file_load_as_plain_tensors_that_can_be_exported(tmp_path: Path) -> None:
    _pickle(tmp_path / "base")
    file = tmp_path / "base" / "pytorch_model.bin"
    state = torch.load(file)
    torch.save({name: t.T.contiguous().T if t.ndim == 2 else t for name, t in state.items()}, file)
    model = MTPModel.from_pretrained(tmp_path / "base", horizon=2)
    assert all(torch.equal(model.causal_lm.state_dict()[name], tensor) for name, tensor in state.items())
    model.save_pretrained(tmp_path / "export")


def test_two_kinds_in_one_folder_are_an_error_that_lists_both(tmp_path: Path) -> None:
    _hugging_face(tmp_path)
    _native(tmp_path)
    with pytest.raises(ModelLoadError) as caught:
        detect_kind(locate_source(tmp_path))
    for part in ("holds two models", "model.safetensors", "params.json", "consolidated.pth", "config.json"):
        assert part in str(caught.value)


def test_a_folder_of_nothing_lists_what_it_holds_and_what_each_kind_needs(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "deeper").mkdir()
    with pytest.raises(ModelLoadError) as caught:
        detect_kind(locate_source(tmp_path))
    for part in ("notes.txt", "deeper/", "config.json", "params.json", "v_head.weight", "state.json"):
        assert part in str(caught.value)


def test_a_lone_torch_file_without_a_reward_head_says_so(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ModelLoadError, match=r"x\.pt, which has no tensor 'v_head\.weight'"):
        detect_kind(locate_source(tmp_path))


def test_a_reward_model_is_no_language_model_and_the_other_way_round(tmp_path: Path) -> None:
    _classifier(tmp_path / "classifier")
    _starling(tmp_path / "starling")
    _hugging_face(tmp_path / "plain")
    with pytest.raises(ModelLoadError, match=r"is a reward model .*not a causal language model"):
        MTPModel.from_pretrained(tmp_path / "classifier")
    with pytest.raises(ModelLoadError, match=r"Starling-RM, not a causal language model"):
        detect_causal_lm(locate_source(tmp_path / "starling"))
    with pytest.raises(ModelLoadError, match="is a Hugging Face model, not a reward model"):
        detect_reward_model(locate_source(tmp_path / "plain"))


def test_a_model_of_another_task_is_named(tmp_path: Path) -> None:
    _hugging_face(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ModelLoadError, match="the model is BertForMaskedLM"):
        MTPModel.from_pretrained(tmp_path)


def test_a_sliced_native_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    for number in range(2):
        (tmp_path / f"consolidated.0{number}.pth").write_bytes(b"")
    source = locate_source(tmp_path)
    assert detect_kind(source) is ModelKind.META_NATIVE
    with pytest.raises(ModelLoadError, match=r"2 weights files \(consolidated\.00\.pth, consolidated\.01"):
        native_weights(source)


# ------------------------------------------------------------------------------------- other sources


@dataclass
class StreamSource:
    """A source whose files are nowhere on this machine."""

    directory: Path

    def names(self) -> frozenset[str]:
        return LocalSource(self.directory).names()

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO((self.directory / name).read_bytes())

    def find(self, name: str) -> Path | None:
        return None

    def parent(self) -> ModelSource | None:
        return None

    def subfolders(self) -> list[str]:
        return []

    def __str__(self) -> str:
        return "memory://model"


@pytest.mark.parametrize("write", [_export, _sharded, _sharded_pickle, _old_pickle])
def test_a_model_loads_from_streams_as_from_a_directory(write, tmp_path: Path) -> None:
    write(tmp_path)
    arguments = {"dtype": torch.float32, "trust_remote_code": False}
    streamed = load_mtp_model(MTPModel, StreamSource(tmp_path), HeadRequest(), **arguments)
    local = MTPModel.from_pretrained(tmp_path)
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(streamed(tokens).logits(), local(tokens).logits())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_streamed_safetensors_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = {"a": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    wanted["empty"] = torch.ones(0, 3, dtype=dtype)
    save_file(wanted, tmp_path / "x.safetensors")
    found = open_tensors(StreamSource(tmp_path), "x.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())


def test_of_two_shards_with_the_same_tensor_the_index_says_which_is_meant(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file(
            {"x": torch.full((2,), float(number)), f"y{number}": torch.ones(1)},
            tmp_path / f"{number}.safetensors",
        )
    for meant in (1, 2):
        weight_map = {"x": f"{meant}.safetensors", "y1": "1.safetensors", "y2": "2.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        tensors = open_weights(locate_source(tmp_path))
        assert sorted(tensors) == ["x", "y1", "y2"]
        assert tensors["x"].tolist() == [float(meant)] * 2


def test_shapes_are_known_before_anything_is_read(tmp_path: Path) -> None:
    _hugging_face(tmp_path)
    source = StreamSource(tmp_path)
    shapes = open_weights(source).shapes()
    assert shapes == {name: tuple(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()}


# --------------------------------------------------------------------------------------------- the hub

MISTRAL_SENTENCEPIECE = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """The hub's API and file addresses: `open/model`, `many/models`, and `gated/model` behind a licence."""

    root: Path

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            folder = self.root / repo
            if not folder.is_dir():
                return self._send(401, b"", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
            files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": repo, "sha": _COMMIT, "siblings": siblings}).encode()
            return self._send(200, body, {"Content-Type": "application/json"}, with_body=with_body)
        parts = path.split("/")
        if parts[0] == "gated":
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."}
            return self._send(403, b"", headers, with_body=with_body)
        file = self.root.joinpath(*parts[:2], *parts[4:])
        # All files must be of the commit that was listed: `main` may move between two downloads.
        if parts[3] != _COMMIT or not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
        body = file.read_bytes()
        headers = {"ETag": f'"{hash(body) & 0xFFFFFFFF:08x}"', "X-Repo-Commit": _COMMIT}
        return self._send(200, body, headers, with_body=with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    root = tmp_path / "hub"
    _export(root / "open" / "model")
    _sharded(root / "many" / "models" / "7B_1T_4")
    _hugging_face(root / "many" / "models" / "7B_200B_1")
    (root / "many" / "models" / "tokenizer.model").write_bytes(b"tokens")
    _hugging_face(root / "gated" / "model")
    _native(root / "meta" / "models" / "7B_1T_4")
    shutil.copy(MISTRAL_SENTENCEPIECE, root / "meta" / "models" / "tokenizer.model")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"root": root}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def test_models_of_the_hub_load(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_hub(monkeypatch, hub, tmp_path / "cache")
    assert MTPModel.from_pretrained("open/model").horizon == 2
    assert MTPModel.from_pretrained("many/models:7B_1T_4").horizon == 1
    above = locate_source("many/models:7B_1T_4").parent()
    assert above is not None
    file = above.find("tokenizer.model")
    assert file is not None
    assert file.read_bytes() == b"tokens"
    assert above.find("tekken.json") is None
    downloaded = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/**/*")}
    assert "7B_200B_1" not in downloaded  # only what was asked for


def test_native_weights_on_the_hub_come_with_the_tokenizer_at_the_repositorys_root(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_hub(monkeypatch, hub, tmp_path / "cache")
    tokenizer = HfTokenizer(TokenizerSettings(path="meta/models:7B_1T_4"))
    expected = sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL_SENTENCEPIECE))
    text = "def f(x):\n    return x"
    assert tokenizer.encode_prompt(text) == expected.encode(text, add_bos=True)
    assert tokenizer.sentencepiece_model == MISTRAL_SENTENCEPIECE.read_bytes()


def test_a_bare_id_of_a_repository_of_several_models_lists_its_folders(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_hub(monkeypatch, hub, tmp_path / "cache")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.model(.|\n)*folders \(7B_1T_4, 7B_200B_1\)"):
        MTPModel.from_pretrained("many/models")
    with pytest.raises(ModelLoadError, match=r"no folder 'nope'(.|\n)*7B_1T_4, 7B_200B_1"):
        MTPModel.from_pretrained("many/models:nope")


@pytest.mark.parametrize(("path", "reason"), [("gated/model", "licence"), ("no/such", "keeps it private")])
def test_a_refused_model_names_the_token(
    path: str, reason: str, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use_hub(monkeypatch, hub, tmp_path / "cache")
    with pytest.raises(ModelLoadError, match=rf"{reason}(.|\n)*HF_TOKEN"):
        MTPModel.from_pretrained(path)


def test_a_hub_that_cannot_be_reached_is_replaced_by_its_cache(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _use_hub(monkeypatch, hub, tmp_path / "cache")
    wanted = MTPModel.from_pretrained("open/model").state_dict()
    _use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    found = MTPModel.from_pretrained("open/model").state_dict()
    assert "is taken from its cache" in caplog.text
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    with pytest.raises(ModelLoadError, match=r"gated/model .* the hub cannot be asked"):
        MTPModel.from_pretrained("gated/model")
