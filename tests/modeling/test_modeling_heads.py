"""Head forms: each against a reference written from its formula, and what each may see."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from modeling_families import FAMILIES, VOCAB_SIZE, build_causal_lm, perturb, random_tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel
from wmtp.modeling.heads import (
    TRAINABLE_FORMS,
    HeadPlan,
    HeadRequest,
    SavedHeads,
    SequentialHead,
    plan_heads,
    shift_left,
)

ALL_FORMS = (*TRAINABLE_FORMS, "teacher_forcing")
# How many tokens beyond its own position a head with this offset may read.
LOOK_AHEAD: dict[str, Callable[[int], int]] = {
    "transformer": lambda offset: 0,
    "linear": lambda offset: 0,
    "medusa": lambda offset: 0,
    "sequential": lambda offset: offset - 1,
    "teacher_forcing": lambda offset: offset - 1,
}
LENGTH = 12


def build(form: str, *, offsets: tuple[int, ...] = (1, 2, 3), family: str = "llama") -> MTPModel:
    """A model in float64 whose heads are all random: a start at the identity would hide mistakes."""
    torch.manual_seed(0)
    causal_lm = build_causal_lm(family)
    for path, norm in [(path, m) for path, m in causal_lm.named_modules() if isinstance(m, LlamaRMSNorm)]:
        exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)  # Llama's own rounds to fp32
        exact.weight = norm.weight
        causal_lm.set_submodule(path, exact)
    model = MTPModel(causal_lm, form=form, offsets=offsets).double().eval()
    perturb(model.extra_heads, scale=0.3)
    return model


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def head_state(model: MTPModel, tokens: Tensor) -> Tensor:
    """Output of the last decoder layer, before the final norm, by the wrapped model's own means."""
    captured = []
    hook = model.last_layer.register_forward_hook(
        lambda _module, _inputs, output: captured.append(output[0] if isinstance(output, tuple) else output)
    )
    model.causal_lm(tokens, use_cache=False)
    hook.remove()
    return captured[0]


