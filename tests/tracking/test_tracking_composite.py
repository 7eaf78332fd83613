"""The tracker of a run: training never waits for the store, outlives it, and loses nothing locally."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from wmtp.tracking import CompositeTracker, MetricsFile, TrackingWarning, read_metrics
from wmtp.tracking.checkpoint_records import CheckpointRecord


class _Recorder:
    """A remote tracker that fails while `is_down` and does not answer while `hang` is held."""

    run_id = "r1"

    def __init__(self) -> None:
        self.is_down = False
        self.hang = threading.Event()
        self.hang.set()
        self.calls: list[tuple[str, object]] = []
        self.times_ms: list[int] = []

    def _take(self, name: str, value: object) -> None:
        self.hang.wait()
        if self.is_down:
            raise ConnectionError("server is gone\nlong trace")
        self.calls.append((name, value))

    def log_params(self, params: object) -> None:
        self._take("params", params)

    def log_metrics(self, metrics: object, step: int, *, time_ms: int | None = None) -> None:
        assert time_ms is not None
        self.times_ms.append(time_ms)
        self._take("metrics", step)

    def restore_metrics(self, rows: object) -> None:
        self._take("restore", rows)

    def log_artifact(self, path: object, folder: str | None = None) -> None:
        self._take("artifact", path)

    def log_model(self, name: str, path: object, folder: str) -> None:
        self._take("model", name)

    def log_checkpoint(self, record: CheckpointRecord) -> None:
        self._take("checkpoint", record)

    def set_tags(self, tags: object) -> None:
        self._take("tags", tags)

    def finish(self, status: str = "finished") -> None:
        self._take("finish", status)


def _composite(tmp_path: Path, retry_s: float, **options: float) -> tuple[CompositeTracker, _Recorder]:
    recorder = _Recorder()
    metrics_file = MetricsFile(tmp_path / "metrics.jsonl")
    return CompositeTracker(metrics_file, recorder, retry_s=retry_s, **options), recorder


def test_training_outlives_a_dead_store_with_one_warning_and_nothing_is_lost_locally(tmp_path: Path) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=1000)
    tracker.log_metrics({"x": 1.0}, 1)
    assert tracker.flush()
    recorder.is_down = True
    tracker.log_metrics({"x": 1.0}, 2)
    with pytest.warns(TrackingWarning, match=r"server is gone\).*metrics\.jsonl"):
        assert not tracker.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrackingWarning)
        for step in range(3, 50):
            tracker.log_metrics({"x": 1.0}, step)
    with pytest.warns(TrackingWarning, match="49 entries did not reach"):
        tracker.finish("failed")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 50))
    assert recorder.calls == [("metrics", 1)]


def test_what_a_store_says_is_told_without_its_password(tmp_path: Path) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=1000)

    def refuse(name: str, value: object) -> None:
        raise ConnectionError("no answer from http://me:hunter2@host/api?token=hunter2")

    recorder._take = refuse  # type: ignore[method-assign]
    tracker.log_metrics({"x": 1.0}, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker.finish()
    assert "no answer from http://**********@host/api" in str(caught[0].message)
    assert not any("hunter2" in str(warning.message) for warning in caught)


def test_the_first_failure_is_told_by_the_next_call_and_no_other(tmp_path: Path) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=0.01)
    recorder.is_down = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(20):
            tracker.log_metrics({"x": 1.0}, step)
            time.sleep(0.01)
        recorder.is_down = False
        tracker.finish()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert messages[0].startswith("Tracking failed (server is gone)")
    assert caught[0].filename == __file__
    assert recorder.calls == [*(("metrics", step) for step in range(20)), ("finish", "finished")]


def test_what_was_missed_is_delivered_in_order_when_the_store_is_back(tmp_path: Path) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=1000)
    recorder.is_down = True
    tracker.log_params({"a": 1})
    with pytest.warns(TrackingWarning):
        tracker.flush()
    tracker.log_metrics({"x": 1.0}, 1)
    recorder.is_down = False
    tracker.log_metrics({"x": 1.0}, 2)
    time.sleep(0.05)
    assert recorder.calls == [], "not tried again before its time"
    tracker.finish()
    expected = [("params", {"a": 1}), ("metrics", 1), ("metrics", 2), ("finish", "finished")]
    assert recorder.calls == expected
    tracker.finish()
    assert recorder.calls == expected


def test_a_store_that_is_away_for_long_loses_no_entry(tmp_path: Path) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=0.001)
    recorder.is_down = True
    # By whichever call comes after the first failure.
    with pytest.warns(TrackingWarning, match="Tracking failed"):  # noqa: PT031
        for step in range(10):
            tracker.log_metrics({"x": 1.0}, step)
        tracker.flush()
    time.sleep(0.2)
    recorder.is_down = False
    tracker.finish()
    assert recorder.calls == [*(("metrics", step) for step in range(10)), ("finish", "finished")]


def test_an_entry_that_is_sent_again_has_its_first_time(tmp_path: Path) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=0.001)
    recorder.is_down = True
    tracker.log_metrics({"x": 1.0}, 1)
    time.sleep(0.05)
    recorder.is_down = False
    with pytest.warns(TrackingWarning):
        tracker.finish()
    assert len(recorder.times_ms) > 2
    assert len(set(recorder.times_ms)) == 1
    assert recorder.times_ms[0] == round(read_metrics(tmp_path / "metrics.jsonl")[0]["time"] * 1000)


@pytest.mark.parametrize("place", [0, 3, 6])
def test_one_bad_entry_does_not_block_the_rest(tmp_path: Path, place: int) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=0.001)
    take: Callable[[str, object], None] = recorder._take

    def refuse_tags(name: str, value: object) -> None:
        if name == "tags":
            raise ValueError("bad tag")
        take(name, value)

    recorder._take = refuse_tags  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(7):
            if step == place:
                tracker.set_tags({"a": "b"})
            tracker.log_metrics({"x": 1.0}, step)
        tracker.finish()
    messages = [str(warning.message) for warning in caught]
    assert "bad tag" in messages[0]
    assert "1 entries" in messages[1]
    assert len(messages) == 2
    assert recorder.calls == [*(("metrics", step) for step in range(7)), ("finish", "finished")]


def test_a_store_that_never_answers_holds_up_neither_training_nor_its_end(tmp_path: Path) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=1000, patience_s=0.2)
    recorder.hang.clear()
    began = time.perf_counter()
    for step in range(1000):
        tracker.log_metrics({"x": 1.0}, step)
    assert time.perf_counter() - began < 1.0
    began = time.perf_counter()
    with pytest.warns(TrackingWarning, match="1001 entries did not reach"):
        tracker.finish()
    assert time.perf_counter() - began < 2.0
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1000
    recorder.hang.set()


def test_a_slow_store_is_waited_for_as_long_as_it_gets_on(tmp_path: Path) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=1000, patience_s=0.5)
    take: Callable[[str, object], None] = recorder._take

    def take_slowly(name: str, value: object) -> None:
        time.sleep(0.05)
        take(name, value)

    recorder._take = take_slowly  # type: ignore[method-assign]
    for step in range(20):
        tracker.log_metrics({"x": 1.0}, step)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrackingWarning)
        tracker.finish()
    assert len(recorder.calls) == 21


def test_waiting_entries_are_bounded_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wmtp.tracking.delivery._MAX_WAITING", 10)
    tracker, recorder = _composite(tmp_path, retry_s=1000)
    recorder.is_down = True
    tracker.log_params({})
    with pytest.warns(TrackingWarning):
        tracker.flush()
    for step in range(50):
        tracker.log_metrics({"x": 1.0}, step)
    recorder.is_down = False
    with pytest.warns(TrackingWarning, match="42 entries did not reach"):
        tracker.finish()
    assert recorder.calls[0][0] == "params"
    assert recorder.calls[2:] == [*(("metrics", step) for step in range(43, 50)), ("finish", "finished")]


def test_a_checkpoint_is_handed_on_as_a_record(tmp_path: Path) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=1000)
    tracker.log_metrics({"train/loss": 3.0, "score": 0.0}, 3)
    tracker.log_metrics({"train/loss": 2.0}, 4)
    # A save that goes on beside training is committed some steps later.
    tracker.log_metrics({"val/loss": 7.0}, 6)
    tracker.log_checkpoint(5, uri="/run/step-5", metrics={"score": 1}, manifest_sha256="ab")
    tracker.finish()
    metrics = {"train/loss": 2.0, "score": 1.0}
    assert recorder.calls[3] == ("checkpoint", CheckpointRecord(5, "/run/step-5", metrics, "ab"))


def test_an_entry_that_failed_once_is_not_given_up_while_others_get_through(tmp_path: Path) -> None:
    tracker, recorder = _composite(tmp_path, retry_s=0.001)
    take: Callable[[str, object], None] = recorder._take
    failures = []

    def fail_three_times(name: str, value: object) -> None:
        if value == 1 and len(failures) < 3:
            failures.append(value)
            raise ConnectionError("reset")
        take(name, value)

    recorder._take = fail_three_times  # type: ignore[method-assign]
    # By whichever call comes after the first failure.
    with pytest.warns(TrackingWarning, match="Tracking failed"):  # noqa: PT031
        for step in range(5):
            tracker.log_metrics({"x": 1.0}, step)
        deadline = time.monotonic() + 10
        while len(recorder.calls) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        tracker.finish()
    assert recorder.calls == [*(("metrics", step) for step in range(5)), ("finish", "finished")]
