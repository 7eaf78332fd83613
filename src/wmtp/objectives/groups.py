"""Masked reductions over groups of tokens: the whole step, each document, or the heads of each position.

The weight pipeline is one piece of mathematics applied to different groups. Here is what differs: how a group
is reduced to one number and how that number gets back to its members. No function here waits for the device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from wmtp.exceptions import UserInputError


class Groups(Protocol):
    """Reductions over groups of members of one tensor. The caller neutralises invalid members."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum of each group."""
        ...

    def max(self, values: Tensor) -> Tensor:
        """Largest value of each group."""
        ...

    def expand(self, per_group: Tensor) -> Tensor:
        """Each member's group value, broadcastable to the tensor's shape."""
        ...


class LastDimGroups:
    """Members along the last dimension are one group: [..., K] with one group for each leading index."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum of each group, [..., 1]."""
        return values.sum(dim=-1, keepdim=True)

    def max(self, values: Tensor) -> Tensor:
        """Largest value of each group, [..., 1]."""
        return values.amax(dim=-1, keepdim=True)

    def expand(self, per_group: Tensor) -> Tensor:
        """The group value, [..., 1], which broadcasts over the members."""
        return per_group


class DocumentGroups:
    """The tokens of each packed document are one group: [B, S] tensors.

    Args:
        document_ids_BS: [B, S] integers; a document is a run of equal ids within a row.
    """

    def __init__(self, document_ids_BS: Tensor) -> None:
        is_first_BS = torch.ones_like(document_ids_BS, dtype=torch.bool)
        is_first_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
        self._index_N = is_first_BS.flatten().cumsum(0) - 1
        # at most one document a token: a bound that is known without asking the device
        self._num_groups = document_ids_BS.numel()
        self._shape = document_ids_BS.shape

    def sum(self, values: Tensor) -> Tensor:
        """Sum of each document."""
        return values.new_zeros(self._num_groups).index_add(0, self._index_N, values.flatten())

    def max(self, values: Tensor) -> Tensor:
        """Largest value of each document; -inf for the unused groups at the end."""
        lowest = values.new_full((self._num_groups,), -torch.inf)
        return lowest.scatter_reduce(0, self._index_N, values.flatten(), "amax")

    def expand(self, per_group: Tensor) -> Tensor:
        """Each token's document value, [B, S]."""
        return per_group[self._index_N].reshape(self._shape)


def as_float64(values: Tensor) -> Tensor:
    """A detached float64 copy; on the CPU where the device (Apple's MPS) has no float64."""
    device = "cpu" if values.device.type == "mps" else values.device
    return values.detach().to(device=device, dtype=torch.float64)


def masked_scores(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 scores with 0 on invalid entries (whatever stood there, even NaN), and the mask beside them.

    Raises:
        UserInputError: shapes that differ.
    """
    if scores.shape != valid.shape:
        raise UserInputError(f"scores {tuple(scores.shape)} and valid {tuple(valid.shape)} differ in shape")
    wide = as_float64(scores)
    mask = valid.to(device=wide.device, dtype=torch.bool)
    return torch.where(mask, wide, 0.0), mask


def as_one_group(scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """`masked_scores` as one row of `LastDimGroups`: [1, N] each, whatever the shape."""
    masked, mask = masked_scores(scores, valid)
    return masked.reshape(1, -1), mask.reshape(1, -1)


def max_over(groups: Groups, values: Tensor, valid: Tensor) -> Tensor:
    """Largest valid value of each group; 0 for a group without valid members."""
    largest = groups.max(torch.where(valid, values, -torch.inf))
    return torch.where(largest.isneginf(), 0.0, largest)


def min_over(groups: Groups, values: Tensor, valid: Tensor) -> Tensor:
    """Smallest valid value of each group; 0 for a group without valid members."""
    return -max_over(groups, -values, valid)


def count_over(groups: Groups, valid: Tensor) -> Tensor:
    """Number of valid members of each group, at least 1 so that it can be divided by; float64."""
    return groups.sum(valid.to(torch.float64)).clamp(min=1)
