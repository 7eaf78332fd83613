"""What ranks that work together must agree on; with one process everything is as that one has it."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from wmtp.exceptions import CheckpointError

ValueT = TypeVar("ValueT")


def is_distributed() -> bool:
    """Whether this process is one of several, or of what could be several."""
    return dist.is_available() and dist.is_initialized()


def rank_in(process_group: dist.ProcessGroup | None) -> int:
    """This process's number in a group; 0 for a process alone. None is the default group."""
    return dist.get_rank(process_group) if is_distributed() else 0


def agree(value: ValueT, process_group: dist.ProcessGroup | None) -> ValueT:
    """Rank 0's value, on every rank."""
    if not is_distributed():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, group=process_group, group_src=0)
    return shared[0]


def raise_together(failure: BaseException | None, uri: str, process_group: dist.ProcessGroup | None) -> None:
    """Raise on every rank what the first rank that failed ran into; return where none did.

    Args:
        failure: of this rank.
        uri: the checkpoint that was to be written, for errors of the file system.
        process_group: the ranks; every one of them calls this.

    Raises:
        CheckpointError: the file system refused something.
    """
    failures = [failure]
    if is_distributed():
        failures = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(failures, failure, group=process_group)
    first = next((found for found in failures if found is not None), None)
    if isinstance(first, OSError):
        raise CheckpointError(
            f"The checkpoint {uri} could not be saved: {first}",
            remedy="Check free space and permissions there; earlier checkpoints are untouched.",
        ) from first
    if first is not None:
        raise first
