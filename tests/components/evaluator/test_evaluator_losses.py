"""Perplexity and token accuracy per head against plain loops in float64."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from wmtp.components.data import MTPDataCollator
from wmtp.components.data.examples import Batch, Feature
from wmtp.components.evaluator import (
    EvaluatorContext,
    PerplexityEvaluator,
    TokenAccuracyEvaluator,
    measure_accuracy,
    measure_losses,
    measure_validation,
)
from wmtp.components.tokenizer import HfTokenizer, TokenizerSettings
from wmtp.evaluation.microcode import build_tokenizer
from wmtp.modeling import MTPModel
from wmtp.settings.recipe_eval import EvalSettings

VOCAB_SIZE, HORIZON = 50, 3


def build_model(family: str = "llama") -> MTPModel:
    torch.manual_seed(1)
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    config = (
        LlamaConfig(**common)
        if family == "llama"
        else Gemma2Config(**common, head_dim=16, final_logit_softcapping=3.0)
    )
    model = MTPModel.from_causal_lm(AutoModelForCausalLM.from_config(config).double(), horizon=HORIZON)
    with torch.no_grad():
        for parameter in model.extra_heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def features(num: int = 11, *, shortest: int = 2) -> list[Feature]:
    source = random.Random(3)
    rows: list[Feature] = []
    for _ in range(num):
        ids = [source.randrange(VOCAB_SIZE) for _ in range(source.randint(shortest, 14))]
        prompt = source.randint(0, len(ids) - 2)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def collate(rows: list[Any], batch_size: int) -> list[Batch]:
    collator = MTPDataCollator({"tokenizer": build_tokenizer(), "horizon": HORIZON})
    return [collator(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def naive(model: MTPModel, rows: list[Feature]) -> tuple[list[list[tuple[float, bool]]], float]:
    """Each head's (cross entropy, is the argmax right) of every target, and the uniform loss; row by row."""
    pairs: list[list[tuple[float, bool]]] = [[] for _ in range(HORIZON)]
    position_means = []
    for row in rows:
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([row["input_ids"]])).logits()[0]
        for t in range(len(row["input_ids"])):
            here = []
            for h in range(HORIZON):
                if t + h + 1 < len(row["input_ids"]) and row["labels"][t + h + 1] != -100:
                    target = row["labels"][t + h + 1]
                    ce = float(-logits[t, h].log_softmax(-1)[target])
                    pairs[h].append((ce, int(logits[t, h].argmax()) == target))
                    here.append(ce)
            if here:
                position_means.append(sum(here) / len(here))
    return pairs, sum(position_means) / len(position_means)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_losses_equal_plain_loops_whatever_the_batch_size(family: str, batch_size: int) -> None:
    model, rows = build_model(family), features()
    pairs, loss = naive(model, rows)
    metrics = measure_losses(model, collate(rows, batch_size))
    assert metrics["val/loss"] == pytest.approx(loss, rel=1e-9)
    for head in range(HORIZON):
        mean = sum(ce for ce, _ in pairs[head]) / len(pairs[head])
        assert metrics[f"val/ce_head_{head}"] == pytest.approx(mean, rel=1e-9)
        assert metrics[f"perplexity_head_{head}"] == pytest.approx(math.exp(mean), rel=1e-9)
    assert len(metrics) == 1 + 2 * HORIZON


