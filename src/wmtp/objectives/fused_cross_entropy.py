"""Weighted multi-token cross entropy that never holds the logits of a batch.

Shapes: B batch, S sequence, H horizon, V vocabulary, D hidden, N flattened (batch, position, head) pairs, C
pairs of one chunk. Logits exist for one chunk at a time, [C, V]. The weights are known before the loss, so
each chunk's gradients are computed while its logits are there (as in Liger Kernel's fused linear cross
entropy) and backward only scales them: no logits are stored and none are computed twice.

Only pairs that have a target are computed, and pairs of weight zero (hard selection) get a cross entropy but
no gradient work. Finding them costs one or two device synchronisations a call. That is a deliberate trade:
masked prompts and padding are often half of a batch, so it saves far more matrix work than the pipeline
bubble loses.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wmtp.exceptions import UserInputError
from wmtp.objectives.labels import IGNORE_INDEX, Reduction
from wmtp.objectives.losses import MtpLoss, loss_dtype, pair_coefficients

# Logits of one chunk. On a CPU they should stay in the last-level cache, and larger buffers come from fresh
# pages whose first touch costs a third of the matrix product; on a GPU a chunk must be long enough to pay for
# one pass over the [V, D] gradient.
_CHUNK_BYTES = 16 * 2**20
_CHUNK_BYTES_CUDA = 2**30
_MIN_CHUNK_ROWS = 256


class _Logits(NamedTuple):
    """How hidden states become logits: softcap(scale * (hidden @ unembedding.T + bias))."""

    scale: float
    softcap: float | None
    dtype: torch.dtype  # of the matrix products
    chunk_size: int  # rows, C


class _Gradients(NamedTuple):
    """Gradient buffers, filled chunk by chunk; None where the input needs no gradient."""

    hidden: Tensor | None  # [N, D]
    unembedding: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]


def weighted_mtp_cross_entropy(
    hidden_BSHD: Tensor,
    unembedding_VD: Tensor,
    labels_BSH: Tensor,
    weight_BSH: Tensor | None = None,
    *,
    reduction: Reduction = "position",
    normalizer: Tensor | float | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    bias_V: Tensor | None = None,
    chunk_size: int | None = None,
) -> MtpLoss:
    """The weighted multi-token loss from hidden states, without ever building [B, S, H, V].

    Equals `compute_weighted_mtp_loss` on logits softcap(logit_scale * (hidden @ unembedding.T + bias)), where
    softcap(x) = logit_softcap * tanh(x / logit_softcap). Differentiable once, with respect to hidden states,
    unembedding and bias; an input that needs no gradient costs none.

    Precision: products run in the wider of the two input dtypes (under autocast: its dtype; float16 is
    computed in fp32, where small coefficients do not underflow), softmax and cross entropy in fp32, float64
    inputs stay float64. The unembedding's gradient is accumulated in fp32.

    Args:
        hidden_BSHD: [B, S, H, D], after the final norm.
        unembedding_VD: [V, D].
        labels_BSH: [B, S, H], shifted; -100 or a token id below V.
        weight_BSH: [B, S, H], default 1; not differentiated.
        reduction: `position`, `token` or `head_sum`, see `pair_coefficients`.
        normalizer: the global count, a scalar, or [H] for `head_sum`; default: that of this batch.
        logit_scale: factor on the logits.
        logit_softcap: bound of the logits, above 0; None for none.
        bias_V: [V], output bias.
        chunk_size: pairs whose logits exist at a time; default: by vocabulary and device.

    Returns:
        MtpLoss. Without any target, or with all weights zero, loss and gradients are zero.

    Raises:
        UserInputError: shapes that do not fit, unknown reduction, softcap or chunk size not above 0.
    """
    _check_shapes(hidden_BSHD, unembedding_VD, labels_BSH, bias_V)
    spec = _logits_spec(hidden_BSHD, unembedding_VD, logit_scale, logit_softcap, chunk_size)
    coefficient_BSH = pair_coefficients(
        labels_BSH,
        weight_BSH,
        reduction=reduction,
        normalizer=normalizer,
        dtype=loss_dtype(hidden_BSHD.dtype),
    )
    loss, ce_N = _FusedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        hidden_BSHD.reshape(-1, hidden_BSHD.shape[-1]),
        unembedding_VD,
        bias_V,
        labels_BSH.reshape(-1),
        coefficient_BSH.reshape(-1),
        spec,
        torch.is_grad_enabled(),
    )
    return MtpLoss(loss=loss, ce_BSH=ce_N.reshape(labels_BSH.shape))


@torch.no_grad()
def token_cross_entropy(
    hidden_BSD: Tensor,
    unembedding_VD: Tensor,
    labels_BS: Tensor,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    bias_V: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross entropy of one head at every position, without gradient and without [B, S, V]: for scoring.

    Args:
        hidden_BSD: [B, S, D], after the final norm.
        unembedding_VD: [V, D].
        labels_BS: [B, S], already shifted; -100 where nothing is predicted.
        logit_scale, logit_softcap, bias_V, chunk_size: as in `weighted_mtp_cross_entropy`.

    Returns:
        ce_BS in nats, fp32 (fp64 for float64 inputs), indexed by position: entry t is the loss of predicting
        labels_BS[:, t] from t, 0 where the label is -100. `index_by_token` moves it to the token it is about.
    """
    hidden_BSHD, labels_BSH = hidden_BSD.unsqueeze(2), labels_BS.unsqueeze(2)
    _check_shapes(hidden_BSHD, unembedding_VD, labels_BSH, bias_V)
    spec = _logits_spec(hidden_BSHD, unembedding_VD, logit_scale, logit_softcap, chunk_size)
    hidden_ND, labels_N = hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), labels_BS.reshape(-1)
    ce_N = hidden_ND.new_zeros(labels_N.shape, dtype=loss_dtype(hidden_ND.dtype))
    with torch.autocast(hidden_ND.device.type, enabled=False):
        index_N = (labels_N != IGNORE_INDEX).nonzero().squeeze(1)
        _run_chunks(hidden_ND, unembedding_VD, bias_V, labels_N, None, index_N, spec, ce_N, None)
    return ce_N.reshape(labels_BS.shape)


