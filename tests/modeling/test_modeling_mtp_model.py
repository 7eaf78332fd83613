"""Heads, gradients, causality and the state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from modeling_families import build_causal_lm, build_mtp, perturb, random_tokens
from safetensors.torch import load_file, save_file
from torch import nn

from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel
from wmtp.modeling.probe import verify_document_isolation


def _llama_layer_by_hand(layer: nn.Module, x_BSD: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """A Llama decoder layer from its published description, in loops where that is clearer."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotate(x_SHd: torch.Tensor) -> torch.Tensor:
        length, _, size = x_SHd.shape
        out = x_SHd.clone()
        for i in range(size // 2):
            angle = (torch.arange(length, dtype=x_SHd.dtype) * theta ** (-2 * i / size))[:, None]
            first, second = x_SHd[..., i], x_SHd[..., i + size // 2]
            out[..., i] = first * angle.cos() - second * angle.sin()
            out[..., i + size // 2] = second * angle.cos() + first * angle.sin()
        return out

    attention = layer.self_attn
    out_BSD = torch.empty_like(x_BSD)
    for row, x_SD in enumerate(x_BSD):
        length = x_SD.shape[0]
        normed = norm(x_SD, layer.input_layernorm.weight)
        query = rotate((normed @ attention.q_proj.weight.T).view(length, 4, 8))
        key = rotate((normed @ attention.k_proj.weight.T).view(length, 2, 8))
        value = (normed @ attention.v_proj.weight.T).view(length, 2, 8)
        mixed = torch.zeros(length, 4, 8, dtype=x_SD.dtype)
        for head in range(4):
            for t in range(length):
                scores = key[: t + 1, head // 2] @ query[t, head] / 8**0.5
                mixed[t, head] = scores.softmax(0) @ value[: t + 1, head // 2]
        middle = x_SD + mixed.reshape(length, 32) @ attention.o_proj.weight.T
        normed = norm(middle, layer.post_attention_layernorm.weight)
        mlp = layer.mlp
        gated = nn.functional.silu(normed @ mlp.gate_proj.weight.T) * (normed @ mlp.up_proj.weight.T)
        out_BSD[row] = middle + gated @ mlp.down_proj.weight.T
    return out_BSD


def test_heads_equal_an_independent_computation() -> None:
    # In float64, but the library takes norms and rotary angles in float32: hence 1e-6.
    model = build_mtp("llama", horizon=3).double()
    tokens = random_tokens(length=7)
    with torch.no_grad():
        out = model(tokens)
        base = model.causal_lm.model
        x_BSD = base.embed_tokens(tokens)
        for layer in base.layers[:-1]:
            x_BSD = _llama_layer_by_hand(layer, x_BSD)
        torch.testing.assert_close(out.trunk_BSD, x_BSD, rtol=0, atol=1e-6)
        for head, layer in enumerate([base.layers[-1], *(head.layer for head in model.extra_heads)]):
            y_BSD = _llama_layer_by_hand(layer, x_BSD)
            normed = y_BSD / (y_BSD.square().mean(-1, keepdim=True) + 1e-6).sqrt() * base.norm.weight
            torch.testing.assert_close(out.hidden_BSHD[:, :, head], normed, rtol=0, atol=1e-6)
            expected = normed @ model.causal_lm.lm_head.weight.T
            torch.testing.assert_close(out.logits()[:, :, head], expected, rtol=0, atol=1e-6)


def test_new_heads_start_as_copies_of_the_last_layer() -> None:
    model = MTPModel.from_causal_lm(build_causal_lm("llama"), horizon=3)
    hidden_BSHD = model(random_tokens()).hidden_BSHD
    assert torch.equal(hidden_BSHD[:, :, 1], hidden_BSHD[:, :, 0])
    assert torch.equal(hidden_BSHD[:, :, 2], hidden_BSHD[:, :, 0])


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_perturbing_one_head_changes_only_its_logits(changed: int) -> None:
    model = build_mtp("gpt2", horizon=4)
    tokens = random_tokens()
    with torch.no_grad():
        before = model(tokens).logits()
        perturb(model.extra_heads[changed - 1])
        after = model(tokens).logits()
    for head in range(4):
        assert torch.equal(before[:, :, head], after[:, :, head]) == (head != changed)


def test_run_trunk_and_run_head_equal_forward_bit_for_bit() -> None:
    model = build_mtp("gemma2", horizon=3)
    tokens = random_tokens()
    with torch.no_grad():
        out = model(tokens)
        trunk = model.run_trunk(tokens)
        assert torch.equal(trunk.trunk_BSD, out.trunk_BSD)
        for head in range(3):
            assert torch.equal(model.run_head(head, trunk), out.hidden_BSHD[:, :, head])
            assert torch.equal(model.run_head(head, out.trunk), out.hidden_BSHD[:, :, head])


def test_the_trunk_runs_without_the_last_layer_and_leaves_it_in_place() -> None:
    model = build_mtp("llama")
    last_layer = model.causal_lm.model.layers[-1]
    calls: list[int] = []
    last_layer.register_forward_hook(lambda *_: calls.append(1))
    model.run_trunk(random_tokens())
    assert not calls
    assert model.causal_lm.model.layers[-1] is last_layer
    with pytest.raises(IndexError):
        model.run_trunk(torch.full((1, 4), 10_000))
    assert model.causal_lm.model.layers[-1] is last_layer


def test_horizon_1_is_the_wrapped_model_and_adds_no_parameters() -> None:
    causal_lm = build_causal_lm("llama")
    model = MTPModel.from_causal_lm(causal_lm, horizon=1)
    tokens = random_tokens()
    assert model.horizon == 1
    assert model.offsets == (1,)
    assert model.num_parameters == sum(p.numel() for p in causal_lm.parameters())
    logits_BSHV = model(tokens).logits()
    assert logits_BSHV.shape[2] == 1
    assert torch.equal(logits_BSHV[:, :, 0], causal_lm(tokens).logits)


def test_horizon_1_gives_the_gradients_of_plain_fine_tuning() -> None:
    causal_lm = build_causal_lm("gpt2").train()
    for module in causal_lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tokens = random_tokens()
    labels = tokens[:, 1:].reshape(-1)

    def gradients(logits_BSV: torch.Tensor) -> dict[str, torch.Tensor]:
        causal_lm.zero_grad()
        nn.functional.cross_entropy(logits_BSV[:, :-1].reshape(-1, logits_BSV.shape[-1]), labels).backward()
        return {name: p.grad.clone() for name, p in causal_lm.named_parameters() if p.grad is not None}

    expected = gradients(causal_lm(tokens).logits)
    actual = gradients(MTPModel.from_causal_lm(causal_lm, horizon=1)(tokens).logits()[:, :, 0])
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


def test_gradients_reach_trunk_and_all_heads() -> None:
    model = build_mtp("llama", horizon=4).train()
    model(random_tokens()).logits().square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_a_head_sends_its_gradient_to_the_trunk_and_to_no_other_head() -> None:
    model = build_mtp("llama", horizon=3).train()
    model(random_tokens()).hidden_BSHD[:, :, 2].square().sum().backward()

    def is_reached(module: nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    assert is_reached(model.causal_lm.model.layers[0])
    assert is_reached(model.extra_heads[1])
    assert not is_reached(model.extra_heads[0])
    assert not is_reached(model.causal_lm.model.layers[-1])


def test_a_frozen_model_gets_trainable_heads() -> None:
    causal_lm = build_causal_lm("llama").requires_grad_(False)
    model = MTPModel.from_causal_lm(causal_lm, horizon=3)
    assert all(p.requires_grad for p in model.extra_heads.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_future_token_never_changes_an_earlier_position(family: str) -> None:
    model = build_mtp(family)
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 90
    with torch.no_grad():
        before, after = model(tokens).hidden_BSHD, model(changed).hidden_BSHD
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_num_heads_runs_the_first_heads_only() -> None:
    model = build_mtp("llama", horizon=3)
    tokens = random_tokens()
    calls: list[int] = []
    model.extra_heads[0].register_forward_hook(lambda *_: calls.append(1))
    out = model(tokens, num_heads=1)
    assert out.hidden_BSHD.shape[2] == 1
    assert not calls
    assert torch.equal(out.hidden_BSHD[:, :, 0], model(tokens).hidden_BSHD[:, :, 0])
    for bad in (0, 4):
        with pytest.raises(UserInputError, match=f"num_heads={bad}"):
            model(tokens, num_heads=bad)


def test_detach_cuts_the_graph() -> None:
    out = build_mtp("llama")(random_tokens())
    assert out.hidden_BSHD.requires_grad
    assert out.trunk_BSD.requires_grad
    cut = out.detach()
    assert not cut.hidden_BSHD.requires_grad
    assert not cut.trunk_BSD.requires_grad
    assert not out.trunk.detach().trunk_BSD.requires_grad


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "llama"])
def test_the_state_dict_holds_every_parameter_once_and_loads_strictly(family: str, tmp_path) -> None:
    model = build_mtp(family)
    state = model.state_dict()
    pointers = [tensor.data_ptr() for tensor in state.values()]
    assert len(pointers) == len(set(pointers))
    assert set(dict(model.named_parameters())) <= set(state)
    save_file(state, tmp_path / "state.safetensors")  # refuses tensors that share memory
    other = build_mtp(family)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"), strict=True)
    tokens = random_tokens()
    assert torch.equal(other(tokens).logits(), model(tokens).logits())


def test_tied_embeddings_stay_tied_after_loading_a_state_dict() -> None:
    model = build_mtp("llama_tied")
    model.load_state_dict(build_mtp("llama_tied").state_dict())
    assert model.unembedding_VD is model.causal_lm.get_input_embeddings().weight


def test_a_missing_tensor_is_still_noticed_by_strict_loading() -> None:
    model = build_mtp("llama_tied")
    state = model.state_dict()
    del state["extra_heads.0.layer.mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"extra_heads\.0\.layer\.mlp\.up_proj\.weight"):
        model.load_state_dict(state)


def test_a_deep_copy_is_independent() -> None:
    model = build_mtp("llama")
    frozen = copy.deepcopy(model)
    tokens = random_tokens()
    with torch.no_grad():
        before = frozen(tokens).logits()
        assert torch.equal(before, model(tokens).logits())
        perturb(model)
        assert torch.equal(frozen(tokens).logits(), before)
        assert not torch.equal(model(tokens).logits(), before)


def test_checking_a_model_uses_no_random_numbers_and_keeps_its_modes() -> None:
    causal_lm = build_causal_lm("gpt2").train()
    causal_lm.transformer.h[0].attn.eval()
    modes = [module.training for module in causal_lm.modules()]
    state = torch.get_rng_state()
    model = MTPModel.from_causal_lm(causal_lm, horizon=2)
    verify_document_isolation(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in causal_lm.modules()] == modes


def test_a_model_on_the_meta_device_is_checked_when_it_first_runs() -> None:
    source = build_causal_lm("llama")
    with torch.device("meta"):
        shell = type(source)(source.config)
    model = MTPModel.from_causal_lm(shell, horizon=2)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    rotary = model.causal_lm.model.rotary_emb
    rotary.inv_freq = source.model.rotary_emb.inv_freq.clone()
    assert model(random_tokens()).hidden_BSHD.shape == (2, 16, 2, 32)


def test_resizing_the_vocabulary_is_followed() -> None:
    model = build_mtp("llama")
    model.causal_lm.resize_token_embeddings(128)
    assert model.unembedding_VD.shape == (128, 32)
    assert model(random_tokens()).logits().shape[-1] == 128
