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
    Retention,
    copy_checkpoint,
    find_latest_valid,
    list_checkpoints,
    save_checkpoint,
)
from wmtp.distributed.checkpoint_reading import Checkpoint, CheckpointInfo
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.distributed.publishing import verify_manifest
from wmtp.exceptions import CheckpointError


def _tensors(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"w": torch.full((3, 2), value), "b": torch.arange(4)},
        "rng": {"torch": torch.get_rng_state()},
    }


def _names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir() if path.name not in (".checkpoint.lock", "latest"))


def _newest(run_dir: Path) -> str | None:
    checkpoint, _ = find_latest_valid(LocalStore(run_dir))
    return None if checkpoint is None else checkpoint.name


def _open(info: CheckpointInfo) -> Checkpoint:
    return Checkpoint(LocalStore(Path(info.uri).parent), info.name)


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
        torch.complex64,
    ],
)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6, 16), dtype=torch.uint8)
    tensor = raw.view(dtype) if dtype is not torch.bool else raw.bool()
    info = save_checkpoint(
        LocalStore(tmp_path), 1, tensors={"model": {"x": tensor, "transposed": tensor.T}}, state={}
    )
    read = _open(info).read("model")
    into = {"x": torch.zeros_like(tensor), "transposed": torch.zeros_like(tensor.T)}
    _open(info).load_into({"model": into})
    for loaded in (read, into):
        assert loaded["x"].dtype == dtype
        assert torch.equal(loaded["x"].view(torch.uint8), tensor.view(torch.uint8))
        assert torch.equal(loaded["transposed"].T.contiguous().view(torch.uint8), tensor.view(torch.uint8))


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    tensors = {"model": {"x": torch.zeros(2, dtype=torch.complex128)}}
    with pytest.raises(TypeError, match="complex128"):
        save_checkpoint(LocalStore(tmp_path), 1, tensors=tensors, state={})
    assert _names(tmp_path) == []


def test_scalars_empty_tensors_and_views_of_one_buffer_come_back(tmp_path: Path) -> None:
    buffer = torch.randn(4, 5)
    group = {
        "step": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "row0": buffer[0],
        "row1": buffer[1],
        "all": buffer,
    }
    checkpoint = _open(save_checkpoint(LocalStore(tmp_path), 1, tensors={"g": group}, state={}))
    loaded = checkpoint.read("g")
    assert set(loaded) == set(group)
    assert all(
        torch.equal(loaded[name], group[name]) and loaded[name].shape == group[name].shape for name in group
    )
    targets = {name: torch.full_like(tensor, -1.0) for name, tensor in group.items()}
    checkpoint.load_into({"g": targets})
    assert all(torch.equal(targets[name], group[name]) for name in group)


def test_no_tensors_and_an_empty_group_come_back(tmp_path: Path) -> None:
    checkpoint = _open(save_checkpoint(LocalStore(tmp_path), 1, tensors={"none": {}}, state={"a": 1}))
    assert checkpoint.groups == ["none"]
    assert checkpoint.read("none") == {}
    checkpoint.load_into({"none": {}})
    assert _open(save_checkpoint(LocalStore(tmp_path), 2, tensors={}, state={})).groups == []


def test_targets_of_another_dtype_or_layout_are_filled(tmp_path: Path) -> None:
    saved = torch.randn(5, 3)
    checkpoint = _open(save_checkpoint(LocalStore(tmp_path), 1, tensors={"g": {"x": saved}}, state={}))
    for target in (torch.zeros(5, 3, dtype=torch.float64), torch.zeros(3, 5).T, torch.zeros(9, 6)[2:7, ::2]):
        checkpoint.load_into({"g": {"x": target}})
        assert torch.equal(target, saved.to(target.dtype))
    parameter = torch.nn.Parameter(torch.zeros(5, 3))
    checkpoint.load_into({"g": {"x": parameter}})
    assert torch.equal(parameter, saved)
    assert parameter.requires_grad


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ({"other": {}}, "other"),
        ({"model": {"w": torch.zeros(3, 2)}}, "'b'"),
        ({"model": {"w": torch.zeros(3, 2), "b": torch.zeros(4), "c": torch.zeros(1)}}, "'c'"),
        ({"model": {"w": torch.zeros(2, 3), "b": torch.zeros(4)}}, r"w is \(2, 3\) here and was \(3, 2\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, targets: dict[str, dict[str, Tensor]], named: str
) -> None:
    checkpoint = _open(save_checkpoint(LocalStore(tmp_path), 1, tensors=_tensors(), state={}))
    with pytest.raises(CheckpointError, match=named):
        checkpoint.load_into(targets)


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    tensors = {"model": {"embed": weight, "lm_head": weight.view(64, 64)}}
    info = save_checkpoint(LocalStore(tmp_path), 1, tensors=tensors, state={})
    assert (Path(info.uri) / "model.safetensors").stat().st_size < 1.5 * weight.numel() * 4
    loaded = _open(info).read("model")
    assert loaded["embed"] is loaded["lm_head"]
    assert torch.equal(loaded["embed"], weight)
    apart = {"embed": torch.zeros(64, 64), "lm_head": torch.zeros(64, 64)}
    _open(info).load_into({"model": apart})
    assert torch.equal(apart["embed"], weight)
    assert torch.equal(apart["lm_head"], weight)
    one = torch.zeros(64, 64)
    _open(info).load_into({"model": {"embed": one, "lm_head": one}})
    assert torch.equal(one, weight)


