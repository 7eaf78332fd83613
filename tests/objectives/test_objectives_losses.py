"""The plain reference loss, against loops over float64 numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from wmtp.objectives import compute_weighted_mtp_loss, loss_normalizer, shift_labels


def naive_loss(logits_BSHV, labels_BSH, weight_BSH, reduction):
    """SPEC formulas, term by term, in Python floats."""
    B, S, H, _ = logits_BSHV.shape
    ce = {}
    for b in range(B):
        for t in range(S):
            for h in range(H):
                label = labels_BSH[b, t, h].item()
                if label != -100:
                    logits = logits_BSHV[b, t, h].double().tolist()
                    peak = max(logits)
                    total = sum(math.exp(value - peak) for value in logits)
                    ce[b, t, h] = peak + math.log(total) - logits[label]
    weighted = {key: weight_BSH[key].item() * value for key, value in ce.items()}
    if reduction == "token":
        return sum(weighted.values()) / len(weighted)
    if reduction == "head_sum":
        per_head = [[value for (_, _, h), value in weighted.items() if h == head] for head in range(H)]
        return sum(sum(values) / len(values) for values in per_head if values)
    positions = {}
    for (b, t, _), value in weighted.items():
        positions.setdefault((b, t), []).append(value)
    return sum(sum(values) / len(values) for values in positions.values()) / len(positions)


def random_case(B=2, S=6, H=3, V=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, S, H, V, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, V, (B, S), generator=generator)
    tokens[0, :2] = -100
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]])[:B, :S]
    weights = torch.rand(B, S, H, generator=generator, dtype=torch.float64) * 3
    return logits, shift_labels(tokens, H, document_ids_BS=documents), weights


@pytest.mark.parametrize("reduction", ["position", "token", "head_sum"])
def test_reference_equals_the_written_formula(reduction):
    logits, labels, weights = random_case()
    result = compute_weighted_mtp_loss(logits, labels, weights, reduction=reduction)
    assert result.loss.item() == pytest.approx(naive_loss(logits, labels, weights, reduction), rel=1e-12)
    assert result.loss.dtype == torch.float64


def test_reductions_differ_where_positions_have_fewer_targets():
    logits, labels, weights = random_case()
    losses = {
        name: compute_weighted_mtp_loss(logits, labels, weights, reduction=name).loss.item()
        for name in ("position", "token", "head_sum")
    }
    assert len({round(value, 6) for value in losses.values()}) == 3


def test_cross_entropies_are_unweighted_detached_and_zero_without_a_target():
    logits, labels, weights = random_case()
    logits.requires_grad_()
    ce = compute_weighted_mtp_loss(logits, labels, weights).ce_BSH
    assert not ce.requires_grad
    assert torch.all(ce[labels == -100] == 0)
    b, t, h = (labels != -100).nonzero()[0].tolist()
    assert_close(ce[b, t, h], F.cross_entropy(logits[b, t, h], labels[b, t, h]).detach())


def test_unshifted_labels_are_shifted_once():
    logits, _, weights = random_case()
    tokens = torch.randint(0, 7, (2, 6), generator=torch.Generator().manual_seed(3))
    once = compute_weighted_mtp_loss(logits, tokens, weights).loss
    assert_close(once, compute_weighted_mtp_loss(logits, shift_labels(tokens, 3), weights).loss)


def test_half_precision_logits_give_a_loss_in_fp32():
    logits, labels, weights = random_case()
    result = compute_weighted_mtp_loss(logits.bfloat16(), labels, weights.float())
    assert result.loss.dtype == torch.float32
    assert result.ce_BSH.dtype == torch.float32
    exact = compute_weighted_mtp_loss(logits.bfloat16().double(), labels, weights).loss
    assert_close(result.loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["position", "token", "head_sum"])
def test_parts_with_the_global_normalizer_add_up_to_the_whole(reduction):
    logits, labels, weights = random_case()
    count = loss_normalizer(labels, reduction)
    parts = sum(
        compute_weighted_mtp_loss(
            logits[b : b + 1], labels[b : b + 1], weights[b : b + 1], reduction=reduction, normalizer=count
        ).loss
        for b in range(2)
    )
    assert_close(parts, compute_weighted_mtp_loss(logits, labels, weights, reduction=reduction).loss)


@pytest.mark.parametrize(
    ("logits_shape", "labels_shape"),
    [((2, 6, 7), (2, 6, 3)), ((2, 6, 3, 7), (2, 6, 2)), ((2, 6, 3, 7), (2, 5)), ((2, 6, 3, 7), (6,))],
)
def test_shapes_that_do_not_fit_are_named(logits_shape, labels_shape):
    with pytest.raises(ValueError, match=r"do not fit|differ in the horizon") as error:
        compute_weighted_mtp_loss(torch.zeros(logits_shape), torch.zeros(labels_shape, dtype=torch.long))
    assert str(logits_shape) in str(error.value)
    assert str(labels_shape) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"weight_BSH": torch.ones(2, 6)}, r"weights \(2, 6\).*\(2, 6, 3\)"),
        ({"reduction": "mean"}, "mean"),
        ({"normalizer": torch.ones(3)}, "normalizer"),
        ({"reduction": "head_sum", "normalizer": 5}, "normalizer"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, match):
    logits, labels, _ = random_case()
    with pytest.raises(ValueError, match=match):
        compute_weighted_mtp_loss(logits, labels, **arguments)
