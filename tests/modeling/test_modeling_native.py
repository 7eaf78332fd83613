"""Meta's native layout: the same logits as its definition, strict reading, and an exact way back."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modeling_families import build_causal_lm
from native_reference import (
    VOCAB_SIZE,
    NativeReference,
    build_native,
    native_params,
    random_native,
    read_parts,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.meta_native import feed_forward_size, native_config
from wmtp.modeling.formats.meta_native_write import feed_forward_fields, write_native
from wmtp.modeling.formats.tensors import StoredTensor, StoredTensors

TOLERANCE = 2e-4


def tokens_BS() -> Tensor:
    return torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits_of(model: MTPModel) -> Tensor:
    return model(tokens_BS()).logits().double()


def largest_gap(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


def saved_tensors(directory: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(directory / "consolidated.pth", weights_only=True, mmap=True)
    return loaded


def saved_params(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "params.json").read_text())
    return loaded


# -------------------------------------------------------------------- parity


@pytest.mark.parametrize("n_kv_heads", [None, 4, 2, 1])
@pytest.mark.parametrize("n_future_tokens", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_logits_of_every_head_equal_the_layouts_definition(
    n_future_tokens: int | None, n_kv_heads: int | None
) -> None:
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])
    for multiplier, theta, vocab_size in itertools.product([None, 1.3], [None, 1e6], [VOCAB_SIZE, -1]):
        params = native_params(
            n_future_tokens=n_future_tokens,
            n_kv_heads=n_kv_heads,
            ffn_dim_multiplier=multiplier,
            rope_theta=theta,
            vocab_size=vocab_size,
            max_batch_size=32,
        )
        tensors = random_native(params, dtype=next(dtypes))
        logits = logits_of(build_native(params, tensors))
        expected = NativeReference(params, tensors).logits(tokens_BS())
        assert logits.shape[2] == (n_future_tokens or 1)
        assert largest_gap(logits, expected) < TOLERANCE


@pytest.mark.parametrize("trunk_layers", [0, 3])
def test_trunks_of_other_depths_have_the_same_logits(trunk_layers: int) -> None:
    params = native_params(trunk_layers=trunk_layers, n_future_tokens=2)
    tensors = random_native(params)
    expected = NativeReference(params, tensors).logits(tokens_BS())
    assert largest_gap(logits_of(build_native(params, tensors)), expected) < TOLERANCE


def test_the_wrapped_model_is_head_0_with_its_rotary_tables_computed() -> None:
    params = native_params()
    tensors = random_native(params)
    causal_lm = read_parts(params, tensors).causal_lm
    assert not causal_lm.training
    assert not any(tensor.is_meta for tensor in (*causal_lm.parameters(), *causal_lm.buffers()))
    with torch.no_grad():
        logits_BSV = causal_lm(tokens_BS()).logits.double()
    expected = NativeReference(params, tensors).logits(tokens_BS())
    assert largest_gap(logits_BSV, expected[:, :, 0]) < TOLERANCE


def test_running_every_layer_as_trunk_would_change_the_logits() -> None:
    # A mistake seen in ports: the last of `layers` is taken into the trunk, and then once more as head 0.
    params = native_params(n_future_tokens=2)
    tensors = random_native(params)
    reference = NativeReference(params, tensors)
    trunk_BSD = reference.embed(tokens_BS())
    for index in range(params["n_layers"] - 1):
        trunk_BSD = reference.block(f"layers.{index}.", trunk_BSD)
    logits = logits_of(build_native(params, tensors))
    for head, prefix in enumerate([reference.head_layer, "extra_heads.0."]):
        mistaken = reference.unembed(reference.block(prefix, trunk_BSD))
        assert largest_gap(logits[:, :, head], mistaken) > 0.5


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
@pytest.mark.parametrize("forgotten", [0, 1, 2])
def test_a_forgotten_rotary_permutation_would_change_the_logits_of_that_head(
    name: str, forgotten: int
) -> None:
    params = native_params(n_future_tokens=3)
    tensors = random_native(params)
    model = build_native(params, tensors)
    layer = model.last_layer if forgotten == 0 else model.extra_heads[forgotten - 1].layer
    prefix = "layers.1." if forgotten == 0 else f"extra_heads.{forgotten - 1}."
    native = {"q_proj": "wq", "k_proj": "wk"}[name]
    with torch.no_grad():
        layer.self_attn.get_submodule(name).weight.copy_(tensors[f"{prefix}attention.{native}.weight"])
    expected = NativeReference(params, tensors).logits(tokens_BS())
    gaps = (logits_of(model) - expected).abs().amax(dim=(0, 1, 3))
    assert [gap > 0.05 for gap in gaps.tolist()] == [head == forgotten for head in range(3)]


# -------------------------------------------------------------------- strict reading


def test_every_missing_or_renamed_tensor_is_an_error_that_names_it() -> None:
    params = native_params(n_future_tokens=2)
    tensors = random_native(params)
    for name in set(tensors) - {"rope.freqs"}:
        without = {key: tensor for key, tensor in tensors.items() if key != name}
        for found in (without, without | {name.upper(): tensors[name]}):
            with pytest.raises(ModelLoadError, match=r"m/consolidated\.pth lacks") as caught:
                read_parts(params, found)
            assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["extra_heads.1.attention.wq.weight", "layers.2.ffn_norm.weight", "layers.0.attention.wq.bias"]
)
def test_an_unexpected_tensor_is_an_error_that_names_it(name: str) -> None:
    params = native_params(n_future_tokens=2)
    tensors = random_native(params) | {name: torch.zeros(32)}
    with pytest.raises(ModelLoadError, match=f"m/consolidated.pth has the unexpected tensor '{name}'"):
        read_parts(params, tensors)


def test_every_misshapen_tensor_is_an_error_that_names_it() -> None:
    params = native_params(n_future_tokens=2)
    tensors = random_native(params)
    for name in set(tensors) - {"rope.freqs"}:
        with pytest.raises(ModelLoadError, match=r"m/consolidated\.pth: tensor") as caught:
            read_parts(params, tensors | {name: tensors[name][:-1]})
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize("field", ["n_future_token", "num_future_tokens", "n_predict"])
def test_a_field_under_a_wrong_name_is_not_silently_one_head(field: str) -> None:
    params = native_params(n_future_tokens=3)
    renamed = {field if name == "n_future_tokens" else name: value for name, value in params.items()}
    with pytest.raises(ModelLoadError, match=r"calls for layers\.0\.\.3, no extra_heads"):
        read_parts(renamed, random_native(params))
    fitting = renamed | {"n_layers": 2}
    with pytest.raises(ModelLoadError, match=r"unexpected tensor 'extra_heads\.0"):
        read_parts(fitting, random_native(params))


def test_an_embedding_may_only_set_the_vocabulary_where_params_leave_it_open() -> None:
    params = native_params(vocab_size=VOCAB_SIZE + 1)
    with pytest.raises(ModelLoadError, match=r"tok_embeddings\.weight"):
        read_parts(params, random_native(params))
    assert read_parts(params | {"vocab_size": -1}, random_native(params)).causal_lm.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("value", ["text", {"layers": torch.zeros(2)}, torch.zeros(32, dtype=torch.int8)])
def test_contents_that_are_no_weights_are_refused_by_name(value: object) -> None:
    params = native_params()
    tensors: dict[str, Any] = random_native(params) | {"norm.weight": value}
    with pytest.raises(ModelLoadError, match=r"m/consolidated.pth: .*'norm.weight'"):
        read_parts(params, tensors)
    with pytest.raises(ModelLoadError, match="no tensors"):
        read_parts(params, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_loaded_with_the_heads_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    params = native_params(n_future_tokens=4, vocab_size=-1)
    tensors = random_native(params, dtype=dtype)
    torch.save(tensors, tmp_path / "consolidated.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    expected = NativeReference(params, tensors).logits(tokens_BS())
    assert largest_gap(logits_of(MTPModel.from_pretrained(tmp_path)), expected) < TOLERANCE
    with pytest.warns(UserWarning, match="has 4 heads; the first 2 are used"):
        fewer = MTPModel.from_pretrained(tmp_path, horizon=2)
    assert largest_gap(logits_of(fewer), expected[:, :, :2]) < TOLERANCE
    more = logits_of(MTPModel.from_pretrained(tmp_path, horizon=5))
    assert largest_gap(more[:, :, :4], expected) < TOLERANCE
    assert torch.equal(more[:, :, 4], more[:, :, 0])


def test_tensors_are_read_once_and_not_held_together() -> None:
    params = native_params(n_future_tokens=3)
    tensors = random_native(params)
    read: list[str] = []
    alive: list[weakref.ref[Tensor]] = []
    most_alive = 0

    def reader(name: str) -> Callable[[], Tensor]:
        def read_tensor() -> Tensor:
            nonlocal most_alive
            read.append(name)
            tensor = tensors[name].clone()
            alive.append(weakref.ref(tensor))
            most_alive = max(most_alive, sum(reference() is not None for reference in alive))
            return tensor

        return read_tensor

    stored = StoredTensors(
        StoredTensor(name, "consolidated.pth", tuple(tensor.shape), tensor.dtype, reader(name))
        for name, tensor in tensors.items()
    )
    logits = logits_of(build_native(params, stored))
    assert largest_gap(logits, NativeReference(params, tensors).logits(tokens_BS())) < TOLERANCE
    assert sorted(read) == sorted(set(tensors) - {"rope.freqs"})
    assert most_alive == 1


def test_the_model_owns_its_memory() -> None:
    params = native_params()
    tensors = random_native(params)
    model = build_native(params, tensors)
    before = logits_of(model)
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_have_the_dtype_asked_for_and_the_files_dtype_is_recorded(dtype: torch.dtype) -> None:
    params = native_params()
    parts = read_parts(params, random_native(params, dtype=torch.float16), dtype)
    assert {parameter.dtype for parameter in parts.causal_lm.parameters()} == {dtype}
    assert {tensor.dtype for tensor in parts.head_tensors(1).values()} == {dtype}
    assert parts.causal_lm.config.dtype == torch.float16


def test_mixed_dtypes_are_recorded_as_the_smallest_that_holds_them() -> None:
    params = native_params()
    tensors = random_native(params, dtype=torch.bfloat16)
    mixed = tensors | {"norm.weight": tensors["norm.weight"].float()}
    only_dropped = tensors | {"rope.freqs": tensors["rope.freqs"].float()}
    assert read_parts(params, mixed).causal_lm.config.dtype == torch.float32
    assert read_parts(params, only_dropped).causal_lm.config.dtype == torch.bfloat16
    expected = NativeReference(params, mixed).logits(tokens_BS())
    assert largest_gap(logits_of(build_native(params, mixed)), expected) < TOLERANCE


# -------------------------------------------------------------------- params.json


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "dim is missing"),
        ({"n_layers": None}, "n_layers is missing"),
        ({"n_heads": None}, "n_heads is missing"),
        ({"multiple_of": None}, "multiple_of is missing"),
        ({"norm_eps": None}, "norm_eps is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"dim": "32"}, "dim is '32', not a whole number of at least 1"),
        ({"dim": 32.0}, "dim is 32.0, not"),
        ({"n_layers": True}, "n_layers is True, not"),
        ({"n_heads": 0}, "n_heads is 0, not"),
        ({"n_heads": 5}, "n_heads is 5, which does not divide dim, 32"),
        ({"n_heads": 32}, "heads of an even size"),
        ({"n_kv_heads": 3}, "n_kv_heads is 3, which does not divide n_heads, 4"),
        ({"n_kv_heads": "2"}, "n_kv_heads is '2', not"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": -2}, "vocab_size is -2, not"),
        ({"multiple_of": -8}, "multiple_of is -8, not"),
        ({"ffn_dim_multiplier": 0}, "ffn_dim_multiplier is 0, not a number above 0"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier is '1.3', not"),
        ({"norm_eps": float("nan")}, "norm_eps is nan, not"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, not"),
        ({"rope_theta": True}, "rope_theta is True, not"),
        ({"n_future_tokens": 0}, "n_future_tokens is 0, not"),
        ({"n_future_tokens": 5}, "n_future_tokens is 5, more than n_layers, 4"),
        ({"n_future_tokens": [3]}, r"n_future_tokens is \[3\], not"),
    ],
)
def test_a_bad_field_is_an_error_that_names_file_and_field(changes: dict[str, Any], message: str) -> None:
    params = native_params() | changes
    with pytest.raises(ModelLoadError, match=rf"somewhere/params.json cannot be used: .*{message}"):
        native_config(
            {name: value for name, value in params.items() if value is not None},
            source="somewhere/params.json",
        )


def test_all_bad_fields_are_named_at_once() -> None:
    with pytest.raises(ModelLoadError, match=r"dim is missing; n_heads is 'x'.*; norm_eps is -1"):
        native_config({"n_layers": 2, "n_heads": "x", "vocab_size": 8, "multiple_of": 8, "norm_eps": -1})


def test_absent_and_null_fields_take_the_layouts_defaults() -> None:
    params = native_params(n_future_tokens=None, n_kv_heads=None)
    config, num_heads = native_config(params | {"n_kv_heads": None, "ffn_dim_multiplier": None})
    assert num_heads == 1
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.num_hidden_layers == params["n_layers"]


def test_configuration_comes_from_params_alone() -> None:
    config, num_heads = native_config(native_params(vocab_size=-1, rope_theta=5e5), vocab_size=100)
    assert (num_heads, config.num_hidden_layers, config.vocab_size) == (3, 2, 100)
    assert (config.hidden_size, config.intermediate_size, config.rms_norm_eps) == (32, 88, 1e-5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "expected"),
    # Llama 2 7B, 13B and 70B; Llama 3 8B.
    [
        (4096, 256, 1.0, 11008),
        (5120, 256, 1.0, 13824),
        (8192, 4096, 1.3, 28672),
        (4096, 1024, 1.3, 14336),
    ],
)
def test_feed_forward_sizes_are_those_of_published_models(
    dim: int, multiple_of: int, multiplier: float, expected: int
) -> None:
    assert feed_forward_size(dim, multiple_of, multiplier) == expected


@given(dim=st.integers(1, 2**17).map(lambda half: 2 * half), size=st.integers(1, 2**20))
def test_any_feed_forward_size_can_be_said_in_params(dim: int, size: int) -> None:
    fields = feed_forward_fields(dim, size)
    assert feed_forward_size(dim, fields["multiple_of"], fields["ffn_dim_multiplier"]) == size


# -------------------------------------------------------------------- the way back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "params",
    [
        native_params(n_future_tokens=4, vocab_size=-1, ffn_dim_multiplier=1.3, rope_theta=1e6),
        native_params(n_future_tokens=None, n_kv_heads=None, use_scaled=[1, {"x": None}], eps=1e-05),
        native_params(n_future_tokens=2, n_kv_heads=1, ffn_dim_multiplier=0.9, rope_theta=10000),
    ],
)
def test_native_to_hugging_face_to_native_is_exact(
    params: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = random_native(params, dtype=dtype)
    model = build_native(params, tensors)
    write_native(model, tmp_path / "direct")
    model.save_pretrained(tmp_path / "hf")
    again = MTPModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits_of(again), logits_of(model))
    write_native(again, tmp_path / "back")
    del tensors["rope.freqs"]
    for directory in (tmp_path / "direct", tmp_path / "back"):
        assert saved_params(directory) == params
        back = saved_tensors(directory)
        assert set(back) == set(tensors)
        for name, tensor in tensors.items():
            assert back[name].dtype == dtype
            assert torch.equal(back[name], tensor), name


def test_the_hugging_face_folder_of_a_native_model_is_an_ordinary_llama(tmp_path: Path) -> None:
    params = native_params()
    tensors = random_native(params)
    build_native(params, tensors).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits_BSV = plain(tokens_BS()).logits.double()
    expected = NativeReference(params, tensors).logits(tokens_BS())[:, :, 0]
    assert largest_gap(logits_BSV, expected) < TOLERANCE


def test_the_dtype_of_the_file_can_be_chosen(tmp_path: Path) -> None:
    params = native_params()
    write_native(build_native(params, random_native(params)), tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in saved_tensors(tmp_path).values()} == {torch.bfloat16}


@pytest.mark.parametrize("intermediate_size", [1, 85, 96, 1000])
def test_a_llama_of_any_origin_survives_the_native_layout(intermediate_size: int, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=intermediate_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    model = MTPModel.from_causal_lm(LlamaForCausalLM(config), horizon=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    write_native(model, tmp_path)
    params, tensors = saved_params(tmp_path), saved_tensors(tmp_path)
    expected = NativeReference(params, tensors).logits(tokens_BS())
    assert largest_gap(logits_of(model), expected) < TOLERANCE
    again = build_native(params, tensors)
    assert torch.equal(logits_of(again), logits_of(model))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_another_number_of_heads_is_written_into_the_params(horizon: int, tmp_path: Path) -> None:
    params = native_params(n_future_tokens=3, vocab_size=-1, max_batch_size=32)
    parts = read_parts(params, random_native(params))
    model = MTPModel(parts.causal_lm, offsets=range(1, horizon + 1))
    write_native(model, tmp_path)
    assert saved_params(tmp_path) == params | {"n_future_tokens": horizon, "n_layers": horizon + 1}
    assert torch.equal(
        logits_of(build_native(saved_params(tmp_path), saved_tensors(tmp_path))), logits_of(model)
    )


def test_another_feed_forward_size_replaces_the_saved_fields(tmp_path: Path) -> None:
    params = native_params(n_future_tokens=2, ffn_dim_multiplier=1.3)
    config, _ = native_config(params)
    config.intermediate_size = 77
    model = MTPModel.from_causal_lm(LlamaForCausalLM(config), horizon=2)
    write_native(model, tmp_path)
    assert native_config(saved_params(tmp_path))[0].intermediate_size == 77
    build_native(saved_params(tmp_path), saved_tensors(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_bias": True}, "biases in attention layers"),
        ({"mlp_bias": True}, "biases in feed-forward layers"),
        ({"head_dim": 16}, "attention heads of size 16"),
        ({"hidden_act": "gelu"}, "the activation 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "rotary positions of type 'linear'",
        ),
    ],
)
def test_what_the_layout_cannot_say_is_refused_by_name(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **settings,
    )
    model = MTPModel.from_causal_lm(LlamaForCausalLM(config), horizon=2)
    with pytest.raises(UserInputError, match=message):
        write_native(model, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_other_heads_offsets_and_families_are_refused_by_name(tmp_path: Path) -> None:
    llama = MTPModel.from_causal_lm(build_causal_lm("llama"), horizon=3, head="medusa", offsets=[1, 2, 4])
    with pytest.raises(UserInputError, match=r"form 'medusa', heads at offsets \[1, 2, 4\]"):
        write_native(llama, tmp_path)
    qwen = MTPModel.from_causal_lm(build_causal_lm("qwen2"), horizon=2)
    with pytest.raises(UserInputError, match="Qwen2ForCausalLM"):
        write_native(qwen, tmp_path)


def test_unmerged_adapters_are_refused_by_the_name_of_a_tensor(tmp_path: Path) -> None:
    params = native_params()
    model = build_native(params, random_native(params))
    model.last_layer.mlp.lora_A = torch.nn.Linear(32, 4, bias=False)
    with pytest.raises(UserInputError, match=r"model.layers.1.mlp.lora_A.weight.*\n.*merge"):
        write_native(model, tmp_path)


def test_tied_embeddings_are_written_twice_and_said(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = MTPModel.from_causal_lm(LlamaForCausalLM(config), horizon=2)
    with pytest.warns(UserWarning, match="trains them apart"):
        write_native(model, tmp_path)
    again = build_native(saved_params(tmp_path), saved_tensors(tmp_path))
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_parameter_that_is_a_view_is_written_alone(tmp_path: Path) -> None:
    params = native_params()
    model = build_native(params, random_native(params))
    write_native(model, tmp_path / "plain")
    pool = torch.zeros(100_000)
    weight = model.final_norm.weight
    pool[:32] = weight.detach()
    weight.data = pool[:32]
    write_native(model, tmp_path / "view")
    sizes = [(tmp_path / name / "consolidated.pth").stat().st_size for name in ("plain", "view")]
    assert abs(sizes[0] - sizes[1]) < 1000