def llama_layer(layer: nn.Module, hidden_BSD: Tensor) -> Tensor:
    """One Llama decoder layer from its formulas: grouped attention with half-split rotary pairs, SwiGLU."""
    batch, length, size = hidden_BSD.shape
    attention, mlp = layer.self_attn, layer.mlp
    num_heads, head_dim = 4, size // 4
    x = rms_norm(hidden_BSD, layer.input_layernorm.weight)
    angle = torch.arange(length).double()[:, None] * 10000.0 ** (
        -torch.arange(0, head_dim, 2).double() / head_dim
    )

    def rotate(values: Tensor) -> Tensor:
        first, second = values.chunk(2, dim=-1)
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )

    def heads(projection: nn.Module) -> Tensor:
        return (x @ projection.weight.T).view(batch, length, -1, head_dim).transpose(1, 2)

    query, key, value = (
        rotate(heads(attention.q_proj)),
        rotate(heads(attention.k_proj)),
        heads(attention.v_proj),
    )
    key, value = (tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(head_dim)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, length, size)
    hidden_BSD = hidden_BSD + mixed @ attention.o_proj.weight.T
    y = rms_norm(hidden_BSD, layer.post_attention_layernorm.weight)
    gate = y @ mlp.gate_proj.weight.T
    return hidden_BSD + (gate * gate.sigmoid() * (y @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


@pytest.mark.parametrize("form", ["linear", "medusa"])
def test_linear_and_medusa_heads_equal_their_formula_on_head_0_before_the_norm(form: str) -> None:
    model, tokens = build(form), random_tokens()
    with torch.no_grad():
        x = head_state(model, tokens)
        hidden_BSHD = model(tokens).hidden_BSHD
        for h, head in enumerate(model.extra_heads, start=1):
            y = x @ head.map.weight.T
            if form == "medusa":
                y = (y + head.map.bias) * (y + head.map.bias).sigmoid()
            y = x + y
            expected = rms_norm(y, model.final_norm.weight)
            torch.testing.assert_close(hidden_BSHD[:, :, h], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("offsets", [(1, 2, 3, 4), (1, 3, 7)])
def test_sequential_heads_equal_a_loop_over_depths_and_positions(offsets: tuple[int, ...]) -> None:
    model, tokens = build("sequential", offsets=offsets), random_tokens(length=LENGTH)
    with torch.no_grad():
        hidden_BSHD = model(tokens).hidden_BSHD
        state = head_state(model, tokens)
        for h, (head, offset) in enumerate(zip(model.extra_heads, offsets[1:], strict=True), start=1):
            rows = []
            for t in range(LENGTH):
                at = t + offset - 1
                token_BD = model.causal_lm.model.embed_tokens.weight[tokens[:, at]] if at < LENGTH else None
                embedding_BD = torch.zeros_like(state[:, t]) if token_BD is None else token_BD
                both = torch.cat(
                    [
                        rms_norm(state[:, t], head.hidden_norm.weight),
                        rms_norm(embedding_BD, head.embedding_norm.weight),
                    ],
                    dim=-1,
                )
                rows.append(both @ head.projection.weight.T)
            state = llama_layer(head.layer, torch.stack(rows, dim=1))
            expected = rms_norm(state, model.final_norm.weight)
            torch.testing.assert_close(
                hidden_BSHD[:, :, h], expected, rtol=0, atol=1e-6
            )  # rotary tables are fp32


@pytest.mark.parametrize("offsets", [(1, 2, 3), (1, 4)])
def test_teacher_forcing_gives_the_ordinary_logits_of_a_later_position(offsets: tuple[int, ...]) -> None:
    model, tokens = build("teacher_forcing", offsets=offsets), random_tokens()
    with torch.no_grad():
        logits_BSHV = model(tokens).logits()
        ordinary_BSV = model.causal_lm(tokens).logits
        for h, offset in enumerate(offsets):
            kept = tokens.shape[1] - offset + 1
            assert torch.equal(logits_BSHV[:, :kept, h], ordinary_BSV[:, offset - 1 :])
    assert not list(model.extra_heads.parameters())


def furthest_token_seen(model: MTPModel, head: int, position: int) -> int:
    """The last token of which the head's hidden state at a position depends, found by changing each."""
    tokens = random_tokens(batch=1, length=LENGTH)
    with torch.no_grad():
        before = model(tokens).hidden_BSHD[0, position, head]
        seen = []
        for index in range(LENGTH):
            changed = tokens.clone()
            changed[0, index] = (changed[0, index] + 1) % VOCAB_SIZE
            if not torch.equal(model(changed).hidden_BSHD[0, position, head], before):
                seen.append(index)
    return max(seen)


@pytest.mark.parametrize("offsets", [(1, 2, 3), (1, 3, 5)])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_head_sees_exactly_the_tokens_its_position_allows(form: str, offsets: tuple[int, ...]) -> None:
    model = build(form, offsets=offsets)
    for head, offset in enumerate(offsets):
        for position in (0, 3, 5):
            expected = position + (LOOK_AHEAD[form](offset) if head else 0)
            assert furthest_token_seen(model, head, position) == expected < position + offset


def test_a_head_that_consumes_the_token_it_predicts_is_noticed() -> None:
    model = build("sequential")
    head = model.extra_heads[0]
    assert isinstance(head, SequentialHead)
    assert furthest_token_seen(model, 1, 3) == 4
    head.distance += 1  # what a port does that embeds the label: offset 2 predicts token 5 and reads it
    assert furthest_token_seen(model, 1, 3) == 5


@pytest.mark.parametrize("form", TRAINABLE_FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_every_form_and_keeps_head_0_bit_for_bit(family: str, form: str) -> None:
    causal_lm = build_causal_lm(family)
    tokens = random_tokens()
    with torch.no_grad():
        expected_BSV = causal_lm(tokens).logits
        model = MTPModel.from_causal_lm(causal_lm, horizon=3, head=form).eval()
        perturb(model.extra_heads)
        out = model(tokens)
        assert torch.equal(out.logits()[:, :, 0], expected_BSV)
        assert out.hidden_BSHD.isfinite().all()
        for head in range(3):
            assert torch.equal(model.run_head(head, out.trunk), out.hidden_BSHD[:, :, head]), head


@pytest.mark.parametrize("form", ["linear", "medusa"])
def test_residual_heads_start_as_head_0_bit_for_bit(form: str) -> None:
    model = MTPModel.from_causal_lm(build_causal_lm("llama"), horizon=3, head=form)
    hidden_BSHD = model(random_tokens()).hidden_BSHD
    for head in (1, 2):
        torch.testing.assert_close(hidden_BSHD[:, :, head], hidden_BSHD[:, :, 0], rtol=0, atol=1e-6)


def test_a_sequential_head_starts_as_one_more_layer_on_the_depth_before() -> None:
    model = MTPModel.from_causal_lm(build_causal_lm("llama"), horizon=2, head="sequential")
    tokens = random_tokens()
    with torch.no_grad():
        normed = rms_norm(head_state(model, tokens), model.final_norm.weight)
        copied = copy.deepcopy(model.last_layer).double()
        expected = rms_norm(llama_layer(copied, normed.double()), model.final_norm.weight)
        torch.testing.assert_close(model(tokens).hidden_BSHD[:, :, 1], expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", TRAINABLE_FORMS)
def test_the_gradient_of_every_head_parameter_matches_a_finite_difference(form: str) -> None:
    model, tokens = build(form), random_tokens(length=6)
    probe = torch.randn(2, 6, 3, 32, dtype=torch.float64)

    def value() -> Tensor:
        return (model(tokens).hidden_BSHD * probe).sum()

    value().backward()
    for name, parameter in model.extra_heads.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = value()
            parameter.sub_(direction, alpha=2e-6)
            below = value()
            parameter.add_(direction, alpha=1e-6)
        numeric = (above - below) / 2e-6
        analytic = (parameter.grad * direction).sum()
        torch.testing.assert_close(analytic, numeric, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_packed_documents_equal_documents_by_themselves_wherever_a_target_exists(form: str) -> None:
    model = build(form)
    first, second = random_tokens(1, 7, seed=1), random_tokens(1, 9, seed=2)
    document_ids = torch.tensor([[0] * 7 + [1] * 9])
    with torch.no_grad():
        packed = model(torch.cat([first, second], dim=1), document_ids=document_ids).hidden_BSHD
        for start, tokens in ((0, first), (7, second)):
            alone = model(tokens).hidden_BSHD
            for head, offset in enumerate(model.offsets):
                kept = tokens.shape[1] - offset
                torch.testing.assert_close(
                    packed[:, start : start + kept, head], alone[:, :kept, head], rtol=0, atol=1e-12
                )


@pytest.mark.parametrize(
    ("form", "offsets", "can_draft"),
    [
        ("transformer", (1, 2, 3), True),
        ("linear", (1, 2), True),
        ("medusa", (1, 2), True),
        ("sequential", (1, 2, 3), True),
        ("transformer", (1, 3), False),
        ("teacher_forcing", (1, 2), False),
        ("transformer", (1,), False),
    ],
)
def test_only_contiguous_offsets_of_learned_heads_can_draft(
    form: str, offsets: tuple[int, ...], can_draft: bool
) -> None:
    assert MTPModel(build_causal_lm("llama"), form=form, offsets=offsets).can_draft is can_draft


def test_shift_left_moves_positions_and_fills_with_zeros() -> None:
    values = torch.arange(1.0, 5.0).view(1, 4, 1)
    assert shift_left(values, 0) is values
    assert shift_left(values, 1).flatten().tolist() == [2.0, 3.0, 4.0, 0.0]
    assert shift_left(values, 9).flatten().tolist() == [0.0, 0.0, 0.0, 0.0]


PLAIN = SavedHeads()
FOUR = SavedHeads("transformer", (1, 2, 3, 4))
MEDUSA = SavedHeads("medusa", (1, 2, 4))
FORCED = SavedHeads("teacher_forcing", (1, 2, 3))


@pytest.mark.parametrize(
    ("request_", "saved", "plan"),
    [
        (HeadRequest(), PLAIN, HeadPlan("transformer", (1,), 1)),
        (HeadRequest(horizon=3), PLAIN, HeadPlan("transformer", (1, 2, 3), 1)),
        (HeadRequest(horizon=3, head="medusa"), PLAIN, HeadPlan("medusa", (1, 2, 3), 1)),
        (HeadRequest(offsets=[1, 2, 8]), PLAIN, HeadPlan("transformer", (1, 2, 8), 1)),
        (HeadRequest(horizon=3, adapter="teacher_forcing"), PLAIN, HeadPlan("teacher_forcing", (1, 2, 3), 1)),
        (HeadRequest(), FOUR, HeadPlan("transformer", (1, 2, 3, 4), 4)),
        (HeadRequest(horizon=4, adapter="teacher_forcing"), FOUR, HeadPlan("transformer", (1, 2, 3, 4), 4)),
        (HeadRequest(horizon=6), FOUR, HeadPlan("transformer", (1, 2, 3, 4, 5, 6), 4)),
        (HeadRequest(horizon=5), MEDUSA, HeadPlan("medusa", (1, 2, 4, 5, 6), 3)),
        (HeadRequest(offsets=(1, 2, 4, 9)), MEDUSA, HeadPlan("medusa", (1, 2, 4, 9), 3)),
        (HeadRequest(), FORCED, HeadPlan("teacher_forcing", (1, 2, 3), 3)),
        (HeadRequest(horizon=3, head="linear"), FORCED, HeadPlan("linear", (1, 2, 3), 1)),
    ],
)
def test_what_is_asked_for_meets_what_there_is(
    request_: HeadRequest, saved: SavedHeads, plan: HeadPlan
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_heads(request_, saved, "a model") == plan


def test_fewer_heads_than_saved_warns_and_takes_the_first() -> None:
    with pytest.warns(UserWarning, match="a model has 4 heads; the first 2 are used"):
        assert plan_heads(HeadRequest(horizon=2), FOUR, "a model") == HeadPlan("transformer", (1, 2), 2)


def test_fallback_goes_on_with_one_head_and_warns_once() -> None:
    with pytest.warns(UserWarning, match=r"has one head.*horizon 1 in place of 4.*adapter: heads") as record:
        plan = plan_heads(HeadRequest(horizon=4, adapter="fallback"), PLAIN, "a model")
    assert plan == HeadPlan("transformer", (1,), 1)
    assert len(record) == 1


@pytest.mark.parametrize(
    ("request_", "saved", "words"),
    [
        ({"horizon": 6, "adapter": "teacher_forcing"}, FOUR, ["4 heads", "horizon 6", "teacher_forcing"]),
        ({"horizon": 6, "adapter": "fallback"}, FOUR, ["4 heads", "horizon 6", "fallback"]),
        ({"horizon": 4, "head": "linear"}, FOUR, ["'transformer'", "'linear'"]),
        ({"offsets": [1, 2, 3]}, MEDUSA, ["[1, 2, 4]", "[1, 2, 3]"]),
        ({"horizon": 0}, PLAIN, ["horizon is 0"]),
        ({"head": "teacher_forcing"}, PLAIN, ["'teacher_forcing'", "medusa"]),
        ({"adapter": "none"}, PLAIN, ["'none'", "fallback"]),
        ({"offsets": [2, 3]}, PLAIN, ["[2, 3]", "begin with 1"]),
        ({"offsets": [1, 1]}, PLAIN, ["[1, 1]"]),
        ({"offsets": []}, PLAIN, ["[]"]),
        ({"horizon": 4, "offsets": [1, 2]}, PLAIN, ["2 offsets", "horizon 4"]),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(request_: dict, saved: SavedHeads, words: list[str]) -> None:
    with pytest.raises(UserInputError) as error:
        plan_heads(HeadRequest(**request_), saved, "a model")
    for word in words:
        assert word in str(error.value)


def test_a_copied_layer_keeps_the_tensors_that_its_family_keeps_in_fp32(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    experts = {"moe_num_experts": 4, "moe_intermediate_size": 16, "moe_k": 2}
    config = Ernie4_5_MoeConfig(**sizes, **experts, num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for form in ("transformer", "sequential"):
        model = MTPModel.from_pretrained(tmp_path, horizon=2, head=form, dtype=torch.bfloat16)
        layer, copied = model.last_layer.state_dict(), model.extra_heads[0].layer.state_dict()
        assert {tensor.dtype for tensor in layer.values()} == {torch.float32, torch.bfloat16}
        assert all(tensor.dtype == layer[name].dtype for name, tensor in copied.items())
        assert all(torch.equal(tensor, layer[name]) for name, tensor in copied.items())
        assert model(torch.arange(3, 9)[None]).hidden_BSHD.dtype == torch.bfloat16
