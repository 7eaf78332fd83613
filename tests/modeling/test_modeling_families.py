"""Head 0 is the wrapped model, and the other heads get the same treatment, in every family."""

from __future__ import annotations

import pytest
import torch
import transformers
from modeling_families import FAMILIES, VOCAB_SIZE, build_causal_lm, build_mtp, perturb, random_tokens

from wmtp.exceptions import ModelLoadError, UserInputError
from wmtp.modeling import MTPModel


@pytest.mark.parametrize("family", FAMILIES)
def test_head_0_logits_equal_the_wrapped_model_bit_for_bit(family: str) -> None:
    model = build_mtp(family)
    tokens = random_tokens()
    with torch.no_grad():
        logits_BSHV = model(tokens).logits()
        expected_BSV = model.causal_lm(tokens).logits
    assert logits_BSHV.shape == (2, 16, 3, VOCAB_SIZE)
    assert torch.equal(logits_BSHV[:, :, 0], expected_BSV)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_extra_head_equals_the_wrapped_model_with_that_head_as_its_last_layer(family: str) -> None:
    model = build_mtp(family)
    tokens = random_tokens()
    with torch.no_grad():
        logits_BSHV = model(tokens).logits()
        for head, extra_head in enumerate(model.extra_heads, start=1):
            other = build_causal_lm(family)
            other.load_state_dict(model.causal_lm.state_dict())
            own_layers = other.base_model.h if family in ("gpt2", "gptj") else other.base_model.layers
            own_layers[-1].load_state_dict(extra_head.layer.state_dict())
            assert torch.equal(logits_BSHV[:, :, head], other(tokens).logits), head


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exposed_unembedding_scale_cap_and_bias_reproduce_the_logits(family: str) -> None:
    model = build_mtp(family, horizon=2)
    tokens = random_tokens()
    with torch.no_grad():
        out = model(tokens)
        raw = out.hidden_BSHD.double() @ model.unembedding_VD.double().T
        if model.unembedding_bias_V is not None:
            raw = raw + model.unembedding_bias_V.double()
        raw = raw * model.logit_scale
        if model.logit_softcap is not None:
            raw = model.logit_softcap * torch.tanh(raw / model.logit_softcap)
        torch.testing.assert_close(out.logits().double(), raw, rtol=1e-4, atol=1e-5)


def test_bias_scale_and_softcap_are_really_exercised() -> None:
    assert build_mtp("phi").unembedding_bias_V is not None
    assert build_mtp("gptj").unembedding_bias_V is not None
    assert build_mtp("cohere").logit_scale == 0.0625
    assert build_mtp("granite").logit_scale == pytest.approx(1 / 3)
    assert build_mtp("gemma2").logit_softcap == 0.5


def test_eager_attention_gives_head_0_bit_for_bit_too() -> None:
    model = build_mtp("llama", attn_implementation="eager")
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits()[:, :, 0], model.causal_lm(tokens).logits)


def test_head_0_equals_the_wrapped_model_with_left_and_right_padding_masks() -> None:
    model = build_mtp("llama")
    tokens = random_tokens()
    right = torch.ones_like(tokens)
    right[1, 10:] = 0
    with torch.no_grad():
        assert torch.equal(
            model(tokens, attention_mask=right).logits()[:, :, 0],
            model.causal_lm(tokens, attention_mask=right).logits,
        )
        left = right.flip(1)
        positions = (left.cumsum(1) - 1).clamp(min=0)
        expected = model.causal_lm(tokens, attention_mask=left, position_ids=positions).logits
        assert torch.equal(model(tokens, attention_mask=left).logits()[:, :, 0], expected)


def test_bfloat16_model_keeps_head_0_bit_for_bit() -> None:
    causal_lm = build_causal_lm("llama").to(torch.bfloat16)
    model = MTPModel.from_causal_lm(causal_lm, horizon=2)
    tokens = random_tokens()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits()[:, :, 0], causal_lm(tokens).logits)


def test_a_model_with_a_projection_after_its_last_layer_is_refused() -> None:
    config = transformers.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    )
    with pytest.raises(ModelLoadError, match="OPTForCausalLM changes its hidden states or logits"):
        MTPModel.from_causal_lm(transformers.OPTForCausalLM(config), horizon=2)


class _ScaledLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.001
        return out


def test_an_unknown_factor_on_the_logits_is_noticed() -> None:
    causal_lm = _ScaledLlama(build_causal_lm("llama").config)
    perturb(causal_lm)
    with pytest.raises(ModelLoadError, match="_ScaledLlama"):
        MTPModel.from_causal_lm(causal_lm, horizon=2)


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    with pytest.raises(ModelLoadError, match="decoder layers"):
        MTPModel.from_causal_lm(transformers.T5ForConditionalGeneration(config), horizon=2)


@pytest.mark.parametrize(
    "options", [{"horizon": 0}, {"horizon": 2, "head": "nosuch"}, {"horizon": 2, "adapter": "no"}]
)
def test_bad_head_options_are_refused(options: dict) -> None:
    with pytest.raises(UserInputError, match="choose"):
        MTPModel.from_causal_lm(build_causal_lm("llama"), **options)
