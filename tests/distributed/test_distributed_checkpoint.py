"""Checkpoints: exact, verified, pruned with care, and safe against a kill at any moment."""

from __future__ import annotations

import math
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wmtp.distributed.checkpoint import (
    find_latest_valid,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from wmtp.distributed.publishing import verify_manifest
from wmtp.exceptions import CheckpointError


def _tensors(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"w": torch.full((3, 2), value), "b": torch.arange(4)},
        "rng": {"torch": torch.get_rng_state()},
    }


def _names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
    ],
)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6, 16), dtype=torch.uint8)
    tensor = raw.view(dtype) if dtype is not torch.bool else raw.bool()
    path = save_checkpoint(tmp_path, 1, tensors={"model": {"x": tensor, "transposed": tensor.T}}, state={})
    loaded = load_checkpoint(path)[0]["model"]
    assert loaded["x"].dtype == dtype
    assert torch.equal(loaded["x"].view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(loaded["transposed"].T.contiguous().view(torch.uint8), tensor.view(torch.uint8))


def test_scalars_empty_tensors_and_views_of_one_buffer_come_back(tmp_path: Path) -> None:
    buffer = torch.randn(4, 5)
    group = {
        "step": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "row0": buffer[0],
        "row1": buffer[1],
        "all": buffer,
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors={"g": group}, state={}))[0]["g"]
    assert set(loaded) == set(group)
    assert all(
        torch.equal(loaded[name], group[name]) and loaded[name].shape == group[name].shape for name in group
    )


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    path = save_checkpoint(tmp_path, 1, tensors={"model": {"embed": weight, "lm_head": weight}}, state={})
    assert (path / "model.safetensors").stat().st_size < 1.5 * weight.numel() * 4
    loaded = load_checkpoint(path)[0]["model"]
    assert loaded["embed"] is loaded["lm_head"]
    assert torch.equal(loaded["embed"], weight)


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {
        "lr": 0.1 + 0.2,
        "tiny": 5e-324,
        "inf": math.inf,
        "list": [1, None, True, "한국어 \u0000 '\""],
        "big": 2**80,
        "d": {},
    }
    assert load_checkpoint(save_checkpoint(tmp_path, 7, tensors={}, state=state))[1] == state


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {"a": [{"b": torch.ones(1)}]}, {"a": 1j}, {"a": {1, 2}}])
def test_state_that_json_would_change_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="state"):
        save_checkpoint(tmp_path, 1, tensors={}, state={"x": value})
    assert _names(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a.b"])
def test_a_group_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="group"):
        save_checkpoint(tmp_path, 1, tensors={name: {}}, state={})


def test_one_byte_flipped_or_cut_in_any_file_is_found_before_use(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, tensors=_tensors(), state={"step": 5})
    generator = random.Random(0)
    files = [file for file in path.iterdir() if file.is_file()]
    assert {file.name for file in files} == {
        "model.safetensors",
        "rng.safetensors",
        "state.json",
        "manifest.json",
    }
    for file in files:
        original = file.read_bytes()
        for _ in range(20):
            changed = bytearray(original)
            changed[generator.randrange(len(original))] ^= 1 << generator.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=file.name):
                load_checkpoint(path)
            assert find_latest_valid(tmp_path)[0] is None
        file.write_bytes(original[:-1])
        with pytest.raises(CheckpointError, match=file.name):
            load_checkpoint(path)
        file.write_bytes(original)
    assert load_checkpoint(path)[1] == {"step": 5}


def test_a_missing_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(tmp_path / "step-1")


