"""Choosing the next token: greedy, temperature, top-k, top-p, min-p.

Pure functions. Shapes: N rows, V vocabulary. A draw is the inverse of the cumulative distribution at a
uniform number that depends on (seed, problem, sample, position) only, so a row's text is the same whatever
shares its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wmtp.exceptions import UserInputError

_UINT64_BOUND = 2**64
# Draws are greedy long before this; below it fp32 logits would overflow, and inf - inf is no probability.
_MIN_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How a distribution is shaped before a token is drawn; filters apply in the order of the fields.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and ignores the filters.
        top_k: keep the k most likely tokens (and ties with the last of them); 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches p (Holtzman et al. 2020); 1
            keeps all.
        min_p: keep tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024); 0 keeps
            all.

    Raises:
        UserInputError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserInputError(
                f"temperature must be finite and at least 0, got {self.temperature}",
                remedy="use 0 for greedy",
            )
        if self.top_k < 0:
            raise UserInputError(f"top_k must be at least 0, got {self.top_k}", remedy="use 0 to keep all")
        if not 0 < self.top_p <= 1:
            raise UserInputError(f"top_p must be in (0, 1], got {self.top_p}", remedy="use 1 to keep all")
        if not 0 <= self.min_p <= 1:
            raise UserInputError(f"min_p must be in [0, 1], got {self.min_p}", remedy="use 0 to keep all")

    @property
    def is_greedy(self) -> bool:
        """Whether no draw is needed."""
        return self.temperature == 0


# What a number decides. Plain sampling draws tokens only; speculation also draws drafts and whether they are
# accepted.
TOKEN_STREAM, DRAFT_STREAM, ACCEPT_STREAM = range(3)


def position_uniforms(
    seed: int, problem: int, sample: int, num_positions: int, *, stream: int = TOKEN_STREAM
) -> npt.NDArray[np.float64]:
    """Return the uniform numbers in [0, 1) that a sample draws at positions 0 .. num_positions - 1.

    Philox 4x64 (Salmon et al. 2011) with key (seed, problem) and a counter whose third word is the sample and
    whose fourth is the stream. Its raw output is the same in every numpy release, and a longer request begins
    with the shorter one.

    Raises:
        UserInputError: a key is not an unsigned 64-bit integer.
    """
    for name, value in (("seed", seed), ("problem", problem), ("sample", sample)):
        if not 0 <= value < _UINT64_BOUND:
            raise UserInputError(f"{name} must be in 0..2**64-1, got {value}", remedy="use a small integer")
    key = np.array([seed, problem], dtype=np.uint64)
    counter = np.array([0, 0, sample, stream], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(num_positions)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keep_top_k(logits_NV: Tensor, top_k: int) -> Tensor:
    """Return the logits with all but each row's `top_k` largest (and ties with the last) set to -inf."""
    if top_k >= logits_NV.shape[-1]:
        return logits_NV
    smallest_kept_N1 = logits_NV.topk(top_k, dim=-1).values[:, -1:]
    return logits_NV.masked_fill(logits_NV < smallest_kept_N1, -torch.inf)


def keep_top_p(logits_NV: Tensor, top_p: float) -> Tensor:
    """Set logits outside each row's nucleus of mass `top_p` to -inf; the most likely token always stays."""
    sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
    probability_NV = sorted_NV.softmax(dim=-1)
    mass_before_NV = probability_NV.cumsum(dim=-1) - probability_NV
    is_outside_NV = mass_before_NV >= top_p
    return logits_NV.masked_fill(is_outside_NV.scatter(-1, order_NV, is_outside_NV), -torch.inf)


def keep_min_p(logits_NV: Tensor, min_p: float) -> Tensor:
    """Return the logits with tokens less likely than `min_p` times each row's most likely one set to -inf."""
    return logits_NV.masked_fill(
        logits_NV < logits_NV.amax(dim=-1, keepdim=True) + math.log(min_p), -torch.inf
    )


def shape_logits(logits_NV: Tensor, settings: SamplingSettings) -> Tensor:
    """Return the logits whose softmax is the distribution that `settings` samples from.

    At least fp32. Not for greedy settings, whose distribution has no logits.
    """
    shaped_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    shaped_NV = shaped_NV / max(settings.temperature, _MIN_TEMPERATURE)
    if settings.top_k > 0:
        shaped_NV = keep_top_k(shaped_NV, settings.top_k)
    if settings.top_p < 1:
        shaped_NV = keep_top_p(shaped_NV, settings.top_p)
    if settings.min_p > 0:
        shaped_NV = keep_min_p(shaped_NV, settings.min_p)
    return shaped_NV


def draw_tokens(logits_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Return one token a row from softmax(logits) by inverting its cumulative distribution.

    Tokens are taken in vocabulary order and summed in float64, so that a token of probability 0 is never
    drawn.

    Args:
        logits_NV: finite or -inf, at least one finite a row.
        uniforms_N: numbers in [0, 1), float64.
    """
    return draw_from_weights(probabilities(logits_NV), uniforms_N).to(logits_NV.device)


def probabilities(logits: Tensor) -> Tensor:
    """Return softmax(logits) over the last dimension in float64."""
    # MPS has no float64.
    where = torch.device("cpu") if logits.device.type == "mps" else logits.device
    return logits.to(where, torch.float64).softmax(dim=-1)


def draw_from_weights(weights_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Return one token a row with probability in proportion to its weight.

    Args:
        weights_NV: at least 0, at least one above 0 a row, float64.
        uniforms_N: numbers in [0, 1), float64.
    """
    cumulative_NV = weights_NV.cumsum(dim=-1)
    total_N1 = cumulative_NV[:, -1:]
    # The product can round up to the total itself, beyond every token.
    target_N1 = torch.minimum(
        uniforms_N.to(weights_NV.device)[:, None] * total_N1, total_N1.nextafter(torch.zeros_like(total_N1))
    )
    return torch.searchsorted(cumulative_NV, target_N1, right=True)[:, 0]


def choose_tokens(logits_NV: Tensor, settings: SamplingSettings, uniforms_N: Tensor) -> Tensor:
    """Return the next token of every row: the most likely one, or a draw from the shaped distribution.

    Args:
        logits_NV: next-token logits.
        settings: temperature and filters.
        uniforms_N: from `position_uniforms`; not read when greedy.
    """
    if settings.is_greedy:
        return logits_NV.argmax(dim=-1)
    return draw_tokens(shape_logits(logits_NV, settings), uniforms_N)
