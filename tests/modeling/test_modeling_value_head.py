"""Value head: starts at zero, sees the past only, stops the gradient, and survives a round trip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from modeling_families import build_mtp, perturb, random_tokens
from safetensors.torch import load_file, save_file

from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling import MTPModel, ValueHead

FORMS = ["transformer", "mlp", "linear"]


def _build(form: str, family: str = "llama") -> tuple[MTPModel, ValueHead]:
    model = build_mtp(family)
    head = ValueHead.from_model(model, form=form)
    perturb(head)
    return model, head


@pytest.mark.parametrize("form", FORMS)
def test_values_start_at_exactly_zero_in_fp32(form: str) -> None:
    model = build_mtp("llama").to(torch.bfloat16)
    values_BS = ValueHead.from_model(model, form=form)(model(random_tokens()))
    assert values_BS.shape == (2, 16)
    assert values_BS.dtype == torch.float32
    assert torch.count_nonzero(values_BS) == 0


def test_the_decoder_layer_starts_as_a_copy_of_the_last_one() -> None:
    model = build_mtp("gemma2")
    head = ValueHead.from_model(model)
    with torch.no_grad():
        head.value_map.weight.fill_(1.0)
        out = model(random_tokens())
        expected_BS = out.hidden_BSHD[:, :, 0].sum(-1)
        torch.testing.assert_close(head(out), expected_BS)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_stops_at_the_hidden_state_unless_asked(form: str) -> None:
    model, head = _build(form)
    head(model(random_tokens())).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    head(model(random_tokens()), into_trunk=True).square().sum().backward()
    assert model.causal_lm.model.layers[0].mlp.up_proj.weight.grad.any()


def test_a_head_of_a_frozen_model_can_be_trained() -> None:
    model = build_mtp("llama").requires_grad_(False)
    head = ValueHead.from_model(model)
    assert all(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_values_do_not_see_later_tokens_or_other_documents(form: str) -> None:
    model, head = _build(form)
    tokens, ids = random_tokens(1), torch.tensor([[0] * 6 + [1] * 10])
    later, earlier = tokens.clone(), tokens.clone()
    later[0, 12] += 1
    earlier[0, 2] += 1
    with torch.no_grad():
        values_BS = head(model(tokens, document_ids=ids))
        assert torch.equal(head(model(later, document_ids=ids))[:, :12], values_BS[:, :12])
        changed_BS = head(model(earlier, document_ids=ids))
        alone_BS = head(model(tokens[:, 6:]))
    assert torch.equal(changed_BS[:, 6:], values_BS[:, 6:])
    assert not torch.equal(changed_BS[:, 2:6], values_BS[:, 2:6])
    torch.testing.assert_close(values_BS[:, 6:], alone_BS, rtol=0, atol=1e-5)


def test_it_reads_head_0_and_not_another_head() -> None:
    model, head = _build("linear")
    tokens = random_tokens()
    before = head(model(tokens))
    perturb(model.extra_heads)
    assert torch.equal(head(model(tokens)), before)
    assert torch.equal(head(model(tokens, num_heads=1)), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
@pytest.mark.parametrize("form", FORMS)
def test_round_trip_is_bitwise(form: str, family: str, tmp_path: Path) -> None:
    model, head = _build(form, family)
    head.save(tmp_path / "head")
    loaded = ValueHead.load(tmp_path / "head", model)
    assert loaded.form == form
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_values_are_computed_in_fp32_under_autocast() -> None:
    model, head = _build("linear")
    with torch.no_grad():
        out = model(random_tokens())
        expected = head(out)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(head(out), expected)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(UserInputError, match="unknown value head form 'conv'"):
        ValueHead.from_model(build_mtp("llama"), form="conv")


def test_files_that_are_missing_or_do_not_fit_are_named(tmp_path: Path) -> None:
    model, head = _build("mlp")
    with pytest.raises(ModelLoadError, match=r"no value_head\.json"):
        ValueHead.load(tmp_path, model)
    head.save(tmp_path)
    file = tmp_path / "value_head.safetensors"
    good = load_file(file)
    save_file({**good, "value_map.weight": torch.zeros(1, 31)}, file)
    with pytest.raises(
        ModelLoadError, match=r"'value_map\.weight' has shape \[1, 31\], the model needs \[1, 32\]"
    ):
        ValueHead.load(tmp_path, model)
    save_file({name: tensor for name, tensor in good.items() if name != "value_map.bias"}, file)
    with pytest.raises(ModelLoadError, match=r"value_head\.safetensors lacks the tensor 'value_map\.bias'"):
        ValueHead.load(tmp_path, model)
    save_file({**good, "more": torch.zeros(1)}, file)
    with pytest.raises(ModelLoadError, match="unexpected tensor 'more'"):
        ValueHead.load(tmp_path, model)
    file.write_bytes(b"broken")
    with pytest.raises(ModelLoadError, match=r"value_head\.safetensors is not a readable"):
        ValueHead.load(tmp_path, model)
    (tmp_path / "value_head.json").write_text(json.dumps({"format_version": 1, "form": "conv"}))
    with pytest.raises(ModelLoadError, match="form='conv'"):
        ValueHead.load(tmp_path, model)
