"""Adapters start as nothing, learn where they should, and end in a plain model."""

from __future__ import annotations

import copy
import hashlib
import sys
from pathlib import Path

import pytest
import torch
from modeling_families import build_causal_lm, perturb, random_tokens
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from wmtp.distributed.checkpoint import save_checkpoint
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling import MTPModel, ValueHead, choose_trainable
from wmtp.modeling.lora import add_lora, check_same_base, fingerprint, merge_lora, plain_state_dict
from wmtp.modeling.trainable import checkpoint_tensors, learned_parameters

FAMILIES = ("llama", "gpt2", "mixtral", "gemma2", "phi")


def build(family: str = "llama", *, seed: int = 1, form: str = "transformer", **changes: object) -> MTPModel:
    torch.manual_seed(seed)
    changes = {**({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}), **changes}
    model = MTPModel.from_causal_lm(build_causal_lm(family, **changes), horizon=3, head=form)  # type: ignore[arg-type]
    perturb(model.extra_heads)
    return model.eval()


def adapt(model: MTPModel, **options: object) -> MTPModel:
    """Put adapters on a model and move them away from their start."""
    add_lora(model, **{"rank": 4, "alpha": 6.0, **options})  # type: ignore[arg-type]
    choose_trainable(model, "all")
    assert model.lora is not None
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.lora.parameter_names:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def save_and_load(run_dir: Path, model: MTPModel, resumed: MTPModel) -> None:
    """Bring what a checkpoint keeps of a model into another one."""
    store = LocalStore(run_dir)
    info = save_checkpoint(store, 1, tensors={"model": checkpoint_tensors(model)}, state={})
    Checkpoint(store, info.name).load_into({"model": checkpoint_tensors(resumed)})


def requires_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="four bits need bitsandbytes")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_new_adapters_says_what_it_said(family: str) -> None:
    model = build(family)
    before = model(random_tokens()).logits()
    add_lora(model, rank=4)
    assert torch.equal(model(random_tokens()).logits(), before)


