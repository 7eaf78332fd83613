"""What the README tells people to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from wmtp.cli.app import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_block_runs() -> None:
    (block,) = _blocks("python")
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["labels_BSH"].shape == (2, 16, 4)  # type: ignore[attr-defined]


def test_the_commands_run_on_a_small_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    commands = [line for block in _blocks("bash") for line in block.splitlines() if line.startswith("wmtp ")]
    names = [shlex.split(command, comments=True)[1] for command in commands]
    assert names == ["validate", "train", "train", "eval", "export", "export", "train", "generate"]
    # The same commands on an untrained model, few steps and few problems, so that the test takes seconds.
    small = [
        "paths.models.base=builtin:micro-llama",
        "paths.models.ref=builtin:micro-llama",
        "train.max_steps=2",
        "optim.warmup_steps=1",
        "data.microcode.num_examples=64",
        "data.train.batch_size=2",
        "eval.max_problems=4",
        "eval.max_new_tokens=8",
    ]
    for name, command in zip(names, commands, strict=True):
        arguments = shlex.split(command.replace("runs/models", str(tmp_path / "models")), comments=True)[1:]
        if name == "export":
            arguments[arguments.index("--output") + 1] = str(tmp_path / arguments[4])
        if name == "generate":
            arguments += ["--max-new-tokens", "8"]
        for override in [] if name in ("export", "generate") else [*small, f"paths.output={tmp_path}"]:
            arguments += ["--set", override]
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert not stopped.value.code, capsys.readouterr().err
    assert (tmp_path / "my-model" / "config.json").is_file()
    assert (tmp_path / "my-native-model" / "consolidated.pth").is_file()


def test_every_link_of_the_readme_and_the_docs_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
