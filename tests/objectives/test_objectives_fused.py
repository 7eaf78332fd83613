"""The chunked cross entropy: loss and every gradient against a float64 reference, and its invariances."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp.objectives import (
    loss_normalizer,
    shift_labels,
    token_cross_entropy,
    weighted_mtp_cross_entropy,
)

B, S, H, V, D = 2, 7, 3, 13, 5
REDUCTIONS = ["position", "token", "head_sum"]


def make_case(dtype=torch.float64, *, seed=0, masked=True):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, S, H, D, generator=generator, dtype=torch.float64)
    unembedding = torch.randn(V, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, V, (B, S), generator=generator)
    documents = torch.zeros(B, S, dtype=torch.long)
    if masked:
        tokens[0, :2] = -100
        documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, -1, -1]])
    labels = shift_labels(tokens, H, document_ids_BS=documents)
    weights = torch.rand(B, S, H, generator=generator, dtype=torch.float64) * 3
    weights[1, 0, 0] = 0
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, unembedding, bias)]
    return leaves, labels, weights.to(torch.float64 if dtype == torch.float64 else torch.float32)


def reference(hidden, unembedding, bias, labels, weights, *, reduction="position", scale=1.0, softcap=None):
    """Loss through autograd in float64, written from the formulas alone."""
    logits = scale * (hidden.double() @ unembedding.double().T + (0 if bias is None else bias.double()))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    picked = logits.gather(3, labels.clamp(min=0).unsqueeze(3)).squeeze(3)
    is_target = labels != -100
    ce = (torch.log(torch.exp(logits).sum(dim=3)) - picked) * is_target
    terms = ce * weights.double()
    if reduction == "token":
        return terms.sum() / is_target.sum(), ce
    if reduction == "head_sum":
        return sum(
            terms[:, :, h].sum() / max(1, is_target[:, :, h].sum()) for h in range(labels.shape[2])
        ), ce
    num_heads = is_target.sum(dim=2)
    return (terms.sum(dim=2) / num_heads.clamp(min=1)).sum() / (num_heads > 0).sum(), ce


def grads(loss, leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_every_gradient_equal_the_reference(reduction, softcap, scale, with_bias):
    (hidden, unembedding, bias), labels, weights = make_case()
    bias = bias if with_bias else None
    leaves = [hidden, unembedding] + ([bias] if with_bias else [])
    result = weighted_mtp_cross_entropy(
        hidden,
        unembedding,
        labels,
        weights,
        reduction=reduction,
        logit_scale=scale,
        logit_softcap=softcap,
        bias_V=bias,
        chunk_size=4,
    )
    loss, ce = reference(
        hidden, unembedding, bias, labels, weights, reduction=reduction, scale=scale, softcap=softcap
    )
    assert_close(result.loss, loss)
    assert_close(result.ce_BSH, ce.detach())
    assert not result.ce_BSH.requires_grad
    assert_close(grads(result.loss, leaves), grads(loss, leaves))


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_gradients_pass_gradcheck(softcap):
    leaves, labels, weights = make_case()

    def loss(hidden, unembedding, bias):
        return weighted_mtp_cross_entropy(
            hidden, unembedding, labels, weights, logit_softcap=softcap, bias_V=bias, chunk_size=5
        ).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_horizon_one_and_uniform_weights_equal_plain_sft(dtype):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, S, D, generator=generator, dtype=dtype).requires_grad_()
    unembedding = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    tokens = torch.randint(0, V, (B, S), generator=generator)
    tokens[1, 3] = -100
    sft = F.cross_entropy((hidden @ unembedding.T)[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1))
    for reduction in REDUCTIONS:
        result = weighted_mtp_cross_entropy(
            hidden.unsqueeze(2), unembedding, shift_labels(tokens, 1), reduction=reduction
        )
        assert_close(result.loss, sft)
        assert_close(grads(result.loss, [hidden, unembedding]), grads(sft, [hidden, unembedding]))


def test_the_chunk_size_does_not_change_the_result():
    leaves, labels, weights = make_case(torch.float32)
    hidden, unembedding, bias = leaves
    expected = None
    for chunk_size in (1, 2, 5, 8, 1000, None):
        loss = weighted_mtp_cross_entropy(
            hidden, unembedding, labels, weights, bias_V=bias, chunk_size=chunk_size
        ).loss
        outcome = (loss, grads(loss, leaves))
        expected = expected or outcome
        assert_close(outcome, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("split", [[1, 6], [3, 4], [1, 2, 4]])
def test_micro_batches_with_the_global_normalizer_add_up_to_the_whole(reduction, split):
    leaves, labels, weights = make_case()
    hidden, unembedding, bias = leaves
    whole = weighted_mtp_cross_entropy(hidden, unembedding, labels, weights, reduction=reduction, bias_V=bias)
    count = loss_normalizer(labels, reduction)
    # positions are independent in this loss, so any split of them is a split into micro-batches
    pieces = zip(hidden.split(split, 1), labels.split(split, 1), weights.split(split, 1), strict=True)
    parts = sum(
        weighted_mtp_cross_entropy(
            h, unembedding, y, w, reduction=reduction, normalizer=count, bias_V=bias
        ).loss
        for h, y, w in pieces
    )
    assert_close(parts, whole.loss)
    assert_close(grads(parts, leaves), grads(whole.loss, leaves))


def test_packed_documents_equal_separate_rows():
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, V, (1, 9), generator=generator)
    hidden = torch.randn(1, 9, H, D, generator=generator, dtype=torch.float64)
    unembedding = torch.randn(V, D, generator=generator, dtype=torch.float64)
    packed_labels = shift_labels(tokens, H, document_ids_BS=torch.tensor([[0] * 5 + [1] * 4]))
    packed = weighted_mtp_cross_entropy(hidden, unembedding, packed_labels)
    padded_tokens = torch.full((2, 5), -100)
    padded_hidden = torch.randn(2, 5, H, D, generator=generator, dtype=torch.float64)
    for row, piece in enumerate((slice(0, 5), slice(5, 9))):
        length = piece.stop - piece.start
        padded_tokens[row, :length] = tokens[0, piece]
        padded_hidden[row, :length] = hidden[0, piece]
    separate = weighted_mtp_cross_entropy(padded_hidden, unembedding, shift_labels(padded_tokens, H))
    assert_close(packed.loss, separate.loss)


def test_one_valid_token():
    (hidden, unembedding, bias), labels, _ = make_case()
    only = torch.full_like(labels, -100)
    only[1, 2, 1] = 4
    result = weighted_mtp_cross_entropy(hidden, unembedding, only, bias_V=bias)
    expected = F.cross_entropy(unembedding @ hidden[1, 2, 1] + bias, torch.tensor(4))
    assert_close(result.loss, expected)
    leaves = [hidden, unembedding, bias]
    assert_close(grads(result.loss, leaves), grads(expected, leaves))


@pytest.mark.parametrize("nothing", ["no targets", "weights zero"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_learn_gives_zero_loss_and_zero_gradients(nothing, reduction):
    leaves, labels, weights = make_case(torch.float32)
    if nothing == "no targets":
        labels = torch.full_like(labels, -100)
    else:
        weights = torch.zeros_like(weights)
    result = weighted_mtp_cross_entropy(
        leaves[0], leaves[1], labels, weights, reduction=reduction, bias_V=leaves[2]
    )
    assert result.loss.item() == 0
    for gradient in grads(result.loss, leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    # a weight of zero hides a token from the gradient, not from the report
    assert (result.ce_BSH > 0).sum() == (labels != -100).sum()


def test_weights_without_a_target_may_be_anything():
    (hidden, unembedding, _), labels, weights = make_case()
    spoiled = weights.masked_fill(labels == -100, float("nan"))
    clean = weighted_mtp_cross_entropy(hidden, unembedding, labels, weights).loss
    assert_close(weighted_mtp_cross_entropy(hidden, unembedding, labels, spoiled).loss, clean)


def test_a_nan_in_a_used_hidden_state_reaches_the_loss():
    (hidden, unembedding, _), labels, _ = make_case()
    broken = hidden.detach().clone()
    b, t, h = (labels != -100).nonzero()[0].tolist()
    broken[b, t, h, 0] = float("nan")
    assert weighted_mtp_cross_entropy(broken, unembedding, labels).loss.isnan()


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_bf16_hidden_states_keep_the_loss_in_fp32(softcap):
    leaves, labels, weights = make_case(torch.bfloat16)
    hidden, unembedding, bias = leaves
    result = weighted_mtp_cross_entropy(
        hidden, unembedding, labels, weights, bias_V=bias, logit_softcap=softcap, chunk_size=4
    )
    assert result.loss.dtype == result.ce_BSH.dtype == torch.float32
    loss, _ = reference(hidden, unembedding, bias, labels, weights, softcap=softcap)
    assert_close(result.loss.double(), loss, rtol=1e-2, atol=0)
    for gradient, exact in zip(grads(result.loss, leaves), grads(loss, leaves), strict=True):
        assert gradient.dtype == torch.bfloat16
        error = (gradient.double() - exact.double()).norm() / exact.double().norm()
        assert error < 1e-2


def test_the_softcap_of_bf16_logits_is_computed_in_fp32():
    (hidden, unembedding, _), labels, weights = make_case(torch.bfloat16)
    narrow_logits = (hidden @ unembedding.T).detach().float()
    capped = 2.5 * torch.tanh(narrow_logits / 2.5)
    expected = F.cross_entropy(capped.reshape(-1, V), labels.reshape(-1), reduction="none")
    result = weighted_mtp_cross_entropy(hidden, unembedding, labels, weights, logit_softcap=2.5)
    assert_close(result.ce_BSH.flatten(), expected, rtol=1e-5, atol=1e-5)


def test_mixed_dtypes_compute_in_the_wider_one():
    (hidden, unembedding, _), labels, _ = make_case(torch.float32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    result = weighted_mtp_cross_entropy(narrow, unembedding, labels)
    loss, _ = reference(narrow, unembedding, None, labels, torch.ones(B, S, H))
    assert_close(result.loss.double(), loss, rtol=1e-6, atol=0)
    grad_hidden, grad_unembedding = grads(result.loss, [narrow, unembedding])
    assert (grad_hidden.dtype, grad_unembedding.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_decides_the_dtype_of_the_products_but_not_of_the_loss():
    (hidden, unembedding, _), labels, _ = make_case(torch.float32)
    plain = weighted_mtp_cross_entropy(hidden, unembedding, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = weighted_mtp_cross_entropy(hidden, unembedding, labels)
    narrow = weighted_mtp_cross_entropy(hidden.bfloat16(), unembedding.bfloat16(), labels)
    assert result.loss.dtype == torch.float32
    assert_close(result.loss, narrow.loss)
    assert not torch.equal(result.loss, plain.loss)
    assert all(gradient.dtype == torch.float32 for gradient in grads(result.loss, [hidden, unembedding]))


def test_float16_gradients_do_not_underflow():
    (hidden, unembedding, _), labels, _ = make_case(torch.float16)
    # a global count of a large step: coefficients far below the smallest float16
    loss = weighted_mtp_cross_entropy(hidden, unembedding, labels, normalizer=1e7).loss * 1e6
    exact = reference(hidden, unembedding, None, labels, torch.ones(B, S, H))[0]
    scaled = exact * ((labels != -100).any(dim=2).sum() / 10)
    for gradient, expected in zip(grads(loss, [hidden]), grads(scaled, [hidden]), strict=True):
        assert_close(gradient.double(), expected.double(), rtol=2e-2, atol=1e-3)


def test_frozen_inputs_get_no_gradient():
    (hidden, unembedding, bias), labels, weights = make_case()
    frozen = weighted_mtp_cross_entropy(hidden, unembedding.detach(), labels, weights, bias_V=bias)
    full = weighted_mtp_cross_entropy(hidden, unembedding, labels, weights, bias_V=bias)
    head_only = weighted_mtp_cross_entropy(hidden.detach(), unembedding, labels, weights)
    expected = dict(
        zip(("hidden", "unembedding", "bias"), grads(full.loss, [hidden, unembedding, bias]), strict=True)
    )
    assert_close(grads(frozen.loss, [hidden, bias]), (expected["hidden"], expected["bias"]))
    without_bias = weighted_mtp_cross_entropy(hidden, unembedding, labels, weights)
    assert_close(grads(head_only.loss, [unembedding]), grads(without_bias.loss, [unembedding]))


def test_a_retained_graph_gives_the_same_gradients_again_and_scales_them():
    leaves, labels, weights = make_case()
    loss = weighted_mtp_cross_entropy(*leaves[:2], labels, weights, bias_V=leaves[2]).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, leaves)
    assert_close(first, second)
    assert_close(tripled, tuple(3 * gradient for gradient in first))


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor made inside had, and how many products ran."""

    numel = 0
    num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        self.num_products += func.__name__.split(".")[0] in ("mm", "addmm", "addmm_")
        return result


