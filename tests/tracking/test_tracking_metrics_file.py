"""The local metrics file: complete, strict JSON, cut exactly at a resume."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from wmtp.exceptions import UserInputError
from wmtp.tracking import CompositeTracker, TrackingWarning
from wmtp.tracking.metrics_file import MetricsFile, read_metrics


def _write(path: Path, steps: list[int], **options: int) -> None:
    file = MetricsFile(path, **options)
    for step in steps:
        file.log_metrics({"train/loss": step / 3}, step)
    file.close()


def test_values_come_back_exactly_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep/metrics.jsonl"
    _write(path, [1, 2, 3])
    rows = read_metrics(path)
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0)]
    assert abs(rows[0]["time"] - time.time()) < 60


def test_the_file_is_strict_json_also_with_nan(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m")
    file.log_metrics({"a": math.nan, "b": -math.inf, "c": 1}, 4)
    file.close()
    row = json.loads((tmp_path / "m").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["a"] is None
    assert row["c"] == 1.0
    read = read_metrics(tmp_path / "m")[0]
    assert math.isnan(read["a"])
    assert read["b"] == -math.inf
    assert "nonfinite" not in read


def test_each_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m")
    for step in range(3):
        file.log_metrics({"x": 1.0}, step)
        assert len(read_metrics(tmp_path / "m")) == step + 1
    file.close()


def test_a_resume_appends_and_cuts_later_steps(tmp_path: Path) -> None:
    path = tmp_path / "m"
    _write(path, [10, 20, 20, 30, 40])
    _write(path, [25, 35], resume_step=20)
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 20, 25, 35]


def test_a_resume_of_a_resume_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "m"
    _write(path, [1, 2, 3, 4])
    _write(path, [3, 4, 5], resume_step=2)
    _write(path, [4, 5, 6], resume_step=3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "train/lo', b'{"step": 2, "time": 1.0}', b"\x00\xff\n", b"[1]\n"]
)
def test_an_unfinished_line_is_cut_at_resume(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "m"
    _write(path, [1, 2])
    with path.open("ab") as file:
        file.write(torn)
    _write(path, [3], resume_step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert path.read_bytes().count(b"\n") == 3


def test_a_resume_without_a_file_starts_one_and_a_new_run_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "m"
    _write(path, [5], resume_step=4)
    _write(path, [1])
    assert [row["step"] for row in read_metrics(path)] == [1]


def _write_forever(path: Path) -> None:
    file = MetricsFile(path)
    for step in range(10**9):
        file.log_metrics({"x": float(step)}, step)


def test_a_killed_process_loses_at_most_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m"
    child = multiprocessing.get_context("fork").Process(target=_write_forever, args=(path,))
    child.start()
    time.sleep(0.2)
    child.kill()
    child.join(10)
    num_lines = path.read_bytes().count(b"\n")
    steps = [row["step"] for row in read_metrics(path)]
    assert num_lines > 10
    assert steps == list(range(len(steps)))
    assert len(steps) >= num_lines


# ------------------------------------------------------------------------------------------ a disk in trouble


def _in_a_child(work: Callable[[Path], None], folder: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=work, args=(folder,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _meet_a_limit(folder: Path) -> None:
    path = folder / "m"
    file = MetricsFile(path)
    file.log_metrics({"x": 0.0}, 0)
    whole = path.read_bytes()
    # In the middle of the next line, and of the one after it.
    for extra in (10, len(whole) + 10):
        _limit(len(whole) + extra)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in (1, 2, 3):
                file.log_metrics({"x": 1.0}, step + extra)
        assert len(caught) == (1 if extra == 10 else 0), "told once"
        assert path.read_bytes().endswith(b"\n"), "no part of a line"
    assert [row["step"] for row in read_metrics(path)] == [0, 11]
    _limit(resource.RLIM_INFINITY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file.log_metrics({"x": 2.0}, 1000)
        file.close()
    second = len(whole) + 10
    steps = [0, *(step + extra for extra in (10, second) for step in (1, 2, 3)), 1000]
    assert [row["step"] for row in read_metrics(path)] == steps
    assert path.read_bytes().count(b"\n") == len(steps)


def test_rows_wait_while_the_disk_takes_none_and_none_is_torn_lost_or_out_of_order(tmp_path: Path) -> None:
    _in_a_child(_meet_a_limit, tmp_path)


def _end_at_a_limit(folder: Path) -> None:
    file = MetricsFile(folder / "m")
    file.log_metrics({"x": 0.0}, 0)
    _limit((folder / "m").stat().st_size + 5)
    with pytest.warns(TrackingWarning, match=r"File too large\); training goes on"):
        file.log_metrics({"x": 1.0}, 1)
    file.log_metrics({"x": 1.0}, 2)
    with pytest.warns(TrackingWarning, match=r"not complete \(File too large\): the last 2 rows are lost"):
        file.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file.close()
    assert [row["step"] for row in read_metrics(folder / "m")] == [0]


def test_the_end_says_how_many_rows_are_lost_and_is_no_error(tmp_path: Path) -> None:
    _in_a_child(_end_at_a_limit, tmp_path)


class _Silent:
    """A remote tracker that fails."""

    run_id = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        def fail(*args: object, **options: object) -> None:
            raise ConnectionError("gone")

        return fail


def _train_at_a_limit(folder: Path) -> None:
    tracker = CompositeTracker(MetricsFile(folder / "m"), _Silent(), retry_s=1000)
    _limit(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            tracker.log_metrics({"x": 1.0}, step)
        tracker.finish("failed")
    messages = " ".join(str(warning.message) for warning in caught)
    assert "3 rows are lost" in messages
    assert "4 entries did not reach" in messages
    assert "All metrics are in" not in messages


def test_training_goes_on_when_neither_disk_nor_server_take_metrics(tmp_path: Path) -> None:
    _in_a_child(_train_at_a_limit, tmp_path)


@contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_was_full_gets_all_rows_when_there_is_room(tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=16k", "tmpfs") as disk:
        file = MetricsFile(disk / "m")
        (disk / "other").write_bytes(b"x" * 8192)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(200):
                file.log_metrics({"train/loss": step / 3, "val/loss": step / 7}, step)
        assert ["No space left" in str(warning.message) for warning in caught] == [True]
        written = read_metrics(disk / "m")
        assert 0 < len(written) < 200
        assert file.num_waiting == 200 - len(written)
        (disk / "other").unlink()
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        file.log_metrics({"train/loss": 0.0}, 200)
        assert [row["step"] for row in read_metrics(disk / "m")] == list(range(201))
        file.close()


def test_a_read_only_disk_is_a_clear_error_at_the_start(tmp_path: Path) -> None:
    read_only = _mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs")
    with read_only as disk, pytest.raises(UserInputError, match=r"cannot be written to .*/disk/m: Read-only"):
        MetricsFile(disk / "m")


@pytest.mark.parametrize("resume_step", [None, 3])
def test_a_file_that_cannot_be_opened_is_a_clear_error(tmp_path: Path, resume_step: int | None) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file/metrics.jsonl", "folder"):
        with pytest.raises(UserInputError, match=f"{tmp_path / name}: ") as caught:
            MetricsFile(tmp_path / name, resume_step=resume_step)
        assert caught.value.remedy is not None
