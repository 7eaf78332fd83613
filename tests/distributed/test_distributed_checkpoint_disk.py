"""A full disk, a read-only one, a limit on files: one clear message; older checkpoints stay as they are."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_cases import save, use

from wmtp.distributed.checkpoint import Retention, find_latest_valid, save_checkpoint
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.exceptions import CheckpointError

_BIG = {"model": {f"w{i}": torch.ones(300_000) for i in range(4)}}


@contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _assert_untouched(run: Path, *, steps: tuple[int, ...]) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        ".checkpoint.lock",
        "latest",
        *(f"step-{step}" for step in steps),
    ]
    for step in steps:
        use(LocalStore(run), f"step-{step}")
    found, skipped = find_latest_valid(LocalStore(run))
    assert found is not None
    assert (found.info.step, skipped) == (steps[-1], [])


def _refuse(run: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        save_checkpoint(LocalStore(run), 9, tensors=_BIG, state={}, retention=Retention(keep_last=1))
    assert str(run) in caught.value.message
    assert caught.value.remedy is not None


def test_a_full_disk_is_one_error_and_older_checkpoints_stay(tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as run:
        save(LocalStore(run), 1)
        save(LocalStore(run), 2)
        _refuse(run, "No space left")
        _assert_untouched(run, steps=(1, 2))
        # There is room again: the next save goes well.
        save(LocalStore(run), 3, retention=Retention(keep_last=1))
        _assert_untouched(run, steps=(3,))


def test_a_read_only_disk_is_one_error(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(LocalStore(run), 1)
    with _mounted(run, "--bind", str(run)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(run)], check=True)
        _refuse(run, "Read-only file system")
        _assert_untouched(run, steps=(1,))
    _assert_untouched(run, steps=(1,))


def test_a_folder_that_cannot_be_made_is_one_error() -> None:
    _refuse(Path("/proc/self/run"), "cannot be written into")


def _save_with_a_limit(run: Path, limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    _refuse(run, "File too large")


@pytest.mark.parametrize("limit", [0, 100, 1000, 100_000, 4_000_000])
def test_a_limit_on_the_size_of_files_is_one_error_wherever_it_hits(tmp_path: Path, limit: int) -> None:
    save(LocalStore(tmp_path), 1)
    child = multiprocessing.get_context("fork").Process(target=_save_with_a_limit, args=(tmp_path, limit))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    _assert_untouched(tmp_path, steps=(1,))


def test_an_index_that_could_not_be_read_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(LocalStore(tmp_path), 1)
    monkeypatch.setattr("wmtp.distributed.checkpoint.MAX_JSON_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"state\.json would have"):
        save_checkpoint(LocalStore(tmp_path), 2, tensors={}, state={"x": "y" * 2000})
    monkeypatch.undo()
    _assert_untouched(tmp_path, steps=(1,))
