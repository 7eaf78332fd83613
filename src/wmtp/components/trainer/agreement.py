"""What all ranks must do at the same step: the largest wish of any of them counts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether several ranks train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number among them; 0 where there is one process."""
    return dist.get_rank() if is_distributed() else 0


def any_rank(flag: Tensor) -> Tensor:
    """A flag (0 or 1) that is set where any rank has set it; on the device, the host does not wait."""
    if is_distributed():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


class RankAgreement:
    """Agrees on small numbers of the host, by one collective among the processors, not the accelerators.

    Made by all ranks at the same moment: it opens a group of its own, so that the host neither waits for an
    accelerator nor needs one.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if is_distributed() else None

    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest of each number over all ranks."""
        if self._group is None:
            return values
        shared = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group)
        return tuple(shared.tolist())
