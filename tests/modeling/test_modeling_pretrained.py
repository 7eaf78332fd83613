"""Saving and loading: exact round trips, and errors that name file and tensor."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from modeling_families import build_causal_lm, build_mtp, random_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.hugging_face import fill_model
from wmtp.modeling.formats.sources import LocalSource
from wmtp.modeling.formats.tensors import open_weights


@pytest.fixture
def export(tmp_path: Path) -> Path:
    build_mtp("llama", horizon=3).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    build_causal_lm("llama").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def _edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt2", "cohere", "gptj"])
@pytest.mark.parametrize("horizon", [1, 3])
def test_round_trip_is_bitwise_for_all_heads_and_for_a_plain_loader(
    family: str, horizon: int, tmp_path: Path
) -> None:
    model = build_mtp(family, horizon=horizon)
    model.save_pretrained(tmp_path)
    loaded = MTPModel.from_pretrained(tmp_path).eval()
    assert loaded.horizon == horizon
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tokens = random_tokens()
    with torch.no_grad():
        logits_BSHV = model(tokens).logits()
        assert torch.equal(loaded(tokens).logits(), logits_BSHV)
        ordinary = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(ordinary(tokens).logits, logits_BSHV[:, :, 0])


def test_bfloat16_round_trip_is_bitwise(tmp_path: Path) -> None:
    model = build_mtp("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = MTPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert {tensor.dtype for tensor in MTPModel.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_the_export_describes_itself(tmp_path: Path) -> None:
    build_mtp("llama", horizon=3).save_pretrained(tmp_path, metadata={"training_algorithm": "mtp"})
    assert json.loads((tmp_path / "wmtp.json").read_text()) == {
        "format_version": 1,
        "horizon": 3,
        "head": "transformer",
        "offsets": [1, 2, 3],
        "metadata": {"training_algorithm": "mtp"},
    }


def test_a_plain_model_has_one_head_and_gets_more_as_copies(plain: Path) -> None:
    assert MTPModel.from_pretrained(plain).horizon == 1
    model = MTPModel.from_pretrained(str(plain), horizon=3)
    hidden_BSHD = model(random_tokens()).hidden_BSHD
    assert torch.equal(hidden_BSHD[:, :, 2], hidden_BSHD[:, :, 0])


def test_a_smaller_horizon_takes_the_first_heads_and_says_so(export: Path) -> None:
    full = MTPModel.from_pretrained(export)
    with pytest.warns(UserWarning, match="has 3 heads; the first 2 are used"):
        model = MTPModel.from_pretrained(export, horizon=2)
    tokens = random_tokens()
    assert torch.equal(model(tokens).hidden_BSHD, full(tokens).hidden_BSHD[:, :, :2])


def test_a_larger_horizon_adds_copies_of_the_last_layer_to_the_saved_heads(export: Path) -> None:
    full = MTPModel.from_pretrained(export)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = MTPModel.from_pretrained(export, horizon=4)
    tokens = random_tokens()
    hidden_BSHD = model(tokens).hidden_BSHD
    assert torch.equal(hidden_BSHD[:, :, :3], full(tokens).hidden_BSHD)
    assert torch.equal(hidden_BSHD[:, :, 3], hidden_BSHD[:, :, 0])


def test_saving_over_an_older_export_leaves_no_old_heads(export: Path) -> None:
    build_mtp("llama", horizon=2).save_pretrained(export)
    assert MTPModel.from_pretrained(export).horizon == 2
    assert not [name for name in load_file(export / "mtp_heads.safetensors") if name.startswith("heads.2.")]


def test_sharded_weights_load(tmp_path: Path) -> None:
    model = build_causal_lm("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = random_tokens()
    assert torch.equal(MTPModel.from_pretrained(tmp_path)(tokens).logits()[:, :, 0], model(tokens).logits)


def test_bin_weights_load(plain: Path) -> None:
    torch.save(load_file(plain / "model.safetensors"), plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    assert MTPModel.from_pretrained(plain).horizon == 1


@pytest.mark.parametrize("path", ["/no/such/place", "./nowhere", "no/such/place/at/all", Path("nowhere")])
def test_a_missing_directory_is_named(path: str | Path) -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        MTPModel.from_pretrained(path)


def test_an_unreachable_hub_id_is_named() -> None:
    with pytest.raises(ModelLoadError, match="no-such-org/no-such-model"):
        MTPModel.from_pretrained("no-such-org/no-such-model:sub/folder")


def test_a_file_instead_of_a_directory_is_named(plain: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a file"):
        MTPModel.from_pretrained(plain / "config.json")


def test_a_directory_without_config_says_what_it_holds(plain: Path) -> None:
    (plain / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no model that is known here \(it holds: .*model.safetensors"):
        MTPModel.from_pretrained(plain)


def test_broken_json_is_named(export: Path) -> None:
    text = (export / "config.json").read_text()
    (export / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        MTPModel.from_pretrained(export)
    (export / "config.json").write_text(text)
    (export / "wmtp.json").write_text("[]")
    with pytest.raises(ModelLoadError, match=r"wmtp\.json must hold a JSON object"):
        MTPModel.from_pretrained(export)


@pytest.mark.parametrize("name", ["model.safetensors", "mtp_heads.safetensors"])
def test_a_truncated_file_is_named(export: Path, name: str) -> None:
    data = (export / name).read_bytes()
    (export / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelLoadError, match=f"{name} is not a readable safetensors file"):
        MTPModel.from_pretrained(export)


def test_missing_weights_are_named(plain: Path) -> None:
    (plain / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="has no weights"):
        MTPModel.from_pretrained(plain)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    build_causal_lm("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-0000*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"{shard.name} is missing"):
        MTPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("entry", ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors"])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, entry: str) -> None:
    build_causal_lm("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = entry
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="not a plain file name"):
        MTPModel.from_pretrained(tmp_path)


def test_a_missing_tensor_of_the_base_is_an_error_and_not_a_random_tensor(plain: Path) -> None:
    state = load_file(plain / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelLoadError, match=r"model\.safetensors lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"
    ):
        MTPModel.from_pretrained(plain)


def test_a_misshapen_tensor_of_the_base_is_an_error(plain: Path) -> None:
    state = load_file(plain / "model.safetensors")
    state["model.norm.weight"] = torch.ones(33)
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelLoadError,
        match=r"model\.safetensors: tensor 'model\.norm\.weight' has shape \[33\], .* needs \[32\]",
    ):
        MTPModel.from_pretrained(plain)


def test_head_tensors_that_are_missing_misshapen_or_unknown_are_named(export: Path) -> None:
    file = export / "mtp_heads.safetensors"
    good = load_file(file)
    name = "heads.2.layer.mlp.up_proj.weight"
    save_file({key: value for key, value in good.items() if key != name}, file)
    with pytest.raises(ModelLoadError, match=rf"mtp_heads\.safetensors lacks the tensor '{name}'"):
        MTPModel.from_pretrained(export)
    save_file({**good, name: good[name][:-1].clone()}, file)
    with pytest.raises(
        ModelLoadError, match=rf"tensor '{name}' has shape \[47, 32\], the model needs \[48, 32\]"
    ):
        MTPModel.from_pretrained(export)
    save_file({**good, "heads.1.extra": torch.ones(1)}, file)
    with pytest.raises(ModelLoadError, match=r"unexpected tensor 'heads\.1\.extra'"):
        MTPModel.from_pretrained(export)
    file.unlink()
    with pytest.raises(ModelLoadError, match=r"wmtp\.json but no mtp_heads\.safetensors"):
        MTPModel.from_pretrained(export)


@pytest.mark.parametrize(
    "change", [{"format_version": 2}, {"head": "hydra"}, {"horizon": 0}, {"horizon": "4"}]
)
def test_an_export_of_an_unknown_format_is_refused(export: Path, change: dict) -> None:
    _edit_json(export / "wmtp.json", **change)
    with pytest.raises(ModelLoadError, match="this version cannot read"):
        MTPModel.from_pretrained(export)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(plain: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (plain / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Payload(marker)}, plain / "pytorch_model.bin")
    with pytest.raises(ModelLoadError):
        MTPModel.from_pretrained(plain)
    (plain / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(marker)))
    with pytest.raises(ModelLoadError):
        MTPModel.from_pretrained(plain)
    assert not marker.exists()


def test_code_beside_the_weights_is_refused_and_does_not_run(plain: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (plain / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    _edit_json(plain / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    with pytest.raises(ModelLoadError, match="'auto_map'"):
        MTPModel.from_pretrained(plain)
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"_attn_implementation": "some-org/some-kernel"},
        {"attn_implementation": "paged|some-org/kernel"},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"experts_implementation": "deepgemm"},
        {"text_config": {"auto_map": {"AutoModel": "x.Y"}}},
    ],
)
def test_configuration_keys_that_fetch_code_are_refused(plain: Path, change: dict) -> None:
    _edit_json(plain / "config.json", **change)
    with pytest.raises(ModelLoadError, match="can make the loader run code"):
        MTPModel.from_pretrained(plain)


def test_harmless_values_of_those_keys_are_accepted(plain: Path) -> None:
    _edit_json(plain / "config.json", attn_implementation="eager", auto_map={}, quantization_config=None)
    assert MTPModel.from_pretrained(plain).config._attn_implementation == "eager"


def test_an_adapter_beside_the_weights_is_refused(plain: Path) -> None:
    (plain / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere/model"}))
    with pytest.raises(ModelLoadError, match="adapter"):
        MTPModel.from_pretrained(plain)


def test_bad_options_are_refused_before_anything_is_read() -> None:
    with pytest.raises(UserInputError, match="horizon is 0"):
        MTPModel.from_pretrained("/no/such/place", horizon=0)
    with pytest.raises(UserInputError, match="unknown head form 'nosuch'"):
        MTPModel.from_pretrained("/no/such/place", head="nosuch")


class _KeepsNormInFp32(LlamaForCausalLM):
    _keep_in_fp32_modules_strict = ("norm",)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_parameter_is_a_view_of_the_file(file: str, dtype: torch.dtype, tmp_path: Path) -> None:
    causal_lm = build_causal_lm("llama")
    causal_lm.config.save_pretrained(tmp_path)
    if file.endswith(".bin"):
        torch.save(causal_lm.state_dict(), tmp_path / file)
    else:
        save_file(causal_lm.state_dict(), tmp_path / file)
    source = LocalSource(tmp_path)
    loaded = fill_model(_KeepsNormInFp32, causal_lm.config, open_weights(source), source, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32, dtype}
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    with (tmp_path / file).open("r+b") as stream:
        stream.seek(stream.seek(0, os.SEEK_END) // 10)
        stream.write(b"\x42" * ((tmp_path / file).stat().st_size * 8 // 10))
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
