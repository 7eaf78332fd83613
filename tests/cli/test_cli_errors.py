"""Bad input on the command line: one clear message, exit code 2, nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from wmtp.cli.app import main

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG = CONFIGS / "config.local_test.yaml"
RECIPE = CONFIGS / "recipe.mtp_baseline.yaml"


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.max_stepss=3"], ["max_stepss", "max_steps"]),
        (["train.max_steps=many"], ["train.max_steps", "many"]),
        (["data.train.sources=[nowhere.jsonl]"], ["nowhere.jsonl"]),
        (["data.train.sources=[empty.jsonl]"], ["empty.jsonl", "no usable rows"]),
        (["data.train.sources=[bad.jsonl]"], ["bad.jsonl:2", "prompt"]),
        (["model.mtp.horizon=0"], ["model.mtp.horizon", "1"]),
        (["model.mtp.horizon=40", "data.train.max_length=32"], ["model.mtp.horizon", "max_length"]),
        (["optim.lr=.nan"], ["optim.lr", "finite"]),
        (["train.algo=ppo"], ["train.algo", "ppo", "baseline-mtp"]),
        (["paths.models.base=no/such/folder/here"], ["no/such/folder/here"]),
        (["devices.accelerator=cuda"], ["cuda"]),
        (["devices.strategy=fsdp2"], ["devices.strategy", "not available"]),
        (["model.mtp.head=hydra"], ["model.mtp.head", "hydra", "medusa"]),
        (["model.mtp.offsets=[1,3]"], ["model.mtp.offsets", "horizon"]),
        (["eval.datasets=[bad.jsonl]"], ["bad.jsonl"]),
        (["train.max_stepss=3", "optim.lr=-1", "model.mtp.horizon=0"], ["max_stepss", "optim.lr", "horizon"]),
    ],
)
def test_a_bad_setting_is_one_message_exit_2_and_nothing_written(
    overrides: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"question": "c"}\n')
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", "--config", str(CONFIG), "--recipe", str(RECIPE)]
    for override in ["paths.output=out", *overrides]:
        arguments += ["--set", override]
    assert run_cli(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in expected:
        assert text in captured.err
    assert captured.err.count("error:") == 1
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("train", "--config", "missing.yaml", "--recipe", str(RECIPE)) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_a_row_without_fields_can_be_skipped_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ['{"prompt": "a", "completion": "bcd efg"}'] * 9 + ['{"question": "c"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    arguments = ["train", "--config", str(CONFIG), "--recipe", str(RECIPE), "--dry-run"]
    for override in ("data.train.sources=[rows.jsonl]", "data.on_bad_row=skip", "eval.datasets=[]"):
        arguments += ["--set", override]
    assert run_cli(*arguments) == 0
    assert "rows.jsonl:10" in capsys.readouterr().err


def test_an_unknown_option_is_exit_2_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("train", "--recipes", "x") == 2
    assert "--recipes" in capsys.readouterr().err


def test_validate_lists_what_a_run_would_use(capsys: pytest.CaptureFixture[str]) -> None:
    root = CONFIGS.parents[1]
    config, recipe = root / "configs/config.example.yaml", root / "configs/recipe.rho1.yaml"
    assert run_cli("validate", "--config", str(config), "--recipe", str(recipe)) == 0
    printed = capsys.readouterr().out
    for text in ("builtin:micro-base (from paths.models.base)", "the same as the base's", "GiB", "sandbox"):
        assert text in printed or text.replace("GiB", "MiB") in printed


def test_validate_reports_all_problems_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["validate", "--config", str(CONFIG), "--recipe", str(RECIPE)]
    for override in ("paths.models.base=no/such/model/x", "data.train.sources=[gone.jsonl]"):
        arguments += ["--set", override]
    assert run_cli(*arguments) == 2
    errors = capsys.readouterr().err
    assert "no/such/model/x" in errors
    assert "gone.jsonl" in errors


@pytest.mark.parametrize("base", ["no/such/model/x", "organisation/model", "s3://bucket/model"])
def test_a_model_that_is_not_there_is_one_problem_and_not_one_of_its_tokenizer_too(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    arguments = ("--config", str(CONFIG), "--recipe", str(RECIPE), "--set", f"paths.models.base={base}")
    assert run_cli("validate", *arguments) == 2
    errors = capsys.readouterr().err
    assert "1 problem(s) found" in errors
    assert base in errors
    assert "tokenizer" not in errors


def test_schema_is_json_and_list_shows_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert "rho1" in json.dumps(schema)
    assert run_cli("list") == 0
    printed = capsys.readouterr().out
    for key in ("unified-model-loader", "rho1-excess-v1", "critic-head-pretrainer", "meta-mtp", "adamw"):
        assert key in printed


def test_list_of_an_unknown_kind_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("list", "wheels") == 2
    assert "scorer" in capsys.readouterr().err


def test_a_wrong_setting_is_answered_without_loading_torch(tmp_path: Path) -> None:
    bad = tmp_path / "recipe.yaml"
    bad.write_text(yaml.safe_dump({"train": {"algo": "ppo"}}))
    script = (
        "import sys\nfrom wmtp.cli.app import main\n"
        f"sys.argv = ['wmtp', 'train', '--config', {str(CONFIG)!r}, '--recipe', {str(bad)!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 2, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)