def test_losses_of_packed_documents_equal_those_of_documents_alone() -> None:
    model, rows = build_model(), features(12)
    bins = [rows[:5], rows[5:7], rows[7:]]
    alone = measure_losses(model, collate(rows, 1))
    assert measure_losses(model, collate(bins, 2)) == pytest.approx(alone, rel=1e-9)
    accuracy = measure_accuracy(model, collate(rows, 1))
    assert measure_accuracy(model, collate(bins, 2)) == accuracy


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk_elements", [1, 5 * VOCAB_SIZE, 10**6])
def test_accuracy_equals_plain_loops_whatever_the_chunk(
    family: str, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wmtp.components.evaluator.losses._CHUNK_ELEMENTS", chunk_elements)
    model, rows = build_model(family), features()
    # Targets that the heads do predict, so that the accuracy is not 0.
    with torch.no_grad():
        for row in rows:
            best = model(torch.tensor([row["input_ids"]])).logits()[0, :, 0].argmax(-1).tolist()
            row["labels"] = [*row["labels"][:1], *best[:-1]]
    pairs, _ = naive(model, rows)
    expected = {
        f"token_accuracy_head_{head}": sum(is_right for _, is_right in pairs[head]) / len(pairs[head])
        for head in range(HORIZON)
    }
    assert expected["token_accuracy_head_0"] == 1.0
    assert 0.0 < expected["token_accuracy_head_1"] < 1.0
    measured = measure_accuracy(model, collate(rows, 4))
    assert {name: value for name, value in measured.items() if name.startswith("token_")} == expected


def naive_acceptance(model: MTPModel, rows: list[Feature]) -> dict[str, float]:
    """Position by position: do heads 1..h at t say what head 0 says at t+1..t+h, all of them?"""
    accepted: dict[int, list[bool]] = {head: [] for head in range(1, HORIZON)}
    for row in rows:
        length = len(row["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits()[0]
        for t in range(length):
            for h in range(1, HORIZON):
                if t + h + 1 < length and all(row["labels"][t + j + 1] != -100 for j in range(h + 1)):
                    says = [int(logits[t, j].argmax()) for j in range(1, h + 1)]
                    written = [int(logits[t + j, 0].argmax()) for j in range(1, h + 1)]
                    accepted[h].append(says == written)
    return {f"acceptance_proxy_head_{head}": sum(each) / len(each) for head, each in accepted.items()}


@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_acceptance_equals_plain_loops_whatever_the_batch_size(batch_size: int) -> None:
    model, rows = build_model(), features(30)
    with torch.no_grad():
        # Heads that agree with head 0 now and then: copies of it, disturbed a little.
        model.extra_heads.load_state_dict(
            MTPModel.from_causal_lm(model.causal_lm, horizon=HORIZON).extra_heads.state_dict()
        )
        for head, extra in enumerate(model.extra_heads):
            for parameter in extra.parameters():
                parameter.add_(0.05 * (head + 1) * torch.randn_like(parameter))
        # Rows of one repeated token, on which a head is right that only knows the past.
        for row in rows[::2]:
            row["input_ids"] = [row["input_ids"][0]] * len(row["input_ids"])
    expected = naive_acceptance(model, rows)
    assert 0.0 < expected["acceptance_proxy_head_2"] < expected["acceptance_proxy_head_1"] < 1.0
    measured = measure_accuracy(model, collate(rows, batch_size))
    assert {name: measured[name] for name in expected} == expected
    total = 1 + sum(expected.values())
    assert measured["acceptance_proxy_tokens_per_forward"] == pytest.approx(total, rel=1e-12)


def test_acceptance_is_not_counted_across_documents_that_share_a_row() -> None:
    model, rows = build_model(), features(12, shortest=5)
    assert measure_accuracy(model, collate([rows[:6], rows[6:]], 2)) == measure_accuracy(
        model, collate(rows, 1)
    )


def test_heads_that_cannot_draft_have_accuracy_and_no_acceptance() -> None:
    causal_lm = build_model().causal_lm
    model = MTPModel.from_causal_lm(causal_lm, horizon=2, offsets=[1, 3])
    collator = MTPDataCollator({"tokenizer": build_tokenizer(), "horizon": 2, "offsets": [1, 3]})
    metrics = measure_accuracy(model, [collator(features())])
    assert set(metrics) == {"token_accuracy_head_0", "token_accuracy_head_1"}


def test_validation_measures_everything_in_one_pass() -> None:
    model, batches = build_model(), collate(features(), 4)
    losses, accuracy = measure_losses(model, batches), measure_accuracy(model, batches)
    measured = measure_validation(model, iter(batches))
    assert measured == losses | {f"val/{name}": value for name, value in accuracy.items()}


def test_a_head_without_targets_is_left_out() -> None:
    rows: list[Feature] = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    metrics = measure_losses(build_model(), collate(rows, 1))
    assert "val/ce_head_1" in metrics
    assert "val/ce_head_2" not in metrics
    assert "token_accuracy_head_2" not in measure_accuracy(build_model(), collate(rows, 1))


@pytest.mark.parametrize("measure", [measure_losses, measure_accuracy, measure_validation])
@pytest.mark.parametrize("rows", [[], [{"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}]])
def test_batches_without_targets_are_an_error(measure: Any, rows: list[Feature]) -> None:
    with pytest.raises(ValueError, match="no target"):
        measure(build_model(), collate(rows, 1))


def test_a_diverged_model_has_infinite_perplexity_and_no_overflow() -> None:
    model = build_model()
    with torch.no_grad():
        model.unembedding_VD.mul_(1e6)
    assert measure_losses(model, collate(features(), 4))["perplexity_head_0"] == math.inf


def test_measuring_leaves_modes_and_gradients_as_they_were() -> None:
    model = build_model().train()
    model.extra_heads.eval()
    modes = [module.training for module in model.modules()]
    measure_losses(model, collate(features(), 4))
    measure_accuracy(model, collate(features(), 4))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_evaluators_return_the_measurements_under_their_types() -> None:
    model, rows = build_model(), features()
    tokenizer = HfTokenizer(TokenizerSettings(tokenizer=build_tokenizer()))
    context = EvaluatorContext(model=model, tokenizer=tokenizer, batches=collate(rows, 4))
    perplexity = PerplexityEvaluator(EvalSettings()).run(context)
    accuracy = TokenAccuracyEvaluator(EvalSettings()).run(context)
    assert (perplexity.type, accuracy.type) == ("perplexity", "token-accuracy")
    assert perplexity.metrics == measure_losses(model, collate(rows, 4))
    assert accuracy.metrics == measure_accuracy(model, collate(rows, 4))
