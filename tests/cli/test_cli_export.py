"""`wmtp export` on the command line: what it prints, and one clear message where it cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from wmtp.cli.app import main


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "micro"
    assert run_cli("export", "--checkpoint", "builtin:micro-llama", "--output", str(folder)) == 0
    return folder


def test_the_summary_says_what_was_written_how_to_load_it_and_what_is_next(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "half"
    arguments = ("--checkpoint", str(model), "--output", str(output), "--dtype", "bf16")
    assert run_cli("export", *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for text in (
        f"exported {model} to {output}",
        "541,536 parameters in bf16, 1 head",
        "model.safetensors",
        "MiB",
        f'AutoModelForCausalLM.from_pretrained("{output}")',
        f'MTPModel.from_pretrained("{output}")',
        f"--checkpoint {output}",
        f"lm_eval --model hf --model_args pretrained={output}",
    ):
        assert text in captured.out
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() == 541_536


def test_metas_layout_says_that_the_sentencepiece_file_is_missing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--checkpoint", str(model), "--output", str(tmp_path / "native"), "--format", "meta")
    assert run_cli("export", *arguments) == 0
    printed = capsys.readouterr().out
    assert "consolidated.pth" in printed
    assert "note: the checkpoint has no tokenizer.model" in printed
    assert "AutoModelForCausalLM" not in printed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"--checkpoint": "no/such/folder/x"}, ["no/such/folder/x"]),
        ({"--checkpoint": "."}, ["no checkpoint", "step-N"]),
        ({"--checkpoint": "s3://bucket/model"}, ["s3://bucket/model", "no credentials", "AWS_ACCESS_KEY_ID"]),
        ({"--checkpoint": "gs://bucket/model"}, ["gs://bucket/model", "s3:// address"]),
        ({"--checkpoint": "builtin:micro-base"}, ["builtin:micro-base", "runs/models/micro-base"]),
        ({"--output": "taken"}, ["taken", "not empty", "--force"]),
        ({"--output": "taken", "--force": None}, ["taken", "holds no model"]),
        ({"--output": "taken/file.txt"}, ["taken/file.txt", "is a file"]),
        ({"--output": "taken/file.txt/x"}, ["taken/file.txt/x", "cannot be written"]),
        ({"--output": "s3://bucket/x"}, ["s3://bucket/x", "local folder"]),
        ({"--format": "gguf"}, ["--format", "gguf"]),
        ({"--dtype": "int4"}, ["--dtype", "int4"]),
        ({"--horizon": "0"}, ["horizon is 0"]),
        ({"--horizon": "3"}, ["has 1 heads, 3 were asked for", "at most 1"]),
    ],
)
def test_bad_input_is_one_message_exit_2_and_nothing_written(
    options: dict[str, str | None],
    expected: list[str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    arguments = {"--checkpoint": str(model), "--output": "out", **options}
    assert run_cli("export", *(text for pair in arguments.items() for text in pair if text is not None)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    shown = " ".join(captured.err.split())
    for text in expected:
        assert text in shown
    assert "Traceback" not in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoint_and_output_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("export") == 2
    assert "--checkpoint" in capsys.readouterr().err