def test_names_that_mean_something_in_the_file_are_refused_or_kept(tmp_path: Path) -> None:
    tensors = {"g": {"__metadata__": torch.ones(2)}}
    with pytest.raises(ValueError, match="__metadata__"):
        save_checkpoint(LocalStore(tmp_path), 1, tensors=tensors, state={})
    group = {name: torch.randn(2) for name in ("a@0", "a/b", "", '가 "\n', "a")}
    read = _open(save_checkpoint(LocalStore(tmp_path), 1, tensors={"g": group}, state={})).read("g")
    assert read.keys() == group.keys()
    assert all(torch.equal(read[name], group[name]) for name in group)


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {
        "lr": 0.1 + 0.2,
        "tiny": 5e-324,
        "inf": math.inf,
        "list": [1, None, True, "한국어 \u0000 '\""],
        "big": 2**80,
        "d": {},
    }
    assert _open(save_checkpoint(LocalStore(tmp_path), 7, tensors={}, state=state)).state == state


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {"a": [{"b": torch.ones(1)}]}, {"a": 1j}, {"a": {1, 2}}])
def test_state_that_json_would_change_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="state"):
        save_checkpoint(LocalStore(tmp_path), 1, tensors={}, state={"x": value})
    assert _names(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a.b"])
def test_a_group_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="group"):
        save_checkpoint(LocalStore(tmp_path), 1, tensors={name: {}}, state={})


def test_a_missing_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(LocalStore(tmp_path), "step-1")


