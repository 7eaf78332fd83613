"""Checkpoints of several ranks: real processes on loopback, parameters sharded with FSDP2 on the CPU."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from wmtp.distributed.checkpoint import Retention, find_latest_valid, save_checkpoint
from wmtp.distributed.checkpoint_optimizer import (
    flatten_optimizer_state,
    make_optimizer_tensor,
    restore_optimizer_state,
)
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.checkpoint_saver import CheckpointSaver, SaveRequest
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.exceptions import CheckpointError

pytestmark = pytest.mark.distributed

_TIMEOUT_S = 60.0


class _Tied(nn.Module):
    """Sides that do not divide by 2 or 4, parameters of 3 rows (rank 3 of 4 has none), tied ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.small = nn.Linear(6, 3)
        self.back = nn.Linear(3, 6)
        self.unembed = nn.Linear(6, 11, bias=False)
        self.unembed.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(7))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        logits: Tensor = self.unembed(hidden + self.back(self.small(hidden)))
        return logits


def _build(num_ranks: int, seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = _Tied()
    if num_ranks > 1:
        mesh = init_device_mesh("cpu", (num_ranks,))
        fully_shard(model.small, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        tokens = torch.randint(11, (4, 5), generator=generator)
        model(tokens).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    moments, state = flatten_optimizer_state(optimizer, model.named_parameters())
    random = {f"{dist.get_rank() if dist.is_initialized() else 0}.cpu": torch.get_rng_state()}
    return {"model": model.state_dict(), "optimizer": moments, "rng": random}, {"optimizer": state}


def _full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on every rank, as copies."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def _save(rank: int, num_ranks: int, run: Path, is_async: bool) -> None:
    model, optimizer = _build(num_ranks, seed=1)
    _train(model, optimizer)
    groups, state = _groups(model, optimizer)
    expected = {group: _full(groups[group]) for group in ("model", "optimizer")}
    saver = CheckpointSaver(LocalStore(run), Retention(), is_async=is_async)
    saver.save(SaveRequest(3, groups, state))
    # What is trained from here on must not be in it.
    _train(model, optimizer)
    saver.wait()
    assert saver.latest is not None
    assert saver.latest.step == 3
    saver.close()
    if rank == 0:
        torch.save(expected, run / "expected.pt")


def _load(rank: int, num_ranks: int, run: Path) -> None:
    expected = torch.load(run / "expected.pt", weights_only=True)
    model, optimizer = _build(num_ranks, seed=2)
    checkpoint, skipped = find_latest_valid(LocalStore(run))
    assert checkpoint is not None
    assert skipped == []
    checkpoint.load_into({"model": model.state_dict()})
    named = dict(model.named_parameters())
    moments = checkpoint.read("optimizer", make=make_optimizer_tensor(named))
    restore_optimizer_state(optimizer, named.items(), moments, checkpoint.state["optimizer"])
    groups, _ = _groups(model, optimizer)
    for group in ("model", "optimizer"):
        found = _full(groups[group])
        assert found.keys() == expected[group].keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[group][name]), name
    if num_ranks > 1:
        slots = optimizer.state[named["embed.weight"]]
        assert isinstance(slots["exp_avg"], DTensor)
        assert slots["exp_avg"].placements == named["embed.weight"].placements
    assert named["embed.weight"] is model.unembed.weight
    _train(model, optimizer)


@pytest.mark.parametrize(
    ("num_saving", "num_loading", "is_async"),
    [
        (2, 1, False),
        (1, 2, True),
        pytest.param(2, 4, True, marks=pytest.mark.slow),
        pytest.param(4, 1, False, marks=pytest.mark.slow),
        pytest.param(4, 2, True, marks=pytest.mark.slow),
        pytest.param(4, 4, False, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_the_same_at_any_number_of_ranks(
    tmp_path: Path, num_saving: int, num_loading: int, is_async: bool
) -> None:
    run = tmp_path / "run"
    _run(num_saving, _save, run, is_async)
    step = run / "step-3"
    index = json.loads((step / "index.json").read_text())
    chunks = index["tensors"]["model/embed.weight"]["chunks"]
    assert len(chunks) == num_saving
    assert index["aliases"]["model"] == {"unembed.weight": "embed.weight"}
    # What all ranks have is written by one of them.
    assert len(index["tensors"]["model/count"]["chunks"]) == 1
    assert len(index["tensors"]["optimizer/embed.weight:step"]["chunks"]) == 1
    assert {name for name in index["tensors"] if name.startswith("rng/")} == {
        f"rng/{rank}.cpu" for rank in range(num_saving)
    }
    weights = sum(path.stat().st_size for path in step.glob("model*.safetensors"))
    num_bytes = 4 * (11 * 6 + 6 * 3 + 3 + 3 * 6 + 6) + 8
    assert num_bytes < weights < num_bytes + 1200 * num_saving
    assert not list(run.glob("*.tmp-*"))
    _run(num_loading, _load, run)


class _FailingStore(LocalStore):
    """A disk that is full for one rank, at one point of a save."""

    def __init__(self, run: Path, where: str) -> None:
        super().__init__(run)
        self._where = where

    def draft(self, name: str, draft_id: str) -> Any:
        if self._where == "draft":
            raise OSError(28, "No space left on device")
        draft = super().draft(name, draft_id)
        if self._where in ("create", "commit"):

            def fail(*_: object) -> Any:
                raise OSError(28, "No space left on device")

            setattr(draft, self._where, fail)
        return draft

    def only_writer(self) -> Any:
        if self._where == "lock":
            raise CheckpointError("No space left for the lock")
        return super().only_writer()

    def point_latest(self, name: str) -> None:
        if self._where == "latest":
            raise OSError(28, "No space left on device")
        super().point_latest(name)


def _fail(rank: int, num_ranks: int, run: Path, failing: int, where: str) -> None:
    tensors = {"model": {"shared": torch.arange(5), f"own{rank}": torch.full((3,), rank)}}
    save_checkpoint(LocalStore(run), 1, tensors=tensors, state={})
    store = _FailingStore(run, where) if rank == failing else LocalStore(run)
    state = {"bad": (1, 2)} if where == "state" and rank == failing else {}
    with pytest.raises((CheckpointError, TypeError)) as caught:
        save_checkpoint(store, 2, tensors=tensors, state=state)
    assert "No space left" in str(caught.value) or "state" in str(caught.value)
    dist.barrier()
    assert sorted(path.name for path in run.iterdir()) == [".checkpoint.lock", "latest", "step-1"]
    # The ranks are in step, and the next save goes well.
    info = save_checkpoint(LocalStore(run), 3, tensors=tensors, state={})
    read = Checkpoint(LocalStore(run), info.name).read("model")
    assert torch.equal(read[f"own{num_ranks - 1}"], torch.full((3,), num_ranks - 1))


def _fail_everywhere(rank: int, num_ranks: int, run: Path) -> None:
    for where, failing in (
        ("create", 1),
        ("draft", 1),
        ("draft", 0),
        ("state", 1),
        ("create", 0),
        ("commit", 0),
        ("lock", 0),
    ):
        case = run / f"{where}-{failing}"
        _fail(rank, num_ranks, case, failing, where)
        dist.barrier()


def test_a_rank_that_fails_makes_the_save_fail_on_every_rank_and_leaves_nothing(tmp_path: Path) -> None:
    _run(2, _fail_everywhere, tmp_path)


def _fail_to_tidy(rank: int, num_ranks: int, run: Path) -> None:
    tensors = {"model": {"x": torch.ones(2)}}
    info = save_checkpoint(_FailingStore(run, "latest"), 1, tensors=tensors, state={})
    assert info.step == 1
    saver = CheckpointSaver(_FailingStore(run, "commit"), Retention(), is_async=True)
    saver.save(SaveRequest(2, tensors, {}))
    with pytest.raises(CheckpointError, match="No space left"):
        saver.wait()
    saver.store = LocalStore(run)
    saver.save(SaveRequest(3, tensors, {}))
    saver.close()
    assert saver.latest is not None
    assert saver.latest.name == "step-3"


def test_a_failure_after_the_commit_or_beside_training_leaves_the_ranks_in_step(tmp_path: Path) -> None:
    _run(2, _fail_to_tidy, tmp_path / "run")


# ------------------------------------------------------------------------------------------ processes


def _run(num_ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, num_ranks, *arguments)` in as many processes; with one, in this one."""
    run = arguments[0]
    run.mkdir(parents=True, exist_ok=True)
    if num_ranks == 1:
        work(0, 1, *arguments)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # New processes as with "spawn", but torch is imported once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    failures = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, num_ranks, port, failures, work, arguments))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(2 * _TIMEOUT_S)
        assert failures.empty(), failures.get()
        assert [process.exitcode for process in processes] == [0] * num_ranks
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _rank(
    rank: int, num_ranks: int, port: int, failures: Any, work: Callable[..., None], arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    try:
        work(rank, num_ranks, *arguments)
        dist.barrier()
    except BaseException:
        failures.put(f"rank {rank} of {num_ranks}:\n{traceback.format_exc()}")
        raise
    dist.destroy_process_group()
