"""Signals and requests: kept or raised, agreed over ranks, and a way out when all else hangs."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest_trainer import Built, make_recipe, run

from wmtp.components.trainer.callbacks import Callback, RequestCallback, RunStopped, StopSignals
from wmtp.components.trainer.callbacks import signals as signals_module

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_raised_at_once_or_kept_and_handlers_are_given_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignals() as signals:
        with pytest.raises(RunStopped) as stopped:
            signal.raise_signal(number)
        assert stopped.value.number == number
    with StopSignals() as signals:
        with signals.deferred():
            signal.raise_signal(number)
            assert signals.received == number
        with pytest.raises(RunStopped):
            signals.check()
        # What the first signal unwinds is not unwound again by another.
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(each) for each in SIGNALS] == before


class Touch(Callback):
    """Touches a file after some steps and notes in which steps a save is asked for and the file is there."""

    def __init__(self, path: Path, steps: tuple[int, ...]) -> None:
        self.path = path
        self.steps = steps
        self.saved: list[int] = []
        self.was_there: list[bool] = []

    def on_step_start(self, run: Any) -> None:
        """Note whether the answered request is gone."""
        self.was_there.append(self.path.exists())
        if run.step in self.steps:
            self.path.touch()

    def on_step_end(self, run: Any, result: Any) -> None:
        """Answer."""
        if run.save_requested:
            self.saved.append(run.step)
            run.save_requested = False


def test_touching_a_file_saves_once_and_removes_it(
    build: Callable[..., Built],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("wmtp.components.trainer.callbacks.requests._LOOK_EVERY_S", 0.0)
    caplog.set_level(logging.INFO)
    path = tmp_path / "models/run/SAVE"
    with StopSignals() as signals:
        touch = Touch(path, (1, 4))
        callbacks = [RequestCallback(signals, path), touch]
        run(build(make_recipe(train={"max_steps": 6}), callbacks=callbacks))
    assert touch.saved == [2, 5]
    assert not any(touch.was_there)
    assert not path.exists()
    assert f"a checkpoint was asked for by {path}" in caplog.text


def test_the_file_is_looked_for_at_most_once_a_second(build: Callable[..., Built], tmp_path: Path) -> None:
    path = tmp_path / "SAVE"
    with StopSignals() as signals:
        requests, touch = RequestCallback(signals, path), Touch(path, (1,))
        began = time.monotonic()
        run(build(make_recipe(train={"max_steps": 4}), callbacks=[requests, touch]))
    if time.monotonic() - began < 1.0:
        assert touch.saved == []


def test_a_file_that_cannot_be_removed_is_not_answered_at_every_step(
    build: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wmtp.components.trainer.callbacks.requests._LOOK_EVERY_S", 0.0)
    # A folder of that name cannot be unlinked, not even by root.
    path = tmp_path / "SAVE"
    path.mkdir()
    with StopSignals() as signals:
        touch = Touch(path, ())
        run(build(make_recipe(train={"max_steps": 4}), callbacks=[RequestCallback(signals, path), touch]))
    assert touch.saved == [1]


_LOAD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("signals", {signals_module.__file__!r})
signals_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals_module)
StopSignals = signals_module.StopSignals
"""


def start_python(code: str) -> subprocess.Popen[str]:
    """Run a program that prints `ready`, and wait until it has.

    It loads the one module alone, without the seconds that torch takes to import.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _LOAD + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


_HANGING = """
import ctypes, signal, time
with StopSignals() as signals, signals.deferred():
    # The main thread never comes back to Python, as in a collective that another rank does not enter.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)
"""


def test_a_second_sigint_ends_a_process_that_hangs() -> None:
    process = start_python(_HANGING)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "second SIGINT: quitting at once" in errors


_FORKING = """
import os, signal, time
with StopSignals() as signals, signals.deferred():
    children = [os.fork() for _ in range(3)]
    if 0 in children:
        # A worker: it is neither ended by Ctrl-C nor heard of by the parent's count.
        time.sleep(0.7)
        os._exit(7)
    print("ready", flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(codes, signals.received.name, flush=True)
"""


def test_ctrl_c_in_a_terminal_reaches_workers_too_and_counts_once() -> None:
    # Three forks in a row make seven processes beside the parent, the last just born when the signal comes.
    process = start_python(_FORKING)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "[7, 7, 7] SIGINT" in output


@pytest.mark.distributed
def test_ranks_stop_and_save_at_the_same_step_when_one_is_asked(tmp_path: Path) -> None:
    number = signal.SIGUSR1
    script = Path(__file__).with_name("signal_ranks.py")
    save_files = [tmp_path / f"{rank}" / "SAVE" for rank in range(2)]
    outputs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    ranks = []
    for rank in range(2):
        arguments = [str(rank), "2", str(tmp_path / "meeting"), str(save_files[rank])]
        with open(outputs[rank], "w") as output:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(script), *arguments],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
    try:
        _wait_for(outputs[1], "step 3\n")
        save_files[1].touch()
        _wait_for(outputs[1], "saved ")
        ranks[1].send_signal(number)
        codes = [process.wait(timeout=60) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    texts = [output.read_text() for output in outputs]
    assert codes == [0, 0], texts
    saved = [re.findall(r"^saved (\d+)$", text, re.MULTILINE) for text in texts]
    stopped = [re.findall(r"^stopped (\d+ \w+)$", text, re.MULTILINE) for text in texts]
    assert len(saved[0]) == 1
    assert saved[0] == saved[1]
    assert len(stopped[0]) == 1
    assert stopped[0] == stopped[1]
    assert stopped[0][0].endswith(number.name)
    assert not save_files[1].exists()


def _wait_for(output: Path, text: str) -> None:
    deadline = time.monotonic() + 90
    while text not in output.read_text():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)
