"""Saving beside training, and somewhere else while the store is away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from wmtp.distributed.checkpoint import Retention, find_latest_valid, list_checkpoints
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.checkpoint_saver import CheckpointSaver, SaveRequest
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.distributed.checkpoint_tensors import copy_to_host
from wmtp.exceptions import CheckpointError, StorageUnavailableError


class _HeldStore(LocalStore):
    """A slow disk: a file is written when it is let go; or one that fails."""

    def __init__(self, run: Path) -> None:
        super().__init__(run)
        self.go_on = threading.Event()
        self.failure: Exception | None = None
        self.num_drafts = 0

    def draft(self, name: str, draft_id: str) -> Any:
        self.num_drafts += 1
        assert self.go_on.wait(20)
        if self.failure is not None:
            raise self.failure
        return super().draft(name, draft_id)


@contextmanager
def _saver(store: LocalStore, **options: Any) -> Iterator[CheckpointSaver]:
    saver = CheckpointSaver(store, Retention(), is_async=True, **options)
    try:
        yield saver
    finally:
        saver.close()


def _request(step: int, value: float, state: dict[str, Any] | None = None) -> SaveRequest:
    weight = torch.full((4, 3), value)
    return SaveRequest(step, {"model": {"w": weight, "tied": weight}}, state or {})


def test_an_asynchronous_save_holds_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    store = _HeldStore(tmp_path)
    weight = torch.full((4, 3), 1.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(weight)], lr=1.0)
    state = {"position": {"order": [1, 2, 3]}, "n": 1}
    with _saver(store) as saver:
        tensors = {"model": {"w": weight, "tied": weight, "row": weight[1], "turned": weight.T}}
        saver.save(SaveRequest(1, tensors, state))
        assert saver.latest is None
        optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 3)
        optimizer.step()
        weight.mul_(-7)
        state["position"]["order"].append(4)
        state["n"] = 2
        tensors["model"]["late"] = torch.ones(1)
        store.go_on.set()
        saver.wait()
    checkpoint, _ = find_latest_valid(store)
    assert checkpoint is not None
    assert saver.latest == checkpoint.info
    read = checkpoint.read("model")
    assert read.keys() == {"w", "tied", "row", "turned"}
    assert all(bool((tensor == 1).all()) for tensor in read.values())
    assert read["w"] is read["tied"]
    assert checkpoint.state == {"position": {"order": [1, 2, 3]}, "n": 1}


def test_one_copy_is_made_of_memory_that_several_tensors_share() -> None:
    buffer = torch.randn(64, 64)
    group = {"whole": buffer, "tied": buffer, "row": buffer[3], "turned": buffer.T}
    copies = copy_to_host({"a": group, "b": {"whole": buffer}})
    assert len({tensor.untyped_storage().data_ptr() for g in copies.values() for tensor in g.values()}) == 1
    assert copies["a"]["whole"].data_ptr() == copies["a"]["tied"].data_ptr() != buffer.data_ptr()
    for name, tensor in group.items():
        assert torch.equal(copies["a"][name], tensor)
        assert copies["a"][name].stride() == tensor.stride()


def test_a_save_waits_for_the_one_before_it(tmp_path: Path) -> None:
    store = _HeldStore(tmp_path)
    with _saver(store) as saver:
        saver.save(_request(1, 1.0))
        second = threading.Thread(target=saver.save, args=(_request(2, 2.0),))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert store.num_drafts == 1
        store.go_on.set()
        second.join(20)
        saver.wait()
    assert [info.step for info in list_checkpoints(store)] == [1, 2]
    assert saver.latest is not None
    assert saver.latest.step == 2


@pytest.mark.parametrize("how", ["raise_if_failed", "save", "wait"])
def test_a_failed_save_is_raised_once_by_whatever_comes_next(tmp_path: Path, how: str) -> None:
    store = _HeldStore(tmp_path)
    store.failure = OSError(28, "No space left on device")
    with _saver(store) as saver:
        saver.save(_request(1, 1.0))
        saver.raise_if_failed()
        store.go_on.set()
        assert saver._pending is not None
        saver._pending.exception(20)
        with pytest.raises(CheckpointError, match="No space left"):
            saver.save(_request(2, 2.0)) if how == "save" else getattr(saver, how)()
        store.failure = None
        saver.raise_if_failed()
        saver.save(_request(3, 3.0))
        saver.wait()
    assert [info.step for info in list_checkpoints(store)] == [3]


def test_the_error_of_the_last_save_is_in_the_log_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = _HeldStore(tmp_path)
    store.failure = OSError(28, "No space left on device")
    store.go_on.set()
    saver = CheckpointSaver(store, Retention(), is_async=True)
    saver.save(_request(1, 1.0))
    with caplog.at_level(logging.ERROR):
        saver.close()
    assert "the last checkpoint was not saved" in caplog.text
    assert "No space left" in caplog.text


def test_a_state_that_json_would_change_fails_beside_training_too(tmp_path: Path) -> None:
    with _saver(LocalStore(tmp_path)) as saver:
        saver.save(_request(1, 1.0, {"x": (1, 2)}))
        with pytest.raises(TypeError, match="state"):
            saver.wait()


# ------------------------------------------------------------------------------------------ fallback


class _AwayStore(LocalStore):
    """Stands for a store that cannot be reached while `is_away`."""

    is_away = False

    def folders(self) -> Any:
        if self.is_away:
            raise StorageUnavailableError("s3://runs is away", remedy="wait")
        return super().folders()

    def draft(self, name: str, draft_id: str) -> Any:
        if self.is_away:
            raise StorageUnavailableError("s3://runs is away", remedy="wait")
        return super().draft(name, draft_id)


def _stores(tmp_path: Path) -> tuple[_AwayStore, LocalStore]:
    return _AwayStore(tmp_path / "store"), LocalStore(tmp_path / "fallback")


@pytest.mark.parametrize("is_async", [False, True])
def test_what_went_elsewhere_is_brought_back_in_its_place_in_the_order(
    tmp_path: Path, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), is_async=is_async, fallback=fallback)
    for step, is_away in ((1, False), (2, True), (3, True), (4, False), (5, False)):
        store.is_away = is_away
        saver.save(_request(step, float(step)))
        saver.wait()
        assert saver.latest is not None
        assert (saver.latest.step, saver.latest.sequence) == (step, step)
        assert saver.latest.uri == (fallback if is_away else store).uri(f"step-{step}")
    assert [(info.step, info.sequence) for info in list_checkpoints(store)] == [(n, n) for n in range(1, 6)]
    assert list_checkpoints(fallback) == []
    assert all(Checkpoint(store, f"step-{n}").problems() == [] for n in range(1, 6))
    for told in ("step 2 was saved to", "step 3 was saved to", "step 2 was brought from"):
        assert caplog.text.count(told) == 1
    saver.close()


def test_without_somewhere_else_the_error_comes_out(tmp_path: Path) -> None:
    store, _ = _stores(tmp_path)
    store.is_away = True
    saver = CheckpointSaver(store, Retention())
    with pytest.raises(StorageUnavailableError, match="away"):
        saver.save(_request(1, 1.0))


def test_a_damaged_one_elsewhere_stays_there_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), fallback=fallback)
    store.is_away = True
    saver.save(_request(1, 1.0))
    saver.save(_request(2, 2.0))
    (tmp_path / "fallback/step-1/state.json").write_text("[]")
    store.is_away = False
    saver.save(_request(3, 3.0))
    assert [info.step for info in list_checkpoints(store)] == [2, 3]
    assert "step-1 is damaged" in caplog.text
    assert (tmp_path / "fallback/step-1").is_dir()


def test_a_later_save_of_the_same_step_is_not_overwritten(tmp_path: Path) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), fallback=fallback)
    store.is_away = True
    saver.save(_request(1, 1.0))
    store.is_away = False
    # Another machine, without this fallback folder, has gone on meanwhile.
    other = CheckpointSaver(store, Retention())
    for value in (5.0, 6.0):
        other.save(_request(1, value))
    saver.save(_request(2, 2.0))
    assert float(Checkpoint(store, "step-1").read("model")["w"][0, 0]) == 6.0
    assert [(info.step, info.sequence) for info in list_checkpoints(store)] == [(1, 2), (2, 3)]


def test_a_resumed_run_counts_on_from_what_it_resumed(tmp_path: Path) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), fallback=fallback)
    saver.save(_request(1, 1.0))
    store.is_away = True
    saver.save(_request(2, 2.0))
    resumed = CheckpointSaver(store, Retention(), fallback=fallback)
    resumed.latest = Checkpoint(fallback, "step-2").info
    resumed.save(_request(3, 3.0))
    store.is_away = False
    resumed.save(_request(4, 4.0))
    assert [(info.step, info.sequence) for info in list_checkpoints(store)] == [(n, n) for n in range(1, 5)]
