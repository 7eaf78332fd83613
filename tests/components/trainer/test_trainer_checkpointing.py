"""What a run does with its checkpoints: saved, reported where they are, and none left elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest_trainer import Built, build_trainer, make_recipe, run

from wmtp.components.trainer.callbacks import CheckpointCallback
from wmtp.distributed.checkpoint import Retention, list_checkpoints
from wmtp.distributed.checkpoint_reading import CheckpointInfo
from wmtp.distributed.checkpoint_saver import CheckpointSaver
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.exceptions import StorageUnavailableError


class _Store(LocalStore):
    """Stands for one that is away at some steps of a run, counted by `now`."""

    def __init__(self, run: Path, away: set[int]) -> None:
        super().__init__(run)
        self.away = away
        self.now = 0

    def folders(self) -> Any:
        if self.now in self.away:
            raise StorageUnavailableError("s3://runs is away", remedy="wait")
        return super().folders()


class _Run:
    """A run of six steps that saves every two, in a store that is away at some."""

    def __init__(self, folder: Path, away: set[int], *, is_async: bool = False) -> None:
        self.store = _Store(folder / "store", away)
        self.fallback = LocalStore(folder / "fallback")
        self.saver = CheckpointSaver(
            self.store,
            Retention(),
            is_async=is_async,
            fallback=self.fallback,
            is_reachable=self._is_reachable,
        )
        self.reported: list[CheckpointInfo] = []
        self.num_before = 0
        self.callback = CheckpointCallback(
            self.saver,
            every_steps=2,
            run_state={},
            score=lambda step: None,
            on_saving=self._before,
            on_saved=self.reported.append,
        )
        self.built: Built = build_trainer(make_recipe(train={"max_steps": 6}), callbacks=[self.callback])

    def _is_reachable(self) -> bool:
        self.store.now = self.built.trainer.training_run.step
        return self.store.now not in self.store.away

    def _before(self) -> None:
        self.num_before += 1
        self.store.now = self.built.trainer.training_run.step

    def go(self) -> _Run:
        """To the end."""
        run(self.built)
        return self

    def places(self) -> dict[int, str]:
        """Where each step was last said to be."""
        return {info.step: info.uri for info in self.reported}


def _uris(store: LocalStore) -> dict[int, str]:
    return {info.step: info.uri for info in list_checkpoints(LocalStore(store.run_dir))}


@pytest.mark.parametrize("is_async", [False, True])
def test_every_checkpoint_is_reported_where_it_is_in_the_end(tmp_path: Path, is_async: bool) -> None:
    done = _Run(tmp_path, {2, 4}, is_async=is_async).go()
    assert list_checkpoints(done.fallback) == []
    assert done.places() == _uris(done.store)
    assert done.places().keys() == {2, 4, 6}
    assert done.callback.latest == done.store.uri("step-6")


def test_a_store_that_comes_back_after_the_last_save_gets_it_at_the_end(tmp_path: Path) -> None:
    started = _Run(tmp_path, {6})
    bring_back = started.saver.bring_back

    def come_back(before: Any) -> None:
        if started.built.trainer.training_run.step == 6:
            started.store.away = set()
        bring_back(before)

    started.saver.bring_back = come_back  # type: ignore[method-assign]
    started.go()
    assert list_checkpoints(started.fallback) == []
    assert started.places() == _uris(started.store)
    assert started.callback.latest == started.store.uri("step-6")


def test_a_store_that_stays_away_is_told_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = _Run(tmp_path, {4, 6}).go()
    assert done.places() == {**_uris(done.store), **_uris(done.fallback)}
    assert _uris(done.fallback).keys() == {4, 6}
    assert f"the last checkpoints are in {done.fallback.uri()} until a later save or --resume" in caplog.text
    assert done.callback.latest == done.fallback.uri("step-6")


def test_a_resume_at_the_last_step_brings_back_what_was_elsewhere(tmp_path: Path) -> None:
    ended = _Run(tmp_path, {4, 6}).go()
    resumed = _Run(tmp_path, set())
    resumed.saver.latest = ended.saver.latest
    state = ended.built.trainer.training_run.state_dict()
    resumed.built.context.state = state
    resumed.built.trainer.setup(resumed.built.context)
    resumed.go()
    assert list_checkpoints(resumed.fallback) == []
    assert resumed.places() == {step: resumed.store.uri(f"step-{step}") for step in (4, 6)}
    assert _uris(resumed.store).keys() == {2, 4, 6}
    assert resumed.num_before == 1, "its metrics come first"
    assert resumed.callback.latest == resumed.store.uri("step-6")


def test_a_checkpoint_that_was_committed_when_the_run_failed_is_reported(tmp_path: Path) -> None:
    started = _Run(tmp_path, set(), is_async=True)
    step = started.built.trainer.run_step

    def fail_at_three(batches: Any) -> Any:
        if started.built.trainer.training_run.step == 2:
            raise RuntimeError("out of memory")
        return step(batches)

    started.built.trainer.run_step = fail_at_three  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        started.go()
    assert started.places() == {2: started.store.uri("step-2")} == _uris(started.store)