@pytest.mark.parametrize("form", ["transformer", "linear", "sequential"])
def test_adapters_and_heads_get_gradients_and_nothing_else_does(form: str) -> None:
    model = adapt(build(form=form))
    model(random_tokens()).logits().square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    trunk = {f"causal_lm.model.layers.{layer}" for layer in (0, 1)}
    expected = {
        f"{layer}.self_attn.{module}.lora_{side}.default.weight"
        for layer in trunk
        for module in ("q_proj", "v_proj")
        for side in "AB"
    }
    expected |= {
        n for n, _ in model.named_parameters() if n.startswith(("extra_heads.", "causal_lm.model.layers.2."))
    }
    assert with_gradient == expected == set(learned_parameters(model))
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("targets", [None, ["down_proj", "mlp.up_proj"], ["layers.1.self_attn.o_proj"]])
def test_merged_matrices_are_the_definition(targets: list[str] | None) -> None:
    model = build()
    base = {name: tensor.clone() for name, tensor in model.causal_lm.state_dict().items()}
    adapt(model, target_modules=targets)
    named = dict(model.causal_lm.named_parameters())
    plain = plain_state_dict(model)
    assert plain.keys() == base.keys()
    changed = set()
    for name, before in base.items():
        a = named.get(name.replace(".weight", ".lora_A.default.weight"))
        b = named.get(name.replace(".weight", ".lora_B.default.weight"))
        expected = before.double()
        if a is not None and b is not None:
            expected = expected + 6.0 / 4 * (b.detach().double() @ a.detach().double())
            changed.add(name)
        torch.testing.assert_close(plain[name].double(), expected, rtol=0, atol=1e-6)
        assert plain[name].equal(before) == (name not in changed)
    wanted = {
        None: {
            f"model.layers.{layer}.self_attn.{m}.weight" for layer in (0, 1) for m in ("q_proj", "v_proj")
        },
        "down_proj": {
            f"model.layers.{layer}.mlp.{m}.weight" for layer in (0, 1) for m in ("down_proj", "up_proj")
        },
        "layers.1.self_attn.o_proj": {"model.layers.1.self_attn.o_proj.weight"},
    }
    assert changed == wanted[None if targets is None else targets[0]]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_a_plain_model_with_the_same_logits(family: str, tied: bool, tmp_path: Path) -> None:
    model = adapt(build(family, tie_word_embeddings=tied))
    tokens = random_tokens()
    logits = model(tokens).logits()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    assert torch.equal(model(tokens).logits(), logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    torch.testing.assert_close(plain(tokens).logits, logits[:, :, 0], rtol=0, atol=1e-5)
    loaded = MTPModel.from_pretrained(tmp_path / "one")
    torch.testing.assert_close(loaded(tokens).logits(), logits, rtol=0, atol=1e-5)
    digests = [
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((tmp_path / name).iterdir())]
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    merge_lora(model)
    assert model.lora is None
    assert torch.equal(model(tokens).logits(), loaded(tokens).logits())


def test_a_checkpoint_holds_what_learns_and_the_base_gives_the_rest(tmp_path: Path) -> None:
    model = adapt(build())
    perturb(model.last_layer)
    tensors = checkpoint_tensors(model)
    assert tensors.keys() == learned_parameters(model).keys()
    resumed = build()
    add_lora(resumed, rank=4, alpha=6.0, seed=5)
    save_and_load(tmp_path, model, resumed)
    assert torch.equal(resumed(random_tokens()).logits(), model(random_tokens()).logits())


def test_another_base_is_refused_by_name() -> None:
    model, other = adapt(build()), adapt(build(seed=2))
    assert model.lora is not None
    check_same_base(adapt(build()), model.lora.base)
    with pytest.raises(
        ModelLoadError, match=r"model\.embed_tokens\.weight: 97x32:\w{8} then, 97x32:\w{8} now"
    ):
        check_same_base(other, model.lora.base)
    without = {name: value for name, value in model.lora.base.items() if "norm" not in name}
    with pytest.raises(ModelLoadError, match="absent then"):
        check_same_base(model, without)
    with pytest.raises(ModelLoadError, match="recipe has LoRA adapters and the checkpoint has none"):
        check_same_base(model, None)
    with pytest.raises(ModelLoadError, match="checkpoint has LoRA adapters and the recipe has none"):
        check_same_base(build(), model.lora.base)
    check_same_base(build(), None)


@pytest.mark.parametrize("index", [0, -1])
def test_a_fingerprint_sees_the_ends_of_a_tensor_and_not_its_precision(index: int) -> None:
    module = nn.Linear(40, 50, dtype=torch.bfloat16)
    before = fingerprint(module)
    assert fingerprint(copy.deepcopy(module).float()) == before
    with torch.no_grad():
        module.weight.view(-1)[index] += 1
    after = fingerprint(module)
    assert after["weight"] != before["weight"]
    assert after["bias"] == before["bias"]


def test_the_start_depends_on_the_seed_alone_and_takes_no_random_numbers() -> None:
    def adapters(seed: int) -> dict[str, Tensor]:
        model = build()
        state = torch.get_rng_state()
        lora = add_lora(model, rank=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        return {
            name: p for name, p in model.named_parameters() if name in lora.parameter_names and "_A" in name
        }

    one, same, other = adapters(3), adapters(3), adapters(4)
    assert all(one[name].equal(same[name]) and not one[name].equal(other[name]) for name in one)


def test_dropout_is_for_training_alone() -> None:
    model = adapt(build(), dropout=0.5)
    tokens = random_tokens()
    assert torch.equal(model(tokens).logits(), model(tokens).logits())
    model.train()
    assert not torch.equal(model(tokens).logits(), model(tokens).logits())


def test_a_copy_with_adapters_is_a_model_of_its_own() -> None:
    model = adapt(build())
    snapshot = copy.deepcopy(model).requires_grad_(False)
    logits = model(random_tokens()).logits()
    perturb(model)
    assert torch.equal(snapshot(random_tokens()).logits(), logits)
    value_head = ValueHead.from_model(model)
    assert not any("lora" in name for name, _ in value_head.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"quantization": "int8"}, "quantization is 'int8'"),
        ({"target_modules": ["q_proj", "wrong"]}, "no linear module 'wrong'"),
        ({"target_modules": ["proj"]}, "no linear module 'proj'"),
        ({"target_modules": ["embed_tokens"]}, "no linear module 'embed_tokens'"),
        ({"target_modules": ["lm_head"]}, "no linear module 'lm_head'"),
    ],
)
def test_bad_settings_are_named_and_leave_the_model_alone(options: dict[str, object], message: str) -> None:
    model = build()
    names = list(model.state_dict())
    with pytest.raises(UserInputError, match=message) as caught:
        add_lora(model, **{"rank": 4, **options})  # type: ignore[arg-type]
    if "target_modules" in options:
        assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)
    assert list(model.state_dict()) == names
    assert model.lora is None