def test_another_published_folder_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    from wmtp.distributed.publishing import publish_directory

    with publish_directory(tmp_path / "step-3") as staging:
        (staging / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not written as a training checkpoint"):
        Checkpoint(LocalStore(tmp_path), "step-3")
    assert find_latest_valid(LocalStore(tmp_path))[0] is None


def test_the_newest_valid_one_is_found_and_skipped_ones_are_named(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save_checkpoint(LocalStore(tmp_path), step, tensors=_tensors(step), state={"step": step})
    (tmp_path / "step-40/manifest.json").unlink()
    data = (tmp_path / "step-30/model.safetensors").read_bytes()
    (tmp_path / "step-30/model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / f"step-50.tmp-{'0' * 32}").mkdir()
    (tmp_path / "step-5").mkdir()
    checkpoint, skipped = find_latest_valid(LocalStore(tmp_path))
    assert checkpoint is not None
    assert checkpoint.info.uri == str(tmp_path / "step-20")
    reasons = {name.partition(".")[0]: reason for name, reason in skipped}
    assert set(reasons) == {"step-30", "step-40", "step-50"}
    assert "SHA-256" in reasons["step-30"]
    assert "manifest.json" in reasons["step-40"]
    assert "did not finish" in reasons["step-50"]


def test_no_folder_and_an_empty_folder_have_no_checkpoint(tmp_path: Path) -> None:
    assert find_latest_valid(LocalStore(tmp_path / "absent")) == (None, [])
    assert find_latest_valid(LocalStore(tmp_path)) == (None, [])


def test_keep_last_deletes_the_oldest_and_nothing_that_was_not_written_here(tmp_path: Path) -> None:
    for name in ("step-1", "best", "step-2.tmp-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("x")
    (tmp_path / "step-3.txt").write_text("x")
    for step in (10, 20, 30, 40):
        save_checkpoint(
            LocalStore(tmp_path), step, tensors=_tensors(), state={}, retention=Retention(keep_last=2)
        )
    assert _names(tmp_path) == ["best", "step-1", "step-2.tmp-mine", "step-3.txt", "step-30", "step-40"]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    save_checkpoint(LocalStore(tmp_path), 1, tensors=_tensors(), state={})
    save_checkpoint(LocalStore(tmp_path), 2, tensors=_tensors(), state={})
    (tmp_path / "step-2/model.safetensors").write_bytes(b"cut")
    save_checkpoint(LocalStore(tmp_path), 3, tensors=_tensors(), state={}, retention=Retention(keep_last=2))
    assert {"step-1", "step-3"} <= set(_names(tmp_path))


def test_a_run_that_was_set_back_keeps_what_it_saves_now(tmp_path: Path) -> None:
    for step in (10, 20):
        save_checkpoint(
            LocalStore(tmp_path), step, tensors=_tensors(step), state={}, retention=Retention(keep_last=2)
        )
    save_checkpoint(
        LocalStore(tmp_path), 5, tensors=_tensors(5.0), state={}, retention=Retention(keep_last=2)
    )
    assert _names(tmp_path) == ["step-20", "step-5"]
    assert _newest(tmp_path) == "step-5"
    assert (tmp_path / "latest").read_text() == "step-5\n"


def test_a_step_saved_twice_holds_the_later_state(tmp_path: Path) -> None:
    save_checkpoint(
        LocalStore(tmp_path), 1, tensors=_tensors(1.0), state={"n": 1}, retention=Retention(keep_last=1)
    )
    info = save_checkpoint(
        LocalStore(tmp_path), 1, tensors=_tensors(2.0), state={"n": 2}, retention=Retention(keep_last=1)
    )
    assert _open(info).state == {"n": 2}
    assert _names(tmp_path) == ["step-1"]


def test_a_replacement_cut_off_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    info = save_checkpoint(LocalStore(tmp_path), 1, tensors=_tensors(), state={"n": 1})
    aside = Path(info.uri).rename(tmp_path / f"step-1.replaced-{'a' * 32}")
    checkpoint, _ = find_latest_valid(LocalStore(tmp_path))
    assert checkpoint is not None
    assert (checkpoint.name, checkpoint.state) == (aside.name, {"n": 1})
    save_checkpoint(LocalStore(tmp_path), 2, tensors=_tensors(), state={})
    assert _names(tmp_path) == ["step-1", "step-2"]
    assert verify_manifest(tmp_path / "step-1") == []


def test_a_second_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("wmtp.distributed.checkpoint_store._LOCK_PATIENCE_S", 0.3)
    save_checkpoint(LocalStore(tmp_path), 1, tensors=_tensors(), state={})
    with open(tmp_path / ".checkpoint.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="Another process"):
            save_checkpoint(LocalStore(tmp_path), 2, tensors=_tensors(), state={})
    assert _names(tmp_path) == ["step-1"]


def test_a_run_has_one_writer_for_as_long_as_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wmtp.distributed.checkpoint_store._LOCK_PATIENCE_S", 0.3)
    store, other = LocalStore(tmp_path), LocalStore(tmp_path)
    with store.only_writer():
        save_checkpoint(store, 1, tensors=_tensors(), state={})
        with pytest.raises(CheckpointError, match="Another process"), other.only_writer():
            pass
        save_checkpoint(store, 2, tensors=_tensors(), state={})
    with other.only_writer():
        save_checkpoint(other, 3, tensors=_tensors(), state={})
    assert _names(tmp_path) == ["step-1", "step-2", "step-3"]


def test_a_checkpoint_is_copied_whole_or_not_at_all(tmp_path: Path) -> None:
    source, target = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    info = save_checkpoint(
        source, 4, tensors=_tensors(), state={"n": 1}, score=0.5, retention=Retention(permanent_every_steps=2)
    )
    copied = copy_checkpoint(_open(info), target)
    assert (copied.step, copied.sequence, copied.score, copied.is_permanent) == (4, 1, 0.5, True)
    assert find_latest_valid(target)[0] is not None
    assert (tmp_path / "b/latest").read_text() == "step-4\n"
    later = save_checkpoint(source, 5, tensors=_tensors(), state={})
    (Path(later.uri) / "rng.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"rng\.safetensors"):
        copy_checkpoint(_open(later), target)
    assert _names(tmp_path / "b") == ["step-4"]


def test_what_cannot_be_tidied_is_told_and_the_checkpoint_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "mine").touch()
    info = save_checkpoint(LocalStore(tmp_path), 1, tensors=_tensors(), state={})
    assert _open(info).problems() == []
    assert "step-1 is saved, but" in caplog.text


@pytest.mark.parametrize("name", ["file/run", "file"])
def test_a_run_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    store = LocalStore(tmp_path / name)
    for use in (store.only_writer().__enter__, lambda: save_checkpoint(store, 1, tensors={}, state={})):
        with pytest.raises(CheckpointError, match=f"cannot be written into {tmp_path / name}: ") as caught:
            use()
        assert caught.value.remedy is not None
    assert (tmp_path / "file").read_text() == "x"


def _leave(path: Path, content: str = "left") -> Path:
    """A folder as publishing leaves it when it is killed, or a file."""
    if path.name.startswith("latest"):
        path.write_text(content)
    else:
        (path / "deep").mkdir(parents=True)
        (path / "deep/model.safetensors").write_text(content)
    return path


def test_what_killed_publishing_left_in_a_run_folder_goes_with_the_next_save(tmp_path: Path) -> None:
    for name in (
        "final.tmp",
        "latest.tmp",
        "tokenizer.tmp",
        "step-3.tmp",
        "step-1.replaced",
        "final.replaced",
    ):
        _leave(tmp_path / f"{name}-{'a' * 32}")
    kept = [_leave(tmp_path / name) for name in ("final", "critic", "notes.tmp-1", f"tmp-{'b' * 32}")]
    outside = _leave(tmp_path.with_name(f"{tmp_path.name}.outside"))
    (tmp_path / f"critic.tmp-{'c' * 32}").symlink_to(outside)
    save_checkpoint(LocalStore(tmp_path), 1, tensors=_tensors(), state={})
    expected = {".checkpoint.lock", "latest", "step-1", *(path.name for path in kept)}
    assert {path.name for path in tmp_path.iterdir()} == expected
    for path in (*kept, outside):
        assert (path / "deep/model.safetensors").read_text() == "left"


def test_an_export_that_was_killed_between_its_renames_comes_back(tmp_path: Path) -> None:
    _leave(tmp_path / f"final.replaced-{'b' * 32}", "old")
    time.sleep(0.02)
    _leave(tmp_path / f"final.replaced-{'a' * 32}", "new")
    _leave(tmp_path / f"final.tmp-{'c' * 32}")
    save_checkpoint(LocalStore(tmp_path), 1, tensors=_tensors(), state={})
    assert _names(tmp_path) == ["final", "step-1"]
    assert (tmp_path / "final/deep/model.safetensors").read_text() == "new"


def test_what_another_process_publishes_into_the_folder_meanwhile_is_left_alone(tmp_path: Path) -> None:
    begun_before = _leave(tmp_path / f"final.tmp-{'a' * 32}")
    store = LocalStore(tmp_path)
    with store.only_writer():
        time.sleep(0.02)
        (begun_before / "deep/model.safetensors").write_text("more")
        begun_after = _leave(tmp_path / f"other.tmp-{'b' * 32}")
        aside = _leave(tmp_path / f"other.replaced-{'b' * 32}")
        save_checkpoint(store, 1, tensors=_tensors(), state={})
    assert all((path / "deep/model.safetensors").exists() for path in (begun_before, begun_after, aside))


def _save_forever(run_dir: Path, first: int) -> None:
    torch.set_num_threads(1)
    for step in range(first, first + 10_000):
        tensors = {"model": {f"w{i}": torch.full((40_000,), float(step)) for i in range(4)}}
        save_checkpoint(
            LocalStore(run_dir), step, tensors=tensors, state={"step": step}, retention=Retention(keep_last=2)
        )


def test_a_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(LocalStore(tmp_path), 0, tensors={"model": {"w0": torch.zeros(1)}}, state={"step": 0})
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
        checkpoint, _ = find_latest_valid(LocalStore(tmp_path))
        assert checkpoint is not None
        step = checkpoint.state["step"]
        assert step >= previous
        assert all(bool((tensor == step).all()) for tensor in checkpoint.read("model").values())
        assert list_checkpoints(LocalStore(tmp_path))[-1] == checkpoint.info
        previous = step
    assert previous > 0
    assert num_inside >= 2, "no kill hit a save; the test says nothing"
