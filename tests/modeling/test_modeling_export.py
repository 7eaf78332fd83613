"""What `save_pretrained` writes: bit for bit the model, and an ordinary one to whoever knows no heads."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from modeling_families import FAMILIES, build_causal_lm, build_mtp, perturb, random_tokens
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from wmtp.evaluation import microcode
from wmtp.exceptions import ModelLoadError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.export import complete_generation_config, convert_dtype


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    return microcode.build_tokenizer()


@torch.no_grad()
def _logits(model: MTPModel) -> Tensor:
    return model(random_tokens()).logits()


def _assert_round_trip(model: MTPModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """All tensors, all heads' logits, and head 0 through a plain loader, bit for bit."""
    model.save_pretrained(folder)
    loaded = MTPModel.from_pretrained(folder, dtype=dtype).eval()
    assert (loaded.head_form, loaded.offsets) == (model.head_form, model.offsets)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == dtype
    logits_BSHV = _logits(model)
    assert torch.equal(_logits(loaded), logits_BSHV)
    ordinary = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert ordinary.dtype == dtype
    with torch.no_grad():
        assert torch.equal(ordinary(random_tokens()).logits, logits_BSHV[:, :, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips_and_loads_as_an_ordinary_model(family: str, tmp_path: Path) -> None:
    assert len(FAMILIES) >= 14
    _assert_round_trip(build_mtp(family, horizon=2), tmp_path)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "cohere"])
@pytest.mark.parametrize("form", ["transformer", "linear", "medusa", "sequential"])
def test_every_head_form_and_free_offsets_round_trip(form: str, family: str, tmp_path: Path) -> None:
    model = MTPModel.from_causal_lm(build_causal_lm(family), horizon=3, head=form, offsets=[1, 2, 5]).eval()
    perturb(model.extra_heads)
    _assert_round_trip(model, tmp_path)


def test_teacher_forcing_round_trips_without_tensors_of_its_own(tmp_path: Path) -> None:
    model = MTPModel.from_causal_lm(
        build_causal_lm("llama"), horizon=3, adapter="teacher_forcing", offsets=[1, 3, 4]
    )
    _assert_round_trip(model.eval(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_converted_model_is_the_rounded_one_and_round_trips(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_mtp("qwen3", horizon=2)
    rounded = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    convert_dtype(model, dtype)
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in model.state_dict().items())
    _assert_round_trip(model, tmp_path, dtype)


def test_a_value_that_half_precision_cannot_hold_is_an_error_naming_its_tensor() -> None:
    model = build_mtp("llama", horizon=2)
    with torch.no_grad():
        model.extra_heads[0].layer.mlp.up_proj.weight[3, 4] = 1e5
    with pytest.raises(ModelLoadError, match=r"extra_heads\.0\.layer\.mlp\.up_proj\.weight.*float16"):
        convert_dtype(model, torch.float16)


def _micro_model(**config: object) -> MTPModel:
    """A tiny Llama for MicroCode's tokenizer that ends every text at once: its only likely token is EOS."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes, **config))
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.fill_(-1.0)
        model.lm_head.weight[tokenizer.eos_token_id].fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return MTPModel.from_causal_lm(model, horizon=2)


def test_the_tokenizer_comes_along_and_generation_stops_at_its_end_token(tmp_path: Path) -> None:
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model, tokenizer = _micro_model(**none), build_tokenizer()
    assert model.causal_lm.generation_config.eos_token_id is None
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def double(x):\n    return 2 * x\n"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer(text).input_ids])
    generated = plain.generate(ids, max_new_tokens=8)
    assert generated[0, ids.shape[1] :].tolist() == [tokenizer.eos_token_id]
    # The model in memory is as it was.
    assert model.causal_lm.generation_config.eos_token_id is None


def test_the_text_generation_pipeline_runs_on_an_export(tmp_path: Path) -> None:
    _micro_model(bos_token_id=0, eos_token_id=1).save_pretrained(tmp_path, tokenizer=build_tokenizer())
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (result,) = generate("def f(x):", max_new_tokens=6, return_full_text=False)
    assert result["generated_text"] == ""


def _ids(config: GenerationConfig) -> tuple[object, object, object]:
    return config.eos_token_id, config.bos_token_id, config.pad_token_id


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        # MicroCode's tokenizer: bos 0, eos 1, pad 2.
        ({}, (1, 0, 2)),
        ({"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}, (1, 0, 2)),
        ({"eos_token_id": 7, "bos_token_id": 5, "pad_token_id": 6}, ([7, 1], 5, 6)),
        ({"eos_token_id": [7, 1, 9]}, ([7, 1, 9], 0, 2)),
        ({"eos_token_id": 50256, "pad_token_id": 50256}, (1, 0, 2)),
    ],
)
def test_ids_of_the_model_stay_and_those_of_the_tokenizer_fill_in(own: dict, expected: tuple) -> None:
    model = _micro_model()
    model.causal_lm.generation_config = GenerationConfig(**own)
    assert _ids(complete_generation_config(model.causal_lm, build_tokenizer())) == expected


def test_without_padding_or_tokenizer_the_end_token_pads() -> None:
    model = _micro_model()
    model.causal_lm.generation_config = GenerationConfig(eos_token_id=[4, 5])
    assert _ids(complete_generation_config(model.causal_lm, None)) == ([4, 5], None, 4)
    model.causal_lm.generation_config = GenerationConfig()
    assert _ids(complete_generation_config(model.causal_lm, None)) == (None, None, None)


def test_sampling_parameters_that_contradict_each_other_do_not_stop_an_export(tmp_path: Path) -> None:
    model = _micro_model()
    model.causal_lm.generation_config = GenerationConfig(eos_token_id=1, temperature=0.6, top_p=0.9)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.6, 0.9, True)


def test_an_invalid_generation_config_loses_all_but_its_ids_and_says_so(tmp_path: Path) -> None:
    model = _micro_model()
    model.causal_lm.generation_config = GenerationConfig(eos_token_id=1, num_beams=1, early_stopping=True)
    with pytest.warns(UserWarning, match="only the special tokens"):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 1
