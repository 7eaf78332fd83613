"""A real MLflow server that works, hangs, dies and comes back."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from wmtp.settings import Config
from wmtp.tracking import (
    CompositeTracker,
    MetricsFile,
    TrackingWarning,
    create_tracker,
    download_model_artifact,
    read_metrics,
)
from wmtp.tracking.mlflow_tracker import MLflowManager

_START_S = 120.0

pytestmark = pytest.mark.slow


class _Server:
    """`mlflow server` on loopback; its processes are a group of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        # Made here: the server's own processes would each wait for it.
        MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        options = ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *options, "--artifacts-destination", str(self.folder / "artifacts")],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()
            self._process = None

    def close(self) -> None:
        if self._process is not None:
            self.send(signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Server]:
    running = _Server(tmp_path_factory.mktemp("mlflow_server"))
    try:
        running.start()
        yield running
    finally:
        running.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


def _history(server: _Server, run_id: str | None, key: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=server.uri)
    return sorted((entry.step, entry.value) for entry in client.get_metric_history(str(run_id), key))


def test_after_a_resume_each_step_is_there_once(server: _Server, tmp_path: Path) -> None:
    def log(tracker: CompositeTracker, step: int, speed: float) -> None:
        metrics = {
            "train/loss": math.nan if step == 4 else step / 7,
            "val/loss": math.inf if step == 5 else 1.0,
            "train/tokens_per_second": speed * step,
        }
        tracker.log_metrics(metrics, step)

    first = create_tracker(tmp_path / "run", experiment="resume", tracking_uri=server.uri)
    for step in range(1, 6):
        log(first, step, speed=1.0)
    first.log_metrics({"changed": 1.0}, 4)
    first.finish("interrupted")
    second = create_tracker(
        tmp_path / "run", experiment="resume", tracking_uri=server.uri, run_id=first.run_id, resume_step=3
    )
    for step in range(4, 7):
        log(second, step, speed=2.0)
    second.log_metrics({"changed": 2.0}, 4)
    second.finish()

    assert second.run_id == first.run_id
    losses = _history(server, first.run_id, "train/loss")
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert [value for step, value in losses if step != 4] == [step / 7 for step in (1, 2, 3, 5, 6)]
    assert [step for step, _ in _history(server, first.run_id, "val/loss")] == [1, 2, 3, 4, 5, 6]
    speeds = _history(server, first.run_id, "train/tokens_per_second")
    assert speeds == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 12.0)]
    # What really differs is added, and the later value is the one that MLflow shows.
    assert _history(server, first.run_id, "changed") == [(4, 1.0), (4, 2.0)]
    run = MlflowClient(tracking_uri=server.uri).get_run(str(first.run_id))
    assert run.data.metrics["changed"] == 2.0
    assert run.info.status == "FINISHED"


def test_a_model_is_registered_and_read_back(server: _Server, tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    config = Config.model_validate({"mlflow": {"tracking_uri": server.uri}})
    for version in (1, 2):
        (tmp_path / "head/value_head.safetensors").write_bytes(f"weights {version}".encode())
        manager = MLflowManager(server.uri, experiment="models")
        manager.log_model("some_head", tmp_path / "head", "critic/value_head")
        manager.finish()
        tags = manager.client.get_run(manager.run_id).data.tags
        assert tags["model.some_head"] == f"models:/some_head/{version}"
        folder = download_model_artifact(config, f"models:/some_head/{version}", tmp_path / str(version))
        assert (folder / "value_head.safetensors").read_bytes() == f"weights {version}".encode()
    manager.client.set_registered_model_alias("some_head", "best", "1")
    folder = download_model_artifact(config, "models:/some_head@best", tmp_path / "best")
    assert (folder / "value_head.safetensors").read_bytes() == b"weights 1"


def test_training_outlives_a_server_that_dies_or_hangs_and_all_arrives_when_it_is_back(
    server: _Server, tmp_path: Path
) -> None:
    def log(tracker: CompositeTracker, steps: range) -> None:
        for step in steps:
            began = time.perf_counter()
            tracker.log_metrics({"train/loss": step / 7}, step)
            assert time.perf_counter() - began < 0.2, "training does not wait"

    # It dies, and is still dead when the run ends.
    tracker = create_tracker(tmp_path / "run", experiment="faults", tracking_uri=server.uri)
    log(tracker, range(1, 6))
    assert tracker.flush()
    server.send(signal.SIGKILL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            log(tracker, range(6, 11))
            time.sleep(0.3)
        began = time.perf_counter()
        tracker.finish("interrupted")
    assert time.perf_counter() - began < 10
    messages = [str(warning.message) for warning in caught if warning.category is TrackingWarning]
    assert len(messages) == 2
    assert messages[0].startswith("Tracking failed")
    assert "16 entries did not reach" in messages[1]

    # It is back: the resumed run sends what the server missed, and goes on.
    server.start()
    manager = MLflowManager(server.uri, experiment="faults", run_id=tracker.run_id, resume_step=10)
    metrics_file = MetricsFile(tmp_path / "run/metrics.jsonl", resume_step=10)
    resumed = CompositeTracker(metrics_file, manager, retry_s=0.2)
    resumed.restore_metrics(up_to_step=10)
    assert resumed.flush()
    assert {step for step, _ in _history(server, tracker.run_id, "train/loss")} == set(range(1, 11))

    # It hangs: it takes connections and does not answer. Then it goes on.
    server.send(signal.SIGSTOP)
    log(resumed, range(11, 16))
    with pytest.warns(TrackingWarning, match="Tracking failed"):
        assert not resumed.flush()
    log(resumed, range(16, 21))
    server.send(signal.SIGCONT)
    resumed.finish()
    history = _history(server, tracker.run_id, "train/loss")
    assert [row for row in history if row[0] > 10] == [(step, step / 7) for step in range(11, 21)]
    assert {row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")} == set(range(1, 21))
    assert MlflowClient(tracking_uri=server.uri).get_run(str(tracker.run_id)).info.status == "FINISHED"
