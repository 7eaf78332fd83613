"""Generalised advantage estimation over text, and how good a value function is.

Shapes: B batch, S sequence; [B, S] tensors are indexed by token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wmtp.exceptions import UserInputError
from wmtp.objectives.groups import as_float64
from wmtp.objectives.weights import weight_dtype


def generalized_advantages(
    rewards_BS: Tensor,
    values_BS: Tensor,
    valid_BS: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    document_ids_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets where V_t estimates the document's TOTAL reward given its tokens up to t.

    With C_t = sum_{j <= t} r_j the reward received so far and U_t = V_t - C_t the value of what is still to
    come:

        delta_t = r_{t+1} + gamma * U_{t+1} - U_t       (r = U = 0 after the document's last valid token)
        A_t     = delta_t + gamma * lam * A_{t+1}       (Schulman et al. 2016, eq. 16)
        R_t     = A_t + V_t                             (what V_t is trained towards)

    With gamma = 1, delta_t = V_{t+1} - V_t inside a document and R_T = C_T at its last token.

    Example, gamma = 1, lam = 1, one document with reward 1 on its last token: R_t = 1 everywhere, A_t = 1 -
    V_t.

    Args:
        rewards_BS: [B, S], reward received with token t.
        values_BS: [B, S], V_t.
        valid_BS: [B, S], bool; other tokens are as if absent: "t + 1" is the next valid token of the
            document.
        gamma: discount for each token, in [0, 1].
        lam: GAE's lambda, in [0, 1]; 1 is the plain return, 0 one-step bootstrapping.
        document_ids_BS: [B, S], one id for each packed document of a row. Without it, a row is one document.

    Returns:
        (advantages_BS, returns_BS), fp32 (fp64 for float64 values), detached, 0 where not valid.

    Raises:
        UserInputError: shapes that differ, gamma or lam outside [0, 1].
    """
    _check_inputs(rewards_BS, values_BS, valid_BS, document_ids_BS, gamma, lam)
    values = as_float64(values_BS)
    valid = valid_BS.to(device=values.device, dtype=torch.bool)
    values = torch.where(valid, values, 0.0)
    rewards = torch.where(valid, as_float64(rewards_BS), 0.0)
    documents = torch.zeros_like(valid, dtype=torch.int64)
    if document_ids_BS is not None:
        documents = document_ids_BS.to(values.device)

    to_come = values - _received(rewards, documents)
    next_index, has_next = _next_valid(valid, documents)
    next_reward = torch.where(has_next, rewards.gather(1, next_index), 0.0)
    next_to_come = torch.where(has_next, to_come.gather(1, next_index), 0.0)
    delta = torch.where(valid, next_reward + gamma * next_to_come - to_come, 0.0)
    # invalid tokens hand the advantage of their right neighbour on unchanged; a document's last valid token
    # takes none
    decay = torch.where(valid, gamma * lam * has_next.to(torch.float64), 1.0)
    advantages = torch.where(valid, _reverse_scan(delta, decay), 0.0)
    returns = advantages + values
    dtype = weight_dtype(values_BS)
    return advantages.to(values_BS.device, dtype), returns.to(values_BS.device, dtype)


def explained_variance(values: Tensor, returns: Tensor, valid: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over valid entries: 1 is perfect, 0 no better than a constant.

    Args:
        values, returns, valid: any shape, the same.

    Returns:
        0-d float64 tensor; NaN where the returns do not vary, since there is nothing to explain.
    """
    mask = valid.to(torch.bool)
    target = as_float64(returns[mask])
    if target.numel() == 0:
        return torch.tensor(math.nan, dtype=torch.float64)
    residual = target - as_float64(values[mask])
    variance = target.var(correction=0)
    return torch.where(variance == 0, math.nan, 1 - residual.var(correction=0) / variance)


def roc_auc(scores_N: Tensor, is_positive_N: Tensor) -> Tensor:
    """Probability that a positive scores above a negative, ties counting half (area under the ROC curve).

    Args:
        scores_N: [N].
        is_positive_N: [N], bool.

    Returns:
        0-d float64 tensor; NaN, not an error, where one class is absent or a score is NaN.
    """
    scores = as_float64(scores_N)
    is_positive = is_positive_N.to(device=scores.device, dtype=torch.bool)
    positives, negatives = scores[is_positive], scores[~is_positive].sort().values
    if positives.numel() == 0 or negatives.numel() == 0:
        return torch.tensor(math.nan, dtype=torch.float64)
    num_below = torch.searchsorted(negatives, positives)
    num_not_above = torch.searchsorted(negatives, positives, right=True)
    auc = (num_below + num_not_above).to(torch.float64).mean() / (2 * negatives.numel())
    return torch.where(scores.isnan().any(), math.nan, auc)


def _received(rewards_BS: Tensor, documents_BS: Tensor) -> Tensor:
    """C_t: the rewards of the document up to and including token t."""
    total = rewards_BS.cumsum(dim=1)
    is_first = torch.ones_like(documents_BS, dtype=torch.bool)
    is_first[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    index = torch.arange(documents_BS.shape[1], device=documents_BS.device).expand_as(documents_BS)
    first = torch.where(is_first, index, 0).cummax(dim=1).values
    return total - (total - rewards_BS).gather(1, first)


def _next_valid(valid_BS: Tensor, documents_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the next valid token of the same document, and whether there is one (else meaningless)."""
    seq_len = valid_BS.shape[1]
    index = torch.arange(seq_len, device=valid_BS.device).expand_as(valid_BS)
    here_or_later = torch.where(valid_BS, index, seq_len).flip(1).cummin(dim=1).values.flip(1)
    later = torch.full_like(here_or_later, seq_len)
    later[:, :-1] = here_or_later[:, 1:]
    clamped = later.clamp(max=seq_len - 1)
    return clamped, (later < seq_len) & (documents_BS.gather(1, clamped) == documents_BS)


def _reverse_scan(delta_BS: Tensor, decay_BS: Tensor) -> Tensor:
    """A_t = delta_t + decay_t * A_{t+1}, in log2(S) doubling steps instead of S (Hillis and Steele 1986)."""
    total, carry = delta_BS, decay_BS
    span, seq_len = 1, delta_BS.shape[1]
    while span < seq_len:
        reach = seq_len - span
        total = torch.cat([total[:, :reach] + carry[:, :reach] * total[:, span:], total[:, reach:]], dim=1)
        # carry[t] spans the tokens from t on that are summed into total[t]; it is needed only while they end
        # inside the sequence, so it gets shorter
        carry = carry[:, :-span] * carry[:, span:]
        span *= 2
    return total


def _check_inputs(
    rewards_BS: Tensor,
    values_BS: Tensor,
    valid_BS: Tensor,
    document_ids_BS: Tensor | None,
    gamma: float,
    lam: float,
) -> None:
    shapes = {tuple(tensor.shape) for tensor in (rewards_BS, values_BS, valid_BS)}
    if document_ids_BS is not None:
        shapes.add(tuple(document_ids_BS.shape))
    if len(shapes) > 1 or values_BS.dim() != 2:
        raise UserInputError(
            f"rewards, values, valid and document ids must all be [B, S], got {sorted(shapes)}"
        )
    for name, share in (("gamma", gamma), ("lam", lam)):
        if not 0 <= share <= 1:
            raise UserInputError(f"{name} is {share}, but must be in [0, 1]")
