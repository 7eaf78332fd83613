"""`wmtp validate` on the 7B production recipes: folders with configuration files and no weights."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_pipelines_matrix import run_cli

from wmtp.components.loader.builtin import micro_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"

# What the published configuration files say. Meta's 7B_1T_4: 29 blocks of trunk and head 0, three more heads.
META_7B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_future_tokens": 4,
    "multiple_of": 256,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}
CODE_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHEARED_LLAMA = {
    **CODE_LLAMA,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
FSFAIRX = {
    **CODE_LLAMA,
    "architectures": ["LlamaForSequenceClassification"],
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}
STARLING = {**CODE_LLAMA, "vocab_size": 32001, "max_position_embeddings": 4096, "rope_theta": 10000.0}


def _block(hidden: int, feed_forward: int, keys: int) -> int:
    """A Llama layer: query, key, value and output maps, three of the feed-forward network, two norms."""
    return 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * feed_forward + 2 * hidden


# By hand: 32 blocks of 202,383,360, two matrices of 32000 x 4096 and the final norm.
LLAMA_7B = 32 * _block(4096, 11008, 4096) + 2 * 32000 * 4096 + 4096
# Rank 64 beside the seven matrices of the 28 blocks that are the trunk of 7B_1T_4.
ADAPTERS = 28 * 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
SHEARED = 32 * _block(2560, 6912, 2560) + 2 * 32000 * 2560 + 2560
# Decoders without unembedding, and a head of D numbers.
FSFAIRX_SIZE = 32 * _block(4096, 14336, 1024) + 128256 * 4096 + 4096 + 4096
STARLING_SIZE = 32 * _block(4096, 11008, 4096) + 32001 * 4096 + 4096 + 4096


def _folder(path: Path, facts: dict[str, Any]) -> Path:
    """A model folder without weights; its tokenizer is small, since only files can tell what it would be."""
    path.mkdir()
    name = "params.json" if "dim" in facts else "config.json"
    micro_tokenizer().save_pretrained(path)
    (path / name).write_text(json.dumps(facts))
    return path


def _arguments(recipe: str, root: Path, *more: str, **models: dict[str, Any]) -> list[str]:
    rows = root / "mbpp.jsonl"
    tests = ["assert double(1) == 2"]
    fields = {"text": "Double a number.", "code": "def double(x):\n    return 2 * x\n", "test_list": tests}
    lines = [json.dumps({"task_id": 601 + index, **fields}) for index in range(3)]
    lines += [json.dumps({"task_id": 11 + index, **fields}) for index in range(3)]
    rows.write_text("\n".join(lines))
    arguments = ["validate", "--config", str(CONFIGS / "config.s3.yaml")]
    arguments += ["--recipe", str(CONFIGS / f"recipe.{recipe}.7b.yaml")]
    settings = [f"paths.datasets.mbpp={rows}", "data.train.sources=[mbpp]", "eval.datasets=[mbpp,humaneval]"]
    settings += [f"model.{role}_id={_folder(root / role, facts)}" for role, facts in models.items()]
    for setting in (*settings, *more):
        arguments += ["--set", setting]
    return arguments


def _findings(printed: str) -> dict[str, str]:
    lines = (re.fullmatch(r"(?:ok|problem)\s+([^:]+): (.*)", line) for line in printed.splitlines())
    return {match[1]: match[2] for match in lines if match is not None}


def _gib(text: str, name: str) -> float:
    match = re.search(rf"{name} ([\d.]+) GiB", text)
    assert match is not None, (name, text)
    return float(match[1])


def test_the_counts_by_hand_are_those_of_the_published_models() -> None:
    assert LLAMA_7B == 6_738_415_616
    assert SHEARED == 2_701_560_320
    assert FSFAIRX_SIZE == 7_504_928_768
    assert STARLING_SIZE == 6_607_351_808


def test_rho1_of_7b_is_validated_in_seconds_and_without_its_memory(tmp_path: Path) -> None:
    arguments = _arguments("rho1", tmp_path, base=META_7B, ref=CODE_LLAMA)
    # Peak resident size of the process itself, weights of 7B would be 25 GiB.
    script = (
        "import re, sys, time\n"
        "from pathlib import Path\n"
        "from wmtp.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n"
        # Of this process alone: what resource.getrusage knows includes the one it was forked from.
        "    peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]\n"
        "    print('used', peak, time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, seconds = done.stderr.split("used ")[-1].split()
    assert int(peak) * 1024 < 1.5 * 2**30
    # Of the processor's time: the machine may be busy with other tests.
    assert float(seconds) < 60
    found = _findings(done.stdout)
    assert found["base model"].endswith("base (from model.base_id)")
    assert (
        "native model of Meta's: 29 layers, hidden size 4096, vocabulary 32000, 4 heads"
        in (found["base model kind"])
    )
    assert found["parameters"] == f"{LLAMA_7B:,} with 4 heads, and {ADAPTERS:,} in adapters"
    assert found["reference parameters"] == f"{LLAMA_7B:,} frozen"
    assert found["heads"].startswith("4 of the form transformer, offsets [1, 2, 3, 4]; the checkpoint has 4")
    # The blocks of four heads in full, and the adapters.
    assert found["trained"].startswith(f"{4 * _block(4096, 11008, 4096) + ADAPTERS:,} parameters")
    memory = found["memory estimate"]
    assert "on cuda in bf16" in memory
    assert _gib(memory, "weights") == pytest.approx((LLAMA_7B + ADAPTERS) * 4 / 2**30, abs=0.01)
    assert _gib(memory, "reference") == pytest.approx(LLAMA_7B * 2 / 2**30, abs=0.01)


@pytest.mark.slow
def test_the_smaller_reference_and_the_whole_model_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments("rho1", tmp_path, "model.lora=null", base=META_7B, ref=SHEARED_LLAMA)
    assert run_cli(*arguments) == 0
    found = _findings(capsys.readouterr().out)
    assert found["reference parameters"] == f"{SHEARED:,} frozen"
    assert found["trained"].startswith(f"{LLAMA_7B:,} parameters, 0 frozen")
    memory = found["memory estimate"]
    assert _gib(memory, "optimizer moments") == pytest.approx(LLAMA_7B * 8 / 2**30, abs=0.01)
    assert _gib(memory, "gradients") == pytest.approx(LLAMA_7B * 4 / 2**30, abs=0.01)


@pytest.mark.parametrize(
    ("facts", "size", "kind"),
    [(FSFAIRX, FSFAIRX_SIZE, "sequence classification"), (STARLING, STARLING_SIZE, "Starling-RM")],
)
def test_reward_models_are_told_apart_and_counted(
    facts: dict[str, Any], size: int, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*_arguments("critic", tmp_path, base=META_7B, rm=facts)) == 0
    found = _findings(capsys.readouterr().out)
    assert kind in found["reward model kind"]
    assert found["reward model parameters"] == f"{size:,} frozen"
    # A decoder layer, a norm, and a map to one number.
    assert found["value head parameters"] == f"{_block(4096, 11008, 4096) + 4096 + 4097:,}"


@pytest.mark.slow
def test_a_checkpoint_with_more_heads_than_asked_for_is_cut_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("model.mtp.horizon=2", "model.lora=null")
    assert run_cli(*_arguments("baseline", tmp_path, *more, base=META_7B)) == 0
    printed = capsys.readouterr().out
    assert "has 4 heads; the first 2 are used" in printed
    assert f"{LLAMA_7B - 2 * _block(4096, 11008, 4096):,} with 2 heads" in printed


@pytest.mark.slow
def test_a_model_without_heads_gets_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*_arguments("baseline", tmp_path, "model.lora=null", base=CODE_LLAMA)) == 0
    found = _findings(capsys.readouterr().out)
    assert "the checkpoint has 1, model.mtp.horizon asks for 4" in found["heads"]
    assert found["parameters"] == f"{LLAMA_7B + 3 * _block(4096, 11008, 4096):,} with 4 heads"


def test_more_heads_than_there_are_need_the_adapter_that_adds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("model.mtp.horizon=6", "model.mtp.adapter=fallback")
    assert run_cli(*_arguments("baseline", tmp_path, *more, base=META_7B)) == 2
    error = capsys.readouterr().err
    assert "has 4 heads and horizon 6 asks for more" in error


def test_every_problem_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = _arguments(
        "rho1",
        tmp_path,
        "model.ref_id=nobody-at-all/no-such-model",
        "data.train.max_length=8192",
        base=META_7B,
    )
    assert run_cli(*arguments) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "nobody-at-all/no-such-model (from model.ref_id)" in error
    assert "data.train.max_length is 8192 tokens, but the base model was made for 4096" in error


def test_a_vocabulary_left_to_a_missing_tokenizer_and_a_folder_of_folders_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*_arguments("baseline", tmp_path, base={**META_7B, "vocab_size": -1})) == 2
    assert "no tokenizer.model beside it" in " ".join(capsys.readouterr().err.split())
    root = tmp_path / "models"
    root.mkdir()
    _folder(root / "7B_1T_4", META_7B)
    arguments = _arguments("baseline", tmp_path, f"model.base_id={root}")
    assert run_cli(*arguments) == 2
    assert "7B_1T_4/" in capsys.readouterr().err


def test_a_classifier_with_two_labels_is_no_reward_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    assert run_cli(*_arguments("critic", tmp_path, base=META_7B, rm={**FSFAIRX, **labels})) == 2
    assert "a classifier with 2 labels" in " ".join(capsys.readouterr().err.split())


def test_this_process_never_held_a_model_of_this_size() -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < 4 * 2**30
