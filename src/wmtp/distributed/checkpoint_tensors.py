"""Groups of named tensors, with tied tensors told apart from equal ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

TensorGroup = dict[str, Tensor]


def find_aliases(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, str]]:
    """Which names mean one tensor: group -> name -> the name under which the same memory is stored.

    Tied embeddings are the usual case; two names for one tensor come back as one tensor.
    """
    aliases: dict[str, dict[str, str]] = {}
    for group, tensors in groups.items():
        aliases[group] = {}
        first_name: dict[tuple[object, ...], str] = {}
        for name in sorted(tensors):
            identity = _identity(tensors[name].detach())
            if identity is not None and first_name.setdefault(identity, name) != name:
                aliases[group][name] = first_name[identity]
    return aliases


def flatten_groups(
    groups: Mapping[str, Mapping[str, Tensor]], aliases: Mapping[str, Mapping[str, str]]
) -> TensorGroup:
    """All tensors as `<group>/<name>`, without the aliases."""
    return {
        f"{group}/{name}": tensors[name].detach()
        for group, tensors in groups.items()
        for name in sorted(tensors)
        if name not in aliases[group]
    }


def copy_to_host(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, TensorGroup]:
    """A copy of all tensors in host memory, out of reach of training; tied ones are copied once."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    try:
        copies = stager.stage({group: dict(tensors) for group, tensors in groups.items()})
    finally:
        stager.close()
    assert isinstance(copies, dict)  # a Future only where staging is asynchronous
    return copies


def _identity(tensor: Tensor) -> tuple[object, ...] | None:
    """What two names of one tensor have in common; None for a tensor without memory."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.numel():
        return None
    return (local.device, local.dtype, local.data_ptr(), tuple(local.shape), tuple(local.stride()))