def test_what_cannot_be_adapted_is_refused_with_the_modules_there_are() -> None:
    with pytest.raises(UserInputError, match=r"'olmo2'[\s\S]*q_proj"):
        add_lora(build("olmo2"), rank=4)
    add_lora(build("olmo2"), rank=4, target_modules=["q_proj"])
    with pytest.raises(UserInputError, match=r"1 decoder layer\(s\)"):
        add_lora(build(num_hidden_layers=1), rank=4)
    with pytest.raises(UserInputError, match="already has adapters"):
        add_lora(adapt(build()), rank=4)


def quantized_weights(model: MTPModel) -> list[str]:
    return [name for name, p in model.named_parameters() if p.dtype == torch.uint8]


def test_nf4_holds_the_trunk_in_four_bits_and_the_heads_in_full(tmp_path: Path) -> None:
    requires_bitsandbytes()
    model = adapt(build(), quantization="nf4")
    names = quantized_weights(model)
    assert len(names) == 2 * 7
    assert all(name.startswith(("causal_lm.model.layers.0.", "causal_lm.model.layers.1.")) for name in names)
    tokens = random_tokens()
    logits = model(tokens).logits()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(tokens).logits, logits[:, :, 0], rtol=0, atol=1e-5)
    assert not {name for name in checkpoint_tensors(model) if "base_layer" in name}
    merge_lora(model)
    assert not quantized_weights(model)
    assert torch.equal(model(tokens).logits()[:, :, 0], plain(tokens).logits)


def test_a_forward_without_gradients_leaves_four_bit_matrices_alone() -> None:
    requires_bitsandbytes()
    # With sides that are multiples of the block size, where bitsandbytes may repack them.
    model = adapt(build(hidden_size=64, intermediate_size=128), quantization="nf4")
    before, tokens = plain_state_dict(model), random_tokens()
    with torch.no_grad():
        model(tokens)
    after = plain_state_dict(model)
    assert all(before[name].equal(after[name]) for name in before)


def test_nf4_trains_and_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    requires_bitsandbytes()
    model = adapt(build(), quantization="nf4").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    model(random_tokens()).logits().square().mean().backward()
    optimizer.step()
    resumed = build()
    add_lora(resumed, rank=4, alpha=6.0, quantization="nf4", device=torch.device("cpu"))
    save_and_load(tmp_path, model, resumed)
    assert torch.equal(resumed(random_tokens()).logits(), model.eval()(random_tokens()).logits())


def test_nf4_says_what_is_missing_and_what_it_does_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserInputError, match="nf4 needs linear layers"):
        add_lora(build("gpt2"), rank=4, quantization="nf4")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(UserInputError, match="needs bitsandbytes") as caught:
            add_lora(build(), rank=4, quantization="nf4")
        assert "pip install bitsandbytes" in str(caught.value)
    requires_bitsandbytes()
    with pytest.warns(UserWarning, match=r"covers \d+% of the trunk"):
        add_lora(build("mixtral"), rank=4, quantization="nf4")
