"""Rows of a batch, and what every way of advancing them has in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wmtp.decoding.counts import GenerationCounts
from wmtp.decoding.sampling import SamplingSettings, position_uniforms


@dataclass(slots=True)
class Row:
    """A prompt being continued.

    Attributes:
        index: of the prompt among all.
        prompt_ids: its tokens, at least one.
        key: (problem, sample), which its draws depend on.
        max_new_tokens: its budget.
        token_ids: its new tokens so far.
    """

    index: int
    prompt_ids: Sequence[int]
    key: tuple[int, int]
    max_new_tokens: int
    token_ids: list[int]


class Batch(Protocol):
    """Rows that run together.

    Attributes:
        num_forwards: how often the model has run.
    """

    num_forwards: int

    def advance(self) -> list[list[int]]:
        """Run the model; returns each row's new tokens, at least one, those beyond its budget included."""
        ...

    def keep(self, running: Sequence[int]) -> None:
        """Go on with the rows at these positions."""
        ...

    def count(self, num_tokens: int, counts: GenerationCounts) -> None:
        """Add the tokens that a row takes over from the last `advance`."""
        ...


def draw_uniforms(
    rows: Sequence[Row],
    settings: SamplingSettings,
    seed: int,
    num_positions: int,
    *,
    streams: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Return the numbers that rows draw, [B, streams, positions], float64; of greedy ones nothing is read."""
    if settings.is_greedy:
        return torch.empty(len(rows), len(streams), num_positions, device=device)
    numbers = [
        [position_uniforms(seed, *row.key, num_positions, stream=stream) for stream in streams]
        for row in rows
    ]
    uniforms = torch.from_numpy(np.array(numbers))
    # MPS has no float64; draws are made on the CPU there.
    return uniforms if device.type == "mps" else uniforms.to(device)
