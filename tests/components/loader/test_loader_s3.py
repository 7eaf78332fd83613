"""Every kind of model from S3: bit for bit the one in a directory; nothing stays on this disk."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from s3_server import S3Server
from wmtp.components.loader import (
    ModelLoaderContext,
    RewardLoaderContext,
    RewardModelLoader,
    UnifiedModelLoader,
)
from wmtp.components.tokenizer import HfTokenizer, TokenizerSettings
from wmtp.evaluation.microcode import build_tokenizer
from wmtp.exceptions import ModelLoadError, StorageError
from wmtp.modeling import MTPModel
from wmtp.pipelines import RunOptions, run_training_pipeline, validate_settings
from wmtp.settings import Config, Recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "modeling"))
from native_reference import native_params, random_native

pytestmark = pytest.mark.s3

VOCABULARY = len(build_tokenizer())
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def _hugging_face(folder: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)


def _sharded(folder: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size="40KB")


def _pickled(folder: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _export(folder: Path) -> None:
    model = MTPModel.from_causal_lm(LlamaForCausalLM(LlamaConfig(**SIZES)), horizon=3, head="sequential")
    model.save_pretrained(folder)


def _native(folder: Path) -> None:
    params = native_params()
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(random_native(params), folder / "consolidated.pth")


def _classifier(folder: Path) -> None:
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(folder)


def _starling(folder: Path) -> None:
    causal_lm = LlamaForCausalLM(LlamaConfig(**SIZES))
    causal_lm.config.save_pretrained(folder)
    state = {f"model.{name}": tensor for name, tensor in causal_lm.state_dict().items()}
    state |= {f"transformer.{name}": tensor for name, tensor in causal_lm.model.state_dict().items()}
    torch.save({**state, "v_head.weight": torch.randn(1, 32)}, folder / "reward.pth")


@pytest.fixture
def upload(s3_server: S3Server, tmp_path: Path) -> Callable[[Path], str]:
    def put(folder: Path) -> str:
        target = f"{s3_server.bucket}/{tmp_path.name}/{folder.name}"
        filesystem = s3_server.filesystem()
        for file in folder.rglob("*"):
            if file.is_file():
                filesystem.put_file(str(file), f"{target}/{file.relative_to(folder)}")
        return f"s3://{target}"

    return put


@pytest.fixture
def config(s3_server: S3Server) -> Config:
    return Config(s3=s3_server.settings)


@pytest.mark.parametrize("make", [_hugging_face, _sharded, _pickled, _export, _native])
def test_a_language_model_on_s3_is_the_one_in_the_directory(
    make: Callable[[Path], None],
    tmp_path: Path,
    config: Config,
    upload: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    uri = upload(folder)
    expected = MTPModel.from_pretrained(folder)
    # Were anything written to this disk on the way, it would have to be here.
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(empty))
    loaded = UnifiedModelLoader(config).run(ModelLoaderContext(uri))
    assert not list(empty.rglob("*"))
    assert loaded.model.offsets == expected.offsets
    actual = loaded.model.state_dict()
    assert actual.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("make", [_classifier, _starling])
def test_a_reward_model_on_s3_is_the_one_in_the_directory(
    make: Callable[[Path], None], tmp_path: Path, config: Config, upload: Callable[[Path], str]
) -> None:
    folder = tmp_path / "reward"
    folder.mkdir()
    make(folder)
    tokens = torch.randint(3, VOCABULARY, (2, 7))
    local = RewardModelLoader(config).run(RewardLoaderContext(str(folder)))
    remote = RewardModelLoader(config).run(RewardLoaderContext(upload(folder)))
    assert torch.equal(remote(tokens).token_scores_BS, local(tokens).token_scores_BS)


def test_a_damaged_file_on_s3_is_named(tmp_path: Path, config: Config, upload: Callable[[Path], str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    _hugging_face(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    uri = upload(folder)
    with pytest.raises(ModelLoadError, match=rf"{uri}/model\.safetensors"):
        UnifiedModelLoader(config).run(ModelLoaderContext(uri))
    with pytest.raises(StorageError, match=r"s3://wmtp/nowhere does not exist"):
        UnifiedModelLoader(config).run(ModelLoaderContext("s3://wmtp/nowhere"))


def test_tokenizers_are_read_from_s3_too(
    tmp_path: Path, s3_server: S3Server, upload: Callable[[Path], str]
) -> None:
    folder = tmp_path / "tokenizer"
    build_tokenizer().save_pretrained(folder)
    uri = upload(folder)
    tokenizer = HfTokenizer(TokenizerSettings(path=uri, s3=s3_server.settings))
    assert tokenizer.tokenizer.name_or_path == uri
    assert tokenizer.encode_prompt("def f(x):\n") == HfTokenizer(
        TokenizerSettings(path=str(folder))
    ).encode_prompt("def f(x):\n")
    empty = tmp_path / "none"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="has no tokenizer"):
        HfTokenizer(TokenizerSettings(path=upload(empty), s3=s3_server.settings))


def test_a_run_trains_a_base_from_s3_against_a_reference_from_s3(
    tmp_path: Path, config: Config, upload: Callable[[Path], str]
) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    _hugging_face(folder)
    build_tokenizer().save_pretrained(folder)
    uri = upload(folder)
    config = config.model_copy(
        update={
            "paths": Config.model_validate(
                {"paths": {"models": {"base": uri, "ref": uri}, "output": str(tmp_path / "out")}}
            ).paths
        }
    )
    recipe = Recipe.model_validate(
        {
            "train": {"algo": "rho1-wmtp", "max_steps": 2},
            "model": {"mtp": {"horizon": 2}},
            "data": {
                "train": {"sources": ["microcode"], "batch_size": 2, "max_length": 96},
                "microcode": {"num_examples": 32},
            },
        }
    )
    findings = {
        finding.subject: finding.detail for finding in validate_settings(config, recipe, RunOptions())
    }
    assert uri in findings["base model"]
    outputs = run_training_pipeline(config, recipe, options=RunOptions(run_name="from-s3"))
    assert outputs.step == 2