def default_chunk_size(vocab_size: int, device_type: str) -> int:
    """Return how many pairs of position and head have their logits in memory at a time."""
    budget = _CHUNK_BYTES_CUDA if device_type == "cuda" else _CHUNK_BYTES
    return max(_MIN_CHUNK_ROWS, budget // (4 * vocab_size))


class _FusedCrossEntropy(torch.autograd.Function):
    """Sum of coefficient * cross entropy; gradients are made in `forward`, `backward` scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        unembedding_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        coefficient_N: Tensor,
        spec: _Logits,
        is_grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, ce_N). Grad mode is passed in: inside `forward` it is always off."""
        ce_N = torch.zeros_like(coefficient_N)
        is_target_N = labels_N != IGNORE_INDEX
        gradients = None
        if is_grad_enabled and any(ctx.needs_input_grad[:3]):
            gradients = _gradient_buffers(hidden_ND, unembedding_VD, bias_V, spec, ctx.needs_input_grad)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weighted_N, plain_N = is_target_N, None
            if gradients is not None:
                weighted_N = is_target_N & (coefficient_N != 0)
                plain_N = is_target_N & (coefficient_N == 0)
            inputs = (hidden_ND, unembedding_VD, bias_V, labels_N, coefficient_N)
            _run_chunks(*inputs, weighted_N.nonzero().squeeze(1), spec, ce_N, gradients)
            if plain_N is not None:
                _run_chunks(*inputs, plain_N.nonzero().squeeze(1), spec, ce_N, None)
        ctx.mark_non_differentiable(ce_N)
        ctx.save_for_backward(*(gradients or (None, None, None)))
        bias_dtype = None if bias_V is None else bias_V.dtype
        ctx.input_dtypes = (hidden_ND.dtype, unembedding_VD.dtype, bias_dtype)
        return (coefficient_N * ce_N).sum(), ce_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_ce: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients; not in place, because a retained graph may be walked again."""
        scaled = (
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.input_dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)


def _run_chunks(
    hidden_ND: Tensor,
    unembedding_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    coefficient_N: Tensor | None,
    index_M: Tensor,
    spec: _Logits,
    ce_N: Tensor,
    gradients: _Gradients | None,
) -> None:
    """Write the cross entropies of the pairs `index_M` into `ce_N` and add their gradients, by chunk."""
    if index_M.numel() == 0:
        return
    # chunks of equal length: a short last one would waste a pass over the [V, D] gradient
    num_chunks = math.ceil(index_M.numel() / spec.chunk_size)
    num_rows = math.ceil(index_M.numel() / num_chunks)
    unembedding = unembedding_VD.to(spec.dtype)
    bias = None if bias_V is None else bias_V.to(spec.dtype)
    # one pair of buffers for all chunks: fresh memory for each is slower than the softmax itself on a CPU
    logits_buffer = unembedding.new_empty(num_rows, unembedding.shape[0])
    probs_buffer = torch.empty_like(logits_buffer, dtype=ce_N.dtype)
    for index_C in torch.split(index_M, num_rows):
        hidden_CD = hidden_ND[index_C].to(spec.dtype)
        label_C1 = labels_N[index_C].unsqueeze(1)
        logits_CV = _chunk_logits(hidden_CD, unembedding, bias, spec, logits_buffer[: index_C.numel()])
        probs_CV = probs_buffer[: index_C.numel()]
        ce_N[index_C] = _softmax_cross_entropy(logits_CV, label_C1, probs_CV)
        if gradients is not None and coefficient_N is not None:
            dlogits_CV = probs_CV.scatter_add_(
                1, label_C1, torch.full_like(label_C1, -1, dtype=probs_CV.dtype)
            )
            if spec.softcap is not None:
                # logits hold softcap * tanh(x); d tanh = 1 - tanh^2
                dlogits_CV.mul_(logits_CV.to(ce_N.dtype).div_(spec.softcap).square_().neg_().add_(1))
            slope_C1 = (coefficient_N[index_C] * spec.scale).unsqueeze(1)
            _add_gradients(dlogits_CV, slope_C1, hidden_CD, unembedding, index_C, gradients)


def _chunk_logits(
    hidden_CD: Tensor, unembedding_VD: Tensor, bias_V: Tensor | None, spec: _Logits, out_CV: Tensor
) -> Tensor:
    """Logits of one chunk, written into `out_CV`; scale and bias ride along in the matrix product."""
    if bias_V is None:
        zero = hidden_CD.new_zeros(1)
        torch.addmm(zero, hidden_CD, unembedding_VD.T, beta=0, alpha=spec.scale, out=out_CV)
    else:
        torch.addmm(bias_V, hidden_CD, unembedding_VD.T, beta=spec.scale, alpha=spec.scale, out=out_CV)
    if spec.softcap is None:
        return out_CV
    # tanh in fp32: bf16 would flatten what the cap is there to keep apart
    wide_CV = out_CV.to(loss_dtype(out_CV.dtype))
    return wide_CV.div_(spec.softcap).tanh_().mul_(spec.softcap)


def _softmax_cross_entropy(logits_CV: Tensor, label_C1: Tensor, probs_CV: Tensor) -> Tensor:
    """Cross entropy of each row, [C]; the softmax is left in `probs_CV`.

    The largest probability is 1 / sum(exp(logit - max)) and at least 1/V, so its logarithm gives the
    log-sum-exp at full precision, without the second exponential that log-softmax followed by exp would cost.
    """
    torch.softmax(logits_CV, dim=-1, dtype=probs_CV.dtype, out=probs_CV)
    log_partition_C = logits_CV.amax(dim=-1).to(probs_CV.dtype) - probs_CV.amax(dim=-1).log()
    return log_partition_C - logits_CV.gather(1, label_C1).squeeze(1).to(probs_CV.dtype)


def _add_gradients(
    dlogits_CV: Tensor,
    slope_C1: Tensor,
    hidden_CD: Tensor,
    unembedding_VD: Tensor,
    index_C: Tensor,
    gradients: _Gradients,
) -> None:
    """Add one chunk's gradients. The coefficients act on the [C, D] side, which is V / D times smaller."""
    if gradients.bias is not None:
        gradients.bias.addmv_(dlogits_CV.T, slope_C1.squeeze(1))
    dlogits_CV = dlogits_CV.to(hidden_CD.dtype)
    if gradients.hidden is not None:
        gradients.hidden[index_C] = (slope_C1 * (dlogits_CV @ unembedding_VD)).to(gradients.hidden.dtype)
    if gradients.unembedding is not None:
        weighted_CD = (slope_C1 * hidden_CD).to(hidden_CD.dtype)
        if weighted_CD.dtype == gradients.unembedding.dtype:
            gradients.unembedding.addmm_(dlogits_CV.T, weighted_CD)
        else:
            gradients.unembedding.add_(dlogits_CV.T @ weighted_CD)


def _gradient_buffers(
    hidden_ND: Tensor,
    unembedding_VD: Tensor,
    bias_V: Tensor | None,
    spec: _Logits,
    needs_grad: tuple[bool, ...],
) -> _Gradients:
    wide = loss_dtype(spec.dtype)
    return _Gradients(
        hidden=torch.zeros_like(hidden_ND, dtype=spec.dtype) if needs_grad[0] else None,
        unembedding=torch.zeros_like(unembedding_VD, dtype=wide) if needs_grad[1] else None,
        bias=torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and needs_grad[2] else None,
    )


def _logits_spec(
    hidden: Tensor, unembedding_VD: Tensor, scale: float, softcap: float | None, chunk_size: int | None
) -> _Logits:
    if softcap is not None and not softcap > 0:
        raise UserInputError(f"logit_softcap is {softcap}, but must be above 0", remedy="None means no cap")
    if chunk_size is None:
        chunk_size = default_chunk_size(unembedding_VD.shape[0], hidden.device.type)
    if chunk_size < 1:
        raise UserInputError(f"chunk_size is {chunk_size}, but must be at least 1")
    dtype = torch.promote_types(hidden.dtype, unembedding_VD.dtype)
    device_type = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    if dtype == torch.float16:
        dtype = torch.float32
    return _Logits(scale=float(scale), softcap=softcap, dtype=dtype, chunk_size=chunk_size)


def _check_shapes(
    hidden_BSHD: Tensor, unembedding_VD: Tensor, labels_BSH: Tensor, bias_V: Tensor | None
) -> None:
    shapes = f"hidden states {tuple(hidden_BSHD.shape)}, labels {tuple(labels_BSH.shape)}"
    if hidden_BSHD.dim() != 4 or hidden_BSHD.shape[:3] != labels_BSH.shape:
        raise UserInputError(
            f"{shapes} do not fit", remedy="hidden states are [B, S, H, D], labels [B, S, H] (shift_labels)"
        )
    if unembedding_VD.dim() != 2 or unembedding_VD.shape[1] != hidden_BSHD.shape[3]:
        raise UserInputError(
            f"{shapes}, unembedding {tuple(unembedding_VD.shape)} do not fit",
            remedy="the unembedding is [V, D]",
        )
    if bias_V is not None and bias_V.shape != unembedding_VD.shape[:1]:
        raise UserInputError(
            f"bias {tuple(bias_V.shape)} and unembedding {tuple(unembedding_VD.shape)} do not fit"
        )
