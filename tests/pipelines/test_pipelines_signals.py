"""What a signal does at each moment of `wmtp train`, in real processes: what is saved, said and returned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_pipelines_matrix import run_cli, train_arguments

from wmtp.tracking import read_metrics

# Long enough that a signal always comes before the end.
MANY = ("--max-steps", "5000", "--set", "optim.scheduler=constant")


@contextmanager
def training(output: Path, recipe: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`wmtp train` in a process group of its own, as a terminal or a job has."""
    arguments = train_arguments(recipe, output, *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "wmtp.cli.train", *arguments[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait while the process runs; a process that ended before is a failure."""
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_handlers(process: subprocess.Popen[str]) -> bool:
    """Whether the pipeline has begun: SIGUSR1 has a handler, which is the first thing it sees to."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def losses(output: Path, run: str = "run") -> dict[int, str]:
    """Logged losses by step, to the last bit."""
    file = output / "reports" / run / "metrics.jsonl"
    rows = read_metrics(file) if file.exists() else []
    return {int(row["step"]): float(row["train/loss"]).hex() for row in rows if "train/loss" in row}


def saved_steps(output: Path) -> list[int]:
    """Steps that have a checkpoint."""
    numbers = (path.name.removeprefix("step-") for path in (output / "models/run").glob("step-*"))
    return sorted(int(number) for number in numbers if number.isdigit())


def mlflow_status(output: Path) -> str:
    """How MLflow says that the only run ended."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    return str(run.info.status)


def ending(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was printed; never a traceback."""
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_in_the_steps_a_signal_to_the_whole_group_ends_after_a_save(
    number: signal.Signals, tmp_path: Path
) -> None:
    # With processes that prepare data: the signal reaches them too, and they must not fail the step.
    with training(
        tmp_path, "mtp_baseline", "--run-name", "run", *MANY, "--set", "data.train.num_workers=2"
    ) as process:
        wait_until(process, lambda: len(losses(tmp_path)) >= 2)
        os.killpg(process.pid, number)
        code, errors = ending(process)
    assert code == 4, errors
    (step,) = saved_steps(tmp_path)
    assert step == max(losses(tmp_path))
    assert f"{number.name} ended the run after step {step}; the state is in" in errors
    assert f"--resume {tmp_path}/models/run" in errors
    assert mlflow_status(tmp_path) == "KILLED"


@pytest.mark.slow
def test_sigterm_to_the_whole_group_lets_the_step_and_the_save_be_finished(tmp_path: Path) -> None:
    with training(
        tmp_path, "mtp_baseline", "--run-name", "run", *MANY, "--set", "data.train.num_workers=2"
    ) as process:
        wait_until(process, lambda: len(losses(tmp_path)) >= 2)
        os.killpg(process.pid, signal.SIGTERM)
        code, errors = ending(process)
    assert code == 4, errors
    (step,) = saved_steps(tmp_path)
    assert step == max(losses(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_before_the_first_step_there_is_nothing_to_save(number: signal.Signals, tmp_path: Path) -> None:
    with training(tmp_path, "mtp_baseline", "--run-name", "run", *MANY) as process:
        wait_until(process, lambda: has_handlers(process))
        process.send_signal(number)
        code, errors = ending(process)
    assert code == 128 + number, errors
    assert f"{number.name} ended the run before its first step; there is nothing to save yet" in errors
    assert saved_steps(tmp_path) == []


@pytest.mark.slow
def test_stage_1_of_the_critic_ends_at_once(tmp_path: Path) -> None:
    more = ("--set", "critic.pretrain.max_steps=100000")
    with training(tmp_path, "critic_wmtp", "--run-name", "run", *MANY, *more) as process:
        wait_until(process, (tmp_path / "models/run/critic/programs.jsonl").exists)
        process.send_signal(signal.SIGTERM)
        code, errors = ending(process)
    assert code == 143, errors
    assert "before its first step" in errors
    assert mlflow_status(tmp_path) == "KILLED"


@pytest.mark.slow
def test_a_resumed_run_that_has_not_begun_says_where_it_is(tmp_path: Path) -> None:
    arguments = ("--run-name", "run", "--set", "optim.scheduler=constant")
    assert run_cli(*train_arguments("mtp_baseline", tmp_path, *arguments)) == 0
    resume = ("--resume", str(tmp_path / "models/run"))
    with training(tmp_path, "mtp_baseline", *MANY, *resume) as process:
        assert process.stderr is not None
        while "going on from" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        code, errors = ending(process)
    assert code == 4, errors
    assert f"before its first step; it is where it was, at {tmp_path}/models/run/step-4" in errors
    assert f"go on with --resume {tmp_path}/models/run" in errors
    assert saved_steps(tmp_path) == [4]


@pytest.mark.slow
def test_after_training_the_checkpoint_is_named_and_a_resume_finishes_the_run(tmp_path: Path) -> None:
    # The evaluation writes many tokens for many problems, so the signal comes within it.
    more = ("--set", "eval.max_problems=500", "--set", "eval.max_new_tokens=128")
    with training(tmp_path, "mtp_baseline", "--run-name", "run", *more) as process:
        wait_until(process, (tmp_path / "models/run/final/wmtp.json").exists)
        process.send_signal(signal.SIGTERM)
        code, errors = ending(process)
    assert code == 4, errors
    assert f"SIGTERM ended the run after training, which is saved in {tmp_path}/models/run/step-4" in errors
    assert not (tmp_path / "reports/run/report.html").exists()
    resume = train_arguments("mtp_baseline", tmp_path, "--resume", str(tmp_path / "models/run"))
    assert run_cli(*resume) == 0
    assert (tmp_path / "reports/run/report.html").exists()
    assert len(losses(tmp_path)) == 4


@pytest.mark.slow
def test_a_killed_data_worker_is_one_clear_error(tmp_path: Path) -> None:
    workers = ("--set", "data.train.num_workers=2")
    with training(tmp_path, "mtp_baseline", "--run-name", "run", *MANY, *workers) as process:
        wait_until(process, lambda: len(losses(tmp_path)) >= 1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        code, errors = ending(process)
    assert code == 1, errors
    assert "a process that prepares training data has died" in errors
    assert "lower data.train.num_workers" in errors
    assert "bug in WMTP" not in errors
    assert mlflow_status(tmp_path) == "FAILED"


@pytest.mark.slow
def test_touching_save_makes_a_checkpoint_while_training_goes_on(tmp_path: Path) -> None:
    with training(tmp_path, "mtp_baseline", "--run-name", "run", *MANY) as process:
        wait_until(process, lambda: len(losses(tmp_path)) >= 2)
        save_file = tmp_path / "models/run/SAVE"
        save_file.touch()
        wait_until(process, lambda: saved_steps(tmp_path) != [] and not save_file.exists())
        (on_demand,) = saved_steps(tmp_path)
        logged = len(losses(tmp_path))
        wait_until(process, lambda: len(losses(tmp_path)) > logged)
        process.send_signal(signal.SIGTERM)
        code, errors = ending(process)
    assert code == 4, errors
    assert "a checkpoint was asked for by" in errors
    assert saved_steps(tmp_path)[0] == on_demand
    assert len(saved_steps(tmp_path)) == 2


@pytest.mark.slow
def test_a_second_sigint_ends_training_without_a_save(tmp_path: Path) -> None:
    # Steps of seconds, so that the second signal comes within the step that the first one let be finished.
    long = ("--set", "train.gradient_accumulation_steps=200")
    with training(tmp_path, "mtp_baseline", "--run-name", "run", *MANY, *long) as process:
        wait_until(process, lambda: len(losses(tmp_path)) >= 1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        code, errors = ending(process)
    assert code == 130, errors
    assert time.monotonic() - began < 2
    assert "second SIGINT: quitting at once" in errors
    assert saved_steps(tmp_path) == []