def big_case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 32, 4, 8, generator=generator).requires_grad_()
    unembedding = torch.randn(500, 8, generator=generator).requires_grad_()
    return hidden, unembedding, shift_labels(torch.randint(0, 500, (2, 32), generator=generator), 4)


def test_the_logits_of_the_batch_never_exist():
    hidden, unembedding, labels = big_case()
    with LargestTensor() as seen:
        weighted_mtp_cross_entropy(hidden, unembedding, labels, chunk_size=16).loss.backward()
    assert seen.numel == 16 * 500
    assert hidden.grad is not None
    assert unembedding.grad is not None


def test_gradient_work_is_skipped_where_none_is_needed():
    hidden, unembedding, labels = big_case()

    def count(weights=None, **inputs):
        with LargestTensor() as seen:
            weighted_mtp_cross_entropy(
                inputs.get("hidden", hidden),
                inputs.get("unembedding", unembedding),
                labels,
                weights,
                chunk_size=10**6,
            )
        return seen.num_products

    assert count() == 3
    assert count(unembedding=unembedding.detach()) == 2
    assert count(hidden=hidden.detach()) == 2
    assert count(weights=torch.zeros(labels.shape)) == 1
    with torch.no_grad():
        assert count() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_token_cross_entropy_scores_each_position(dtype):
    (hidden, unembedding, bias), labels, _ = make_case(dtype)
    ce = token_cross_entropy(
        hidden[:, :, 0],
        unembedding,
        labels[:, :, 0],
        logit_scale=0.5,
        logit_softcap=4.0,
        bias_V=bias,
        chunk_size=3,
    )
    _, expected = reference(hidden, unembedding, bias, labels, torch.ones(B, S, H), scale=0.5, softcap=4.0)
    assert not ce.requires_grad
    assert ce.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert_close(ce.double(), expected[:, :, 0].detach(), **tolerance)
    assert torch.all(ce[labels[:, :, 0] == -100] == 0)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[[[100.0]], [[-100.0]]]]).requires_grad_()
    unembedding = torch.tensor([[1.0], [-1.0], [0.0]]).requires_grad_()
    labels = torch.tensor([[[1], [1]]])
    result = weighted_mtp_cross_entropy(hidden, unembedding, labels)
    assert_close(result.ce_BSH.flatten(), torch.tensor([200.0, 0.0]))
    assert all(gradient.isfinite().all() for gradient in grads(result.loss, [hidden, unembedding]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_BSHD": torch.zeros(B, S, D)}, r"\(2, 7, 5\)"),
        ({"labels_BSH": torch.zeros(B, S, H + 1, dtype=torch.long)}, r"\(2, 7, 4\)"),
        ({"unembedding_VD": torch.zeros(V, D + 1)}, r"\(13, 6\)"),
        ({"bias_V": torch.zeros(V + 1)}, r"\(14,\)"),
        ({"logit_softcap": 0.0}, "logit_softcap is 0.0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"reduction": "mean"}, "mean"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, match):
    (hidden, unembedding, _), labels, _ = make_case()
    arguments = {"hidden_BSHD": hidden, "unembedding_VD": unembedding, "labels_BSH": labels} | change
    with pytest.raises(ValueError, match=match):
        weighted_mtp_cross_entropy(**arguments)
