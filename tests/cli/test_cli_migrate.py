"""`wmtp migrate` on the command line: what it prints, what it leaves alone, one message a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from s3_server import S3Server
from wmtp.cli.app import main
from wmtp.settings import load_config

OLD = """\
# Laptop
storage: {mode: local}
paths:
  models: {base_local: models/base}
  cache: old-cache
seed: 42
"""


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an old config and its cache."""
    folder = tmp_path / "project"
    (folder / "old-cache").mkdir(parents=True)
    (folder / "old-cache" / "model.safetensors").write_bytes(bytes(3000))
    (folder / "config.local.yaml").write_text(OLD)
    monkeypatch.chdir(folder)
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_config_is_written_beside_the_old_one_and_the_cache_stays_where_nobody_can_be_asked(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(project)
    assert run_cli("migrate", "--config", "config.local.yaml") == 0
    printed = capsys.readouterr().out
    for text in (
        "moved    paths.models.base_local -> paths.models.base",
        "dropped  seed -> none (belongs in the recipe: train.seed)",
        "wrote config.local.new.yaml; config.local.yaml is as it was",
        "next: wmtp validate --config config.local.new.yaml",
        f"old cache folder {project}/old-cache: 2.9 KiB in 1 files",
        "weights: 2.9 KiB in 1 files",
        "it stays: nobody can be asked here; remove it with --yes",
        "access to S3: not tried, config.local.yaml names nothing there",
    ):
        assert text in printed
    assert load_config("config.local.new.yaml").paths.models.base == "models/base"
    assert {name: content for name, content in everything(project).items() if name in before} == before


def test_with_yes_the_cache_is_removed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("migrate", "--config", "config.local.yaml", "--yes") == 0
    assert "2.9 KiB are free" in capsys.readouterr().out
    assert sorted(path.name for path in project.iterdir()) == ["config.local.new.yaml", "config.local.yaml"]


@pytest.mark.parametrize("options", [["--dry-run"], ["--dry-run", "--yes"]])
def test_a_dry_run_shows_everything_and_changes_nothing(
    options: list[str], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(project)
    assert run_cli("migrate", "--config", "config.local.yaml", *options) == 0
    printed = capsys.readouterr().out
    assert "dry run: config.local.new.yaml would be written:" in printed
    assert "    base: models/base" in printed
    assert "dry run: it would be removed" in printed
    assert everything(project) == before


def test_keep_cache_and_a_cache_that_is_in_use(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("migrate", "--config", "config.local.yaml", "--yes", "--keep-cache") == 0
    assert "old cache folder" not in capsys.readouterr().out
    (project / "config.local.yaml").write_text(OLD.replace("models/base", "old-cache/model"))
    assert run_cli("migrate", "--config", "config.local.yaml", "--yes", "--force") == 0
    printed = capsys.readouterr().out
    assert "which is in use" in printed
    assert "what was at config.local.new.yaml is now config.local.new.yaml.bak-" in printed
    assert (project / "old-cache" / "model.safetensors").exists()


def test_a_cache_stays_while_it_is_not_known_what_is_configured(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "config.local.yaml").write_text(OLD.replace("models/base", '"${WMTP_TEST_UNSET}/base"'))
    assert run_cli("migrate", "--config", "config.local.yaml", "--yes") == 0
    printed = capsys.readouterr().out
    assert "paths.models.base needs the environment variable WMTP_TEST_UNSET" in printed
    assert "old-cache stays: where paths.models.base is, is not known" in printed
    assert "access to S3 is not tried: paths.models.base" in printed
    assert (project / "old-cache").exists()


def test_a_present_config_is_left_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "config.yaml").write_text("paths: {output: runs}\n")
    assert run_cli("migrate", "--config", "config.yaml") == 0
    assert "is in the present layout already" in capsys.readouterr().out
    assert not (project / "config.new.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["nothing to migrate", "--config configs/config.local.yaml"]),
        (["--config", "absent.yaml"], ["absent.yaml does not exist", "working directory"]),
        (["--config", "config.local.yaml", "--output", "."], ["is a folder"]),
        (["--config", "config.local.yaml", "--output", "taken.yaml"], ["exists already", "--force"]),
        (["--config", "config.local.yaml", "--config", "absent.yaml"], ["absent.yaml does not exist"]),
        (
            ["--config", "config.local.yaml", "--config", "taken.yaml", "--output", "o.yaml"],
            ["one by one"],
        ),
        (["--config", "config.local.yaml", "--output", "s3://b/new.yaml"], ["is not a local file"]),
        (["--cache", "absent-cache"], ["there is no folder absent-cache"]),
        (["--cache", "/"], ["/ is not removed"]),
        (["--cache", "..", "--yes"], ["is not removed"]),
        (["--cache", "models", "--yes"], ["neither its name nor a config says that it is a cache"]),
        (["--checkpoint", "old.pt"], ["needs --base and --output", "does not say what model it is"]),
        (
            ["--checkpoint", "old.pt", "--base", "builtin:micro-llama", "--output", "out"],
            ["old.pt is not a file"],
        ),
        (
            ["--checkpoint", "x.pt", "--base", "absent-base", "--output", "out"],
            ["absent-base", "does not exist"],
        ),
        (
            ["--checkpoint", "x.pt", "--base", "builtin:micro-llama", "--output", "models"],
            ["not empty", "--force"],
        ),
        (
            ["--checkpoint", "x.pt", "--base", "builtin:micro-llama", "--output", "s3://b/k"],
            ["not a local folder"],
        ),
        (["--checkpoint", "x.pt", "--config", "config.local.yaml"], ["in a call of their own"]),
    ],
)
def test_a_mistake_is_one_message_and_changes_nothing(
    arguments: list[str], expected: list[str], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "taken.yaml").write_text("storage: {mode: local}\n")
    (project / "models").mkdir()
    (project / "models" / "a.bin").write_bytes(b"a")
    torch.save({"a": torch.zeros(1)}, project / "x.pt")
    before = everything(project)
    assert run_cli("migrate", *arguments) == 2
    captured = capsys.readouterr()
    shown = " ".join(captured.err.split())
    for text in expected:
        assert text in shown
    assert "Traceback" not in shown
    assert "remedy:" in shown
    assert everything(project) == before


def test_an_old_checkpoint_becomes_a_model_folder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from wmtp.components.loader.builtin import build_micro_llama

    torch.save({"model": build_micro_llama(seed=1).state_dict(), "optimizer": {}, "step": 3}, "old.pt")
    options = ("--checkpoint", "old.pt", "--base", "builtin:micro-llama", "--output", "out")
    assert run_cli("migrate", *options, "--dry-run") == 0
    assert "dry run: would convert" in capsys.readouterr().out
    assert not (project / "out").exists()
    assert run_cli("migrate", *options) == 0
    printed = capsys.readouterr().out
    for text in (
        f"converted {project}/old.pt to {project}/out",
        "541,536 parameters in float32, 1 head; configuration and tokenizer of builtin:micro-llama",
        "note: left out, as it is no part of a model: optimizer, step",
        f"--checkpoint {project}/out",
    ):
        assert text in printed
    assert json.loads((project / "out" / "wmtp.json").read_text())["metadata"]["converted_from"] == "old.pt"


def s3_text(server: S3Server, **change: Any) -> str:
    values = {
        "bucket": server.bucket,
        "endpoint_url": server.endpoint_url,
        "access_key_id": "${WMTP_TEST_KEY}",
        "secret_access_key": "${WMTP_TEST_SECRET}",
        "prefix": "old",
        **change,
    }
    lines = "".join(f'    {name}: "{value}"\n' for name, value in values.items())
    return f"storage:\n  mode: s3\n  s3:\n{lines}paths:\n  models: {{base_s3: models/base}}\n"


@pytest.mark.s3
@pytest.mark.parametrize("is_right", [True, False])
def test_access_to_s3_is_tried_with_the_new_config(
    is_right: bool,
    s3_server: S3Server,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    s3_server.filesystem().pipe_file(f"{s3_server.bucket}/old/models/base/config.json", b"{}")
    monkeypatch.setenv("WMTP_TEST_KEY", s3_server.access_key)
    monkeypatch.setenv("WMTP_TEST_SECRET", s3_server.secret_key if is_right else "wrong")
    (project / "config.local.yaml").write_text(s3_text(s3_server))
    assert run_cli("migrate", "--config", "config.local.yaml") == (0 if is_right else 1)
    printed = capsys.readouterr().out
    assert (project / "config.local.new.yaml").exists()
    if is_right:
        assert (
            f"works    s3: paths.models.base: s3://{s3_server.bucket}/old/models/base can be read" in printed
        )
        assert "was written, read and deleted" in printed
    else:
        assert "broken   s3: bucket wmtp" in printed
        assert "do: check the access key and its secret" in printed
    assert s3_server.secret_key not in printed
