"""Whether two ways of greedy decoding say the same, and where they do not, how close a call it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.decoding.protocols import DecoderProtocol

NEAR_TIE = 1e-4
"""Logits closer than this may change places by the order in which sums are taken, in fp32."""


@dataclass(frozen=True, slots=True)
class GreedyComparison:
    """Rows of two decodings, told by their first difference.

    Attributes:
        num_identical: rows without one.
        near_ties: of rows that part where both tokens are within `NEAR_TIE` of the largest logit, or within
            two units of rounding where the logits have half precision: how far.
        mismatches: of all other rows that part: how far the smaller of both is from the largest logit.
    """

    num_identical: int
    near_ties: list[float]
    mismatches: list[float]


def compare_greedy(
    model: DecoderProtocol,
    prompts: Sequence[Sequence[int]],
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
) -> GreedyComparison:
    """Compare two greedy continuations of each prompt; the model's logits judge where they part."""
    num_identical = 0
    near_ties: list[float] = []
    mismatches: list[float] = []
    for prompt, one, other in zip(prompts, first, second, strict=True):
        differing = (
            position for position, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]
        )
        position = next(differing, None)
        if position is None:
            # A text that ends early without a different token has lost something.
            if len(one) == len(other):
                num_identical += 1
            else:
                mismatches.append(float("inf"))
            continue
        text = torch.tensor([[*prompt, *one[:position]]], device=model.device)
        with torch.inference_mode():
            logits_V = model(input_ids=text, use_cache=False).logits[0, -1]
        gap = float(logits_V.max().double() - logits_V[[one[position], other[position]]].min().double())
        (near_ties if gap < _tolerance(logits_V) else mismatches).append(gap)
    return GreedyComparison(num_identical, near_ties, mismatches)


def _tolerance(logits_V: Tensor) -> float:
    """Return the gap below which two logits may change places: of half precision, two units of rounding."""
    return max(NEAR_TIE, 2 * torch.finfo(logits_V.dtype).eps * float(logits_V.abs().max()))
