"""Groups of named tensors, with tied tensors told apart from equal ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

TensorGroup = dict[str, Tensor]


def split_aliases(
    groups: Mapping[str, Mapping[str, Tensor]],
) -> tuple[TensorGroup, dict[str, dict[str, str]]]:
    """Flatten groups to `<group>/<name>`, keeping one name of each tensor.

    Returns:
        `(tensors, aliases)`: aliases are group -> name -> the name under which the same memory is stored.
        Tied embeddings are the usual case; two names for one tensor come back as one tensor.
    """
    flat: TensorGroup = {}
    aliases: dict[str, dict[str, str]] = {}
    for group, tensors in groups.items():
        aliases[group] = {}
        first_name: dict[tuple[object, ...], str] = {}
        for name in sorted(tensors):
            tensor = tensors[name].detach()
            identity = _identity(tensor)
            if tensor.numel() and identity in first_name:
                aliases[group][name] = first_name[identity]
                continue
            first_name[identity] = name
            flat[f"{group}/{name}"] = tensor
    return flat, aliases


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


def _identity(tensor: Tensor) -> tuple[object, ...]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.numel():
        return (id(tensor),)
    return (local.device, local.dtype, local.data_ptr(), tuple(local.shape), tuple(local.stride()))
