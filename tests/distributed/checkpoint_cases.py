"""Checkpoints to damage, and what must be said of them, for any store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from wmtp.distributed.checkpoint import find_latest_valid, save_checkpoint
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.checkpoint_store import StepStore
from wmtp.exceptions import CheckpointError

FILES = ("manifest.json", "index.json", "state.json", "model.safetensors", "rng.safetensors")


def tensors(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    """Two groups, one of them with tied names and a scalar."""
    weight = torch.full((3, 5), value)
    return {
        "model": {"w": weight, "w_tied": weight, "b": torch.arange(4), "step": torch.tensor(value)},
        "rng": {"torch": torch.arange(9, dtype=torch.uint8)},
    }


def save(store: StepStore, step: int, **options: object) -> Checkpoint:
    """Save the state of a step, whose tensors and JSON hold its number."""
    info = save_checkpoint(store, step, tensors=tensors(float(step)), state={"n": step}, **options)  # type: ignore[arg-type]
    return Checkpoint(store, info.name)


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The content with one byte flipped, cut or added, at its ends, in its middle, its header, its blanks."""
    size = len(content)
    header = int.from_bytes(content[:8], "little") + 8 if size > 8 else 0
    places = {0, 1, 7, 8, size // 3, size // 2, size - 2, size - 1, header - 1, header}
    for blank in (b" ", b"\n", b":", b'"'):
        places |= {content.find(blank), content.rfind(blank)}
    for place in sorted(place for place in places if 0 <= place < size):
        flipped = bytes([content[place] ^ (1 << place % 8)])
        yield f"flipped at {place}", content[:place] + flipped + content[place + 1 :]
    for place in (0, size // 2, size - 1):
        yield f"cut at {place}", content[:place] + content[place + 1 :]
    yield "emptied", b""
    yield "lengthened", content + b"\n"


def use(store: StepStore, name: str) -> None:
    """Read everything of a checkpoint, in both ways; returns only if nothing was found wrong."""
    checkpoint = Checkpoint(store, name)
    assert checkpoint.state == {"n": checkpoint.info.step}
    for group in checkpoint.groups:
        checkpoint.read(group)
    checkpoint.load_into(tensors(-1.0))


def assert_found(store: StepStore, name: str, file: str, damage: str) -> None:
    """A damaged file is named by whoever looks for a checkpoint and by whoever uses this one."""
    found, skipped = find_latest_valid(store)
    assert found is None or found.name != name, damage
    assert file in dict(skipped)[name], damage
    with pytest.raises(CheckpointError) as caught:
        use(store, name)
    assert file in caught.value.message, damage
    assert store.uri(name) in caught.value.message, damage
    assert caught.value.remedy, damage
