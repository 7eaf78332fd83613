"""Which checkpoints stay: a plain model of the rule, and real folders."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.distributed.checkpoint import Retention, find_latest_valid, list_checkpoints, save_checkpoint
from wmtp.distributed.checkpoint_store import LocalStore

_TENSORS = {"model": {"w": torch.ones(2)}}


def _save(run: Path, step: int, retention: Retention, score: float | None = None) -> None:
    save_checkpoint(LocalStore(run), step, tensors=_TENSORS, state={}, retention=retention, score=score)


def _steps(run: Path) -> set[int]:
    return {info.step for info in list_checkpoints(LocalStore(run))}


@pytest.mark.parametrize(
    ("retention", "scores", "kept"),
    [
        (Retention(), [3, 1, 2, None], {1, 2, 3, 4}),
        (Retention(keep_best=1), [3, 1, 2, None], {1, 2, 3, 4}),
        (Retention(keep_last=1), [3, 1, 2, None], {4}),
        (Retention(keep_last=1, keep_best=1), [3, 1, 2, None], {2, 4}),
        (Retention(keep_last=1, keep_best=1, best_mode="max"), [3, 1, 2, None], {1, 4}),
        (Retention(keep_last=1, keep_best=2), [3, 1, 2, 9], {2, 3, 4}),
        (Retention(keep_last=1, keep_best=1), [1, 1, 1, 9], {3, 4}),
        (Retention(keep_last=1, keep_best=1, best_mode="max"), [1, 1, 0, 0], {2, 4}),
        (Retention(keep_last=1, keep_best=2), [None, None, None, None], {4}),
        (Retention(keep_last=1, keep_best=1), [math.nan, 5, math.nan, math.nan], {2, 4}),
        (Retention(keep_last=1, keep_best=1, best_mode="max"), [math.nan, -math.inf, math.nan, None], {2, 4}),
        (Retention(keep_last=1, keep_best=1), [0.0, 5, 7, None], {1, 4}),
        (Retention(keep_last=1, permanent_every_steps=2), [None] * 5, {2, 4, 5}),
        (Retention(keep_last=2, permanent_every_steps=1), [None] * 5, {1, 2, 3, 4, 5}),
    ],
)
def test_the_last_the_best_and_the_permanent_ones_stay(
    tmp_path: Path, retention: Retention, scores: list[float | None], kept: set[int]
) -> None:
    for step, score in enumerate(scores, 1):
        _save(tmp_path, step, retention, score)
        assert (tmp_path / "latest").read_text() == f"step-{step}\n"
    assert _steps(tmp_path) == kept


def test_permanent_ones_stay_when_the_rule_changes(tmp_path: Path) -> None:
    _save(tmp_path, 2, Retention(permanent_every_steps=2))
    for step in (3, 4, 5):
        _save(tmp_path, step, Retention(keep_last=1))
    assert _steps(tmp_path) == {2, 5}


def test_a_damaged_one_is_neither_one_of_the_last_nor_the_best(tmp_path: Path) -> None:
    for step, score in ((1, 3.0), (2, 2.0), (3, 1.0)):
        _save(tmp_path, step, Retention(), score)
    (tmp_path / "step-3/model.safetensors").write_bytes(b"cut")
    _save(tmp_path, 4, Retention(keep_last=1, keep_best=1), None)
    assert {2, 4} <= _steps(tmp_path)
    assert not (tmp_path / "step-1").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"keep_last": 0}, {"keep_best": -1}, {"permanent_every_steps": 0}, {"permanent_every_steps": -2}],
)
def test_rules_that_mean_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Retention(**wrong)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Saved:
    step: int
    sequence: int
    score: float | None
    is_permanent: bool
    is_damaged: bool = False


def _naive(present: list[_Saved], saved: _Saved, rule: Retention) -> list[_Saved]:
    """What a person would keep, who looks at all of them each time."""
    now = [*(old for old in present if old.step != saved.step), saved]
    if rule.keep_last is None:
        return now
    whole = [one for one in now if not one.is_damaged]
    stay = list(whole)[-rule.keep_last :]
    oldest = stay[0].sequence
    rated = [one for one in whole if one.score is not None and not math.isnan(one.score)]
    for _ in range(rule.keep_best):
        best: _Saved | None = None
        for one in rated:
            sign = 1 if rule.best_mode == "min" else -1
            if best is None or sign * (one.score or 0.0) <= sign * (best.score or 0.0):
                best = one
        if best is not None:
            stay.append(best)
            rated.remove(best)
    return [one for one in now if one in stay or one.is_permanent or one.sequence > oldest]


_SCORES = st.one_of(st.none(), st.integers(0, 3).map(float), st.just(math.nan), st.just(math.inf))


@settings(max_examples=15, deadline=None)
@given(
    rule=st.builds(
        Retention,
        keep_last=st.one_of(st.none(), st.integers(1, 3)),
        keep_best=st.integers(0, 2),
        best_mode=st.sampled_from(["min", "max"]),
        permanent_every_steps=st.one_of(st.none(), st.integers(1, 4)),
    ),
    saves=st.lists(st.tuples(st.integers(1, 9), _SCORES, st.booleans()), min_size=1, max_size=8),
)
def test_any_sequence_of_saves_leaves_what_a_person_would_keep(
    rule: Retention, saves: list[tuple[int, float | None, bool]]
) -> None:
    present: list[_Saved] = []
    with TemporaryDirectory() as folder:
        run = Path(folder)
        for step, score, is_damaged_after in saves:
            sequence = 1 + max((one.sequence for one in present), default=0)
            every = rule.permanent_every_steps
            saved = _Saved(step, sequence, score, every is not None and step % every == 0)
            _save(run, step, rule, score)
            present = _naive(present, saved, rule)
            assert {(i.step, i.sequence) for i in list_checkpoints(LocalStore(run))} == {
                (one.step, one.sequence) for one in present
            }
            newest, _ = find_latest_valid(LocalStore(run))
            assert newest is not None
            assert newest.info.step == step
            assert (run / "latest").read_text() == f"step-{step}\n"
            if is_damaged_after:
                (run / f"step-{step}/model.safetensors").write_bytes(b"cut")
                present[-1] = replace(saved, is_damaged=True)
