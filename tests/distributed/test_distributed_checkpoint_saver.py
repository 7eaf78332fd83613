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

from wmtp.distributed.checkpoint import (
    Retention,
    copy_checkpoint,
    find_latest_valid,
    list_checkpoints,
)
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.checkpoint_saver import CheckpointSaver, SaveRequest
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.distributed.checkpoint_tensors import copy_to_host
from wmtp.exceptions import (
    CheckpointError,
    StorageConflictError,
    StorageCredentialsError,
    StorageDamagedError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageMissingError,
    StorageUnavailableError,
)


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
    """Stands for a store that does not take what it is given while `is_away`; counts the requests."""

    def __init__(self, run: Path) -> None:
        super().__init__(run)
        self.is_away = False
        self.refusal: Exception = StorageUnavailableError("s3://runs is away", remedy="wait")
        self.num_asked = 0

    def _ask(self) -> None:
        if self.is_away:
            self.num_asked += 1
            raise self.refusal

    def folders(self) -> Any:
        self._ask()
        return super().folders()

    def draft(self, name: str, draft_id: str) -> Any:
        self._ask()
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
    # Each where it is, and where it came to be; the last one of each step is where it is now.
    places = [(2, fallback), (3, fallback), (4, fallback), (2, store), (3, store), (4, store), (5, store)]
    expected = [str(place.run_dir / f"step-{step}") for step, place in ((1, store), *places)]
    assert [info.uri for info in saver.take_committed()] == expected
    assert saver.take_committed() == []
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


@pytest.mark.parametrize("is_async", [False, True])
def test_a_store_that_was_away_is_asked_after_the_checkpoint_is_safe(tmp_path: Path, is_async: bool) -> None:
    store, fallback = _stores(tmp_path)
    asked: list[list[int]] = []
    is_back = False

    def is_reachable() -> bool:
        asked.append([info.step for info in list_checkpoints(fallback)])
        return is_back

    saver = CheckpointSaver(
        store, Retention(), is_async=is_async, fallback=fallback, is_reachable=is_reachable
    )
    store.is_away = True
    for step in (1, 2, 3):
        saver.save(_request(step, float(step)))
        saver.wait()
        assert store.num_asked == 1, "one deadline for a whole outage"
    assert asked == [[1, 2], [1, 2, 3]]
    store.is_away, is_back = False, True
    saver.save(_request(4, 4.0))
    saver.wait()
    assert asked[2] == [1, 2, 3, 4]
    assert [(info.step, info.sequence) for info in list_checkpoints(store)] == [(n, n) for n in range(1, 5)]
    saver.save(_request(5, 5.0))
    saver.wait()
    assert len(asked) == 3, "a store that is there is not asked"
    saver.close()


@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_checkpoint_needs_is_brought_first_and_by_the_thread_that_saves(
    tmp_path: Path, is_async: bool
) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), is_async=is_async, fallback=fallback)
    calls: list[tuple[bool, list[int]]] = []

    def before() -> None:
        on_this_thread = threading.current_thread() is threading.main_thread()
        calls.append((on_this_thread, [info.step for info in list_checkpoints(store)]))

    for step, is_away in ((1, False), (2, True), (3, False)):
        store.is_away = is_away
        tensors = _request(step, 1.0).tensors
        saver.save(SaveRequest(step, tensors, {}, before=before if not is_away else _unavailable))
        saver.wait()
    # Before step 1, and before 2 and 3 are brought to the store.
    assert calls == [(not is_async, []), (not is_async, [1])]
    saver.close()


def _unavailable() -> None:
    raise StorageUnavailableError("s3://runs/metrics.jsonl is away", remedy="wait")


def _denied() -> None:
    raise StorageDeniedError("s3://runs/metrics.jsonl: no", remedy="check")


def test_a_store_that_does_not_take_what_comes_first_is_not_waited_for_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), fallback=fallback)
    store.is_away = True
    request = _request(1, 1.0)
    saver.save(SaveRequest(1, request.tensors, {}, before=_unavailable))
    assert store.num_asked == 0
    assert [info.step for info in list_checkpoints(fallback)] == [1]
    assert "metrics.jsonl is away (wait); step 1 was saved to" in caplog.text


@pytest.mark.parametrize(
    ("before", "has_fallback"), [(_unavailable, False), (_denied, False), (_denied, True)]
)
def test_what_could_not_be_brought_first_is_a_warning_where_the_store_takes_the_checkpoint(
    tmp_path: Path, before: Any, has_fallback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), fallback=fallback if has_fallback else None)
    saver.save(SaveRequest(1, _request(1, 1.0).tensors, {}, before=before))
    assert [info.step for info in list_checkpoints(store)] == [1]
    assert "was not copied: s3://runs/metrics.jsonl" in caplog.text


