"""Whether two ways of greedy decoding say the same, and where they do not, how close a call it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wmtp.decoding.protocols import DecoderProtocol

NEAR_TIE = 1e-4
"""Logits closer than this may change places by the order in which sums are taken, in fp32."""


@dataclass(frozen=True, slots=True)
class GreedyComparison:
    """Rows of two decodings, told by their first difference.

    Attributes:
        num_identical: rows without one.
        near_ties: of rows that part where both tokens are within `NEAR_TIE` of the largest logit: how far.
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
            logits_V = model(input_ids=text, use_cache=False).logits[0, -1].double()
        gap = float(logits_V.max() - logits_V[[one[position], other[position]]].min())
        (near_ties if gap < NEAR_TIE else mismatches).append(gap)
    return GreedyComparison(num_identical, near_ties, mismatches)