def test_another_published_folder_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    from wmtp.distributed.publishing import publish_directory

    with publish_directory(tmp_path / "step-3") as staging:
        (staging / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not written as a training checkpoint"):
        load_checkpoint(tmp_path / "step-3")
    assert find_latest_valid(tmp_path)[0] is None


def test_the_newest_valid_one_is_found_and_skipped_ones_are_named(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, tensors=_tensors(step), state={"step": step})
    (tmp_path / "step-40/manifest.json").unlink()
    data = (tmp_path / "step-30/model.safetensors").read_bytes()
    (tmp_path / "step-30/model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / f"step-50.tmp-{'0' * 32}").mkdir()
    (tmp_path / "step-5").mkdir()
    path, skipped = find_latest_valid(tmp_path)
    assert path == tmp_path / "step-20"
    reasons = {entry.name.partition(".")[0]: reason for entry, reason in skipped}
    assert set(reasons) == {"step-30", "step-40", "step-50"}
    assert "SHA-256" in reasons["step-30"]
    assert "manifest.json" in reasons["step-40"]
    assert "did not finish" in reasons["step-50"]


def test_no_folder_and_an_empty_folder_have_no_checkpoint(tmp_path: Path) -> None:
    assert find_latest_valid(tmp_path / "absent") == (None, [])
    assert find_latest_valid(tmp_path) == (None, [])


def test_keep_last_deletes_the_oldest_and_nothing_that_was_not_written_here(tmp_path: Path) -> None:
    for name in ("step-1", "best", "step-2.tmp-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("x")
    (tmp_path / "step-3.txt").write_text("x")
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, tensors=_tensors(), state={}, keep_last=2)
    assert _names(tmp_path) == ["best", "step-1", "step-2.tmp-mine", "step-3.txt", "step-30", "step-40"]


def test_pruning_happens_only_after_the_new_one_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, tensors=_tensors(), state={}, keep_last=1)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wmtp.distributed.checkpoint_tensors.save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save_checkpoint(tmp_path, 2, tensors=_tensors(), state={}, keep_last=1)
    assert caught.value.remedy is not None
    assert _names(tmp_path) == ["step-1"]
    assert find_latest_valid(tmp_path)[0] == tmp_path / "step-1"


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, tensors=_tensors(), state={})
    save_checkpoint(tmp_path, 2, tensors=_tensors(), state={})
    (tmp_path / "step-2/model.safetensors").write_bytes(b"cut")
    save_checkpoint(tmp_path, 3, tensors=_tensors(), state={}, keep_last=2)
    assert {"step-1", "step-3"} <= set(_names(tmp_path))


def test_a_run_that_was_set_back_keeps_what_it_saves_now(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(tmp_path, step, tensors=_tensors(step), state={}, keep_last=2)
    save_checkpoint(tmp_path, 5, tensors=_tensors(5.0), state={}, keep_last=2)
    assert _names(tmp_path) == ["step-20", "step-5"]
    assert find_latest_valid(tmp_path)[0] == tmp_path / "step-5"


def test_a_step_saved_twice_holds_the_later_state(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, tensors=_tensors(1.0), state={"n": 1}, keep_last=1)
    path = save_checkpoint(tmp_path, 1, tensors=_tensors(2.0), state={"n": 2}, keep_last=1)
    assert load_checkpoint(path)[1] == {"n": 2}
    assert _names(tmp_path) == ["step-1"]


def test_a_replacement_cut_off_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, tensors=_tensors(), state={"n": 1})
    aside = path.rename(tmp_path / f"step-1.replaced-{'a' * 32}")
    assert find_latest_valid(tmp_path)[0] == aside
    assert load_checkpoint(aside)[1] == {"n": 1}
    save_checkpoint(tmp_path, 2, tensors=_tensors(), state={})
    assert _names(tmp_path) == ["step-1", "step-2"]
    assert verify_manifest(tmp_path / "step-1") == []


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    import fcntl

    save_checkpoint(tmp_path, 1, tensors=_tensors(), state={})
    with open(tmp_path / ".checkpoint.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="Another process"):
            save_checkpoint(tmp_path, 2, tensors=_tensors(), state={})
    assert _names(tmp_path) == ["step-1"]


def test_a_run_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="could not be saved"):
        save_checkpoint(tmp_path / "file/run", 1, tensors={}, state={})


def _save_forever(run_dir: Path, first: int) -> None:
    torch.set_num_threads(1)
    for step in range(first, first + 10_000):
        tensors = {"model": {f"w{i}": torch.full((40_000,), float(step)) for i in range(4)}}
        save_checkpoint(run_dir, step, tensors=tensors, state={"step": step}, keep_last=2)


def test_a_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 0, tensors={"model": {"w0": torch.zeros(1)}}, state={"step": 0})
    generator = random.Random(1)
    previous, num_inside = 0, 0
    for _ in range(8):
        child = multiprocessing.get_context("fork").Process(
            target=_save_forever, args=(tmp_path, previous + 1)
        )
        child.start()
        time.sleep(generator.uniform(0.05, 0.25))
        assert child.pid is not None
        child.kill()
        child.join(20)
        assert child.exitcode == -signal.SIGKILL
        num_inside += any(".tmp-" in name for name in _names(tmp_path))
        for name in _names(tmp_path):
            assert "." in name or verify_manifest(tmp_path / name) == [], "a step folder is not whole"
        path, _ = find_latest_valid(tmp_path)
        assert path is not None
        tensors, state = load_checkpoint(path)
        assert state["step"] >= previous
        assert all(bool((tensor == state["step"]).all()) for tensor in tensors["model"].values())
        assert list_checkpoints(tmp_path)[-1].path == path
        previous = state["step"]
    assert previous > 0
    assert num_inside >= 2, "no kill hit a save; the test says nothing"