@pytest.mark.parametrize(
    "kind", [StorageCredentialsError, StorageDeniedError, StorageFullError, StorageMissingError, StorageError]
)
def test_a_store_that_refuses_sends_checkpoints_elsewhere_too_and_says_why(
    tmp_path: Path, kind: type[StorageError], caplog: pytest.LogCaptureFixture
) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), fallback=fallback)
    store.is_away, store.refusal = True, kind("the token has expired", remedy="get a new one")
    for step in (1, 2):
        saver.save(_request(step, 1.0))
        assert f"the token has expired (get a new one); step {step} was saved to" in caplog.text
    store.is_away = False
    saver.save(_request(3, 3.0))
    assert [info.step for info in list_checkpoints(store)] == [1, 2, 3]


@pytest.mark.parametrize(
    "refusal",
    [
        CheckpointError("Another process has taken over", remedy="stop"),
        StorageConflictError("another writer was first"),
        StorageDamagedError("other bytes"),
    ],
)
@pytest.mark.parametrize("is_late", [False, True])
def test_another_writer_ends_the_run_and_nothing_goes_elsewhere(
    tmp_path: Path, refusal: Exception, is_late: bool
) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), fallback=fallback)
    store.is_away = True
    if is_late:
        saver.save(_request(1, 1.0))
    store.refusal = refusal
    if is_late and isinstance(refusal, StorageDamagedError):
        # What is in the fallback is whole: it stays there.
        saver.save(_request(2, 1.0))
        assert [info.step for info in list_checkpoints(fallback)] == [1, 2]
        return
    with pytest.raises(type(refusal), match=str(refusal.args[0])):
        saver.save(_request(2, 1.0))
    assert [info.step for info in list_checkpoints(fallback)] == ([1, 2] if is_late else [])


def test_what_is_elsewhere_at_the_start_is_brought_back_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, fallback = _stores(tmp_path)
    first = CheckpointSaver(store, Retention(), fallback=fallback)
    first.save(_request(1, 1.0))
    store.is_away = True
    first.save(_request(2, 2.0))
    first.bring_back()
    assert f"the last checkpoints are in {fallback.uri()} until a later save or --resume" in caplog.text

    resumed = CheckpointSaver(store, Retention(keep_last=1), fallback=fallback)
    resumed.latest = Checkpoint(fallback, "step-2").info
    resumed.bring_back()
    assert resumed.latest.uri == fallback.uri("step-2")
    store.is_away = False
    brought: list[str] = []
    resumed.bring_back(lambda: brought.append("metrics"))
    assert resumed.latest == Checkpoint(store, "step-2").info
    assert resumed.take_committed() == [resumed.latest]
    assert brought == ["metrics"]
    # As after a save: the rule about what stays holds.
    assert [(info.step, info.sequence) for info in list_checkpoints(store)] == [(2, 2)]
    assert (tmp_path / "store/latest").read_text() == "step-2\n"
    assert list_checkpoints(fallback) == []
    resumed.bring_back(lambda: brought.append("again"))
    assert brought == ["metrics"], "nothing is left to bring"


def test_one_that_was_brought_back_without_being_removed_is_told_of_and_removed(tmp_path: Path) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), fallback=fallback)
    store.is_away = True
    saver.save(_request(1, 1.0))
    store.is_away = False
    # The process was killed between the two.
    moved = copy_checkpoint(Checkpoint(fallback, "step-1"), store)
    saver.take_committed()
    saver.bring_back()
    assert saver.take_committed() == [moved]
    assert saver.latest == moved
    assert list_checkpoints(fallback) == []


@pytest.mark.parametrize("has_fallback", [False, True])
def test_an_error_names_the_last_checkpoint(tmp_path: Path, has_fallback: bool) -> None:
    store, fallback = _stores(tmp_path)
    saver = CheckpointSaver(store, Retention(), fallback=fallback if has_fallback else None)
    store.is_away = True
    if has_fallback:
        (tmp_path / "fallback").write_text("no folder")
    expected = CheckpointError if has_fallback else StorageUnavailableError
    with pytest.raises(expected, match="s3://runs is away") as caught:
        saver.save(_request(1, 1.0))
    assert "The last checkpoint" not in str(caught.value)
    store.is_away = False
    saver = CheckpointSaver(store, Retention(), fallback=fallback if has_fallback else None)
    saver.save(_request(1, 1.0))
    store.is_away = True
    with pytest.raises(expected, match="s3://runs is away") as caught:
        saver.save(_request(2, 1.0))
    assert f"The last checkpoint is {store.uri('step-1')}." in caught.value.message
    assert caught.value.remedy is not None
