"""The arithmetic that is reported is the arithmetic that is done, whatever learns."""

from __future__ import annotations

import pytest
import torch
from modeling_families import build_causal_lm
from torch.utils.flop_counter import FlopCounterMode

from wmtp.modeling import MTPModel, choose_trainable, flops_per_token
from wmtp.modeling.lora import add_lora
from wmtp.objectives import compute_weighted_mtp_loss

FORMS = ("transformer", "linear", "medusa", "sequential")
SEQ_LEN = 16


def build(form: str, horizon: int = 3, family: str = "llama", **changes: object) -> MTPModel:
    causal_lm = build_causal_lm(family, **changes)
    # The products of eager attention are ordinary ones, which the counter sees on every device.
    causal_lm.set_attn_implementation("eager")
    if form == "teacher_forcing":
        return MTPModel.from_causal_lm(causal_lm, horizon=horizon, adapter=form)
    return MTPModel.from_causal_lm(causal_lm, horizon=horizon, head=form)  # type: ignore[arg-type]


def counted_per_token(model: MTPModel) -> float:
    """What torch counts in a step in which every token is a target of every head."""
    tokens = torch.randint(0, model.unembedding_VD.shape[0], (2, SEQ_LEN))
    labels = torch.randint(0, model.unembedding_VD.shape[0], (2, SEQ_LEN, model.horizon))
    with FlopCounterMode(display=False) as counter:
        logits = model.train()(tokens).logits()
        compute_weighted_mtp_loss(logits, labels, torch.ones(labels.shape)).loss.backward()
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize("form", [*FORMS, "teacher_forcing"])
def test_every_head_form_is_counted_as_torch_counts_it(form: str) -> None:
    model = build(form)
    assert flops_per_token(model, SEQ_LEN) == counted_per_token(model)


@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "gemma2", "phi", "gpt2"])
def test_families_are_counted_as_torch_counts_them(family: str) -> None:
    model = build("transformer", family=family)
    assert flops_per_token(model, SEQ_LEN) == counted_per_token(model)


def test_everything_learning_is_six_a_number_and_attention() -> None:
    model = build("transformer", horizon=3)
    hidden, feed_forward, keys, vocab = 32, 48, 16, 97
    layer = 2 * hidden * hidden + 2 * keys * hidden + 3 * hidden * feed_forward
    naive = 6 * (5 * layer + 3 * vocab * hidden) + 12 * 5 * hidden * SEQ_LEN
    assert flops_per_token(model, SEQ_LEN) == naive


@pytest.mark.parametrize("form", FORMS)
def test_gradients_that_frozen_parameters_do_not_need_are_not_counted(form: str) -> None:
    model = build(form)
    everything = flops_per_token(model, SEQ_LEN)
    choose_trainable(model, "heads_only")
    assert flops_per_token(model, SEQ_LEN) == counted_per_token(model) < everything


@pytest.mark.parametrize("num_frozen", [0, 1, 2])
def test_gradients_end_at_the_lowest_layer_that_learns(num_frozen: int) -> None:
    model = build("transformer")
    model.causal_lm.get_input_embeddings().requires_grad_(False)
    for layer in model.decoder_layers[:num_frozen]:
        layer.requires_grad_(False)
    assert flops_per_token(model, SEQ_LEN) == counted_per_token(model)


def test_lora_is_counted_but_for_what_stands_beside_the_lowest_adapter() -> None:
    model = build("transformer")
    add_lora(model, rank=4, target_modules=["q_proj", "v_proj"])
    choose_trainable(model, "all")
    # In layer 0, `k_proj` [16, 32], `v_proj` [16, 32] and its first adapter matrix [4, 32] have no gradient
    # of what goes in, nor have the keys.
    beside = 2 * (16 * 32 + 16 * 32 + 4 * 32) + 2 * 32 * SEQ_LEN
    assert flops_per_token(model, SEQ_LEN) == counted_per_token(model) + beside


def test_lora_above_frozen_layers_counts_no_gradient_below() -> None:
    model = build("transformer")
    add_lora(model, rank=4, target_modules=["o_proj"])
    choose_trainable(model, "all")
    # Attention stands below its output projection, and is counted with its layer.
    assert flops_per_token(model, SEQ_LEN) == counted_per_token(model) + 2 * 4 * 32 * SEQ_LEN


def test_tied_embeddings_are_counted_as_the_unembedding_alone() -> None:
    model = build("transformer", horizon=1, family="llama_tied")
    untied = build("transformer", horizon=1)
    assert flops_per_token(model, SEQ_LEN) == flops_per_token(untied, SEQ_LEN)
