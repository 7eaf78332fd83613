"""`kill -9` at seeded random moments: every restart goes on from a whole checkpoint, and nothing shows of it.

At least a third of the kills fall inside a save or an upload, which the tests assert. `make torture` runs the
200 of the slow tests; those of the fast ones are 30.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import (
    UNDISTURBED,
    Outcome,
    Run,
    Tally,
    Zygote,
    kill_and_restart,
    local_config,
    s3_config,
    tiny_recipe,
    write_stream,
    write_tiny_model,
    zygote,
)

from s3_server import S3Server

_KILLS_PER_RUN = 6

ACCUMULATED: dict[str, Any] = {"train": {"gradient_accumulation_steps": 3}}
ASYNC: dict[str, Any] = {"train": {"async_checkpoints": True}}
ASYNC_WORKERS: dict[str, Any] = {
    "train": {"async_checkpoints": True, "gradient_accumulation_steps": 2},
    "data": {"train": {"num_workers": 2, "pack_sequences": False}},
}
BEST: dict[str, Any] = {
    "train": {"eval_every_steps": 4, "keep_best": 1, "keep_last": 1, "permanent_every_steps": 12}
}
CRITIC: dict[str, Any] = {"train": {"algo": "critic-wmtp"}, "model": {"lora": {"rank": 2, "dropout": 0.1}}}
PHASES: dict[str, Any] = {"model": {"trainable": "heads_then_all", "warmup_head_steps": 10}}
RHO1: dict[str, Any] = {
    "train": {"algo": "rho1-wmtp", "async_checkpoints": True},
    "rho1": {"mode": "tokenskip"},
    "loss": {"normalize_over": "running"},
}
STREAMING: dict[str, Any] = {
    "data": {"train": {"streaming": True, "shuffle_buffer": 12, "sources": ["custom"], "num_workers": 1}}
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Zygote]:
    """A zygote that has seen one run, and so has imported what a run imports."""
    folder = tmp_path_factory.mktemp("zygote")
    with zygote(folder) as process:
        ending = process.run(
            Run("first", local_config(folder / "out", model), tiny_recipe(train={"max_steps": 4})),
            UNDISTURBED,
            resume=None,
        )
        assert ending.status == 0, ending.log.read_text()
        yield process


def _torment(process: Zygote, run: Run, *, num_kills: int, seed: int) -> Tally:
    """Kill runs of these settings so many times altogether; each must end like one that was left alone."""
    whole = run.named("whole")
    reference = process.run(whole, UNDISTURBED, resume=None)
    assert reference.status == 0, reference.log.read_text()
    expected = Outcome.of(whole)
    assert len(expected.logged) > 5 * run.recipe["train"]["max_steps"]
    assert expected.tracked.keys() >= expected.logged.keys()
    tally = Tally()
    number = 0
    while tally.num_kills < num_kills:
        number += 1
        limit = min(num_kills, tally.num_kills + _KILLS_PER_RUN)
        killed = run.named(f"killed-{number}")
        kill_and_restart(process, killed, reference, seed=1000 * seed + number, num_kills=limit, tally=tally)
        Outcome.of(killed).assert_equal(expected)
    assert 3 * tally.num_inside >= tally.num_kills, tally
    print(tally)
    return tally


@pytest.mark.parametrize(
    ("changes", "num_kills"), [({}, 8), (ASYNC_WORKERS, 7), (CRITIC, 5)], ids=["plain", "async", "critic"]
)
def test_killed_runs_end_like_one_left_alone(
    changes: dict[str, Any], num_kills: int, process: Zygote, model: Path, tmp_path: Path
) -> None:
    run = Run("run", local_config(tmp_path, model), tiny_recipe(**changes))
    _torment(process, run, num_kills=num_kills, seed=num_kills)


@pytest.mark.s3
@pytest.mark.parametrize(("changes", "num_kills"), [({}, 5), (ASYNC, 5)], ids=["plain", "async"])
def test_killed_runs_on_s3_end_like_one_left_alone(
    changes: dict[str, Any],
    num_kills: int,
    process: Zygote,
    model: Path,
    tmp_path: Path,
    s3_server: S3Server,
) -> None:
    config = s3_config(s3_server, f"{tmp_path.name}-{num_kills}", tmp_path, model)
    _torment(process, Run("run", config, tiny_recipe(**changes)), num_kills=num_kills, seed=num_kills)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "changes",
    [ACCUMULATED, ASYNC_WORKERS, BEST, CRITIC, PHASES, RHO1, STREAMING],
    ids=["accumulated", "async", "best", "critic", "phases", "rho1", "streaming"],
)
def test_many_kills(changes: dict[str, Any], seed: int, process: Zygote, model: Path, tmp_path: Path) -> None:
    datasets = {"datasets": {"custom": str(write_stream(tmp_path / "rows.jsonl"))}}
    config = local_config(tmp_path, model, paths=datasets)
    _torment(process, Run("run", config, tiny_recipe(**changes)), num_kills=10, seed=100 + seed)


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize(
    "changes", [ACCUMULATED, RHO1, CRITIC, BEST], ids=["plain", "rho1", "critic", "best"]
)
def test_many_kills_on_s3(
    changes: dict[str, Any], process: Zygote, model: Path, tmp_path: Path, s3_server: S3Server
) -> None:
    config = s3_config(s3_server, tmp_path.name, tmp_path, model)
    _torment(process, Run("run", config, tiny_recipe(**changes)), num_kills=15, seed=200)
