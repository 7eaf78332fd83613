"""A small model that was really trained: converted, loaded, and fine-tuned with heads for further tokens."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
from collections import Counter
from pathlib import Path
from types import ModuleType

import glassllm
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wmtp.modeling import MTPModel
from wmtp.pipelines import RunOptions, run_training_pipeline
from wmtp.settings import Config, Recipe
from wmtp.tracking import read_metrics

CONVERTER = Path(__file__).parents[2] / "examples/glassllm/convert.py"
LIBRARY = ("argparse", "csv", "decimal", "difflib", "doctest", "email", "inspect", "json", "logging", "os")


def load_converter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("glassllm_convert", CONVERTER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def english_texts() -> list[str]:
    """English of which every machine has the same kind: documentation strings of the standard library."""
    texts = set()
    for name in LIBRARY:
        module = importlib.import_module(name)
        texts |= {inspect.getdoc(member) or "" for member in (module, *vars(module).values())}
    return sorted(text for text in texts if len(text) > 200)


@pytest.fixture(scope="module", params=["en", "pt"])
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def converted(language: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(language) / "model"
    load_converter().convert(directory, language)
    return directory


def test_logits_equal_those_of_the_package(converted: Path, language: str) -> None:
    source, tokenizer = glassllm.load_pretrained(language)
    ids = tokenizer.encode(" ".join(english_texts()[:8]))[: 2 * source.cfg.max_len]
    tokens_BS = torch.tensor(ids).view(2, source.cfg.max_len)
    expected = torch.from_numpy(source(tokens_BS.numpy()).data).double()
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(converted)(tokens_BS).logits
        heads = MTPModel.from_pretrained(converted, horizon=4)(tokens_BS).logits()
    assert (plain.double() - expected).abs().max() < 1e-4
    assert torch.equal(heads[:, :, 0], plain)


def test_the_tokenizer_gives_the_packages_ids_and_its_text_back(converted: Path, language: str) -> None:
    _, source = glassllm.load_pretrained(language)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    odd = [
        "",
        " ",
        "  a",
        "▁▁b _ c\n ",
        "the — “best” e\u0301 \u00e9 \u00df\t\r\n\n x",
        "não há coração\n\n\nà",
    ]
    for text in [*english_texts(), *odd]:
        ids = tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
        assert ids == source.encode(text), text
        if source.unk_id not in ids:
            assert tokenizer.decode(ids) == source.decode(ids)


def fine_tune(base: Path, folder: Path, *, max_steps: int, max_length: int) -> Path:
    """Train with horizon 4 on English text through the whole pipeline; return the run's metrics."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in english_texts()))
    config = {
        "paths": {"models": {"base": str(base)}, "output": str(folder / "out")},
        "devices": {"accelerator": "cpu", "precision": "fp32", "num_threads": 1},
    }
    recipe = {
        "train": {
            "algo": "baseline-mtp",
            "max_steps": max_steps,
            "log_every_steps": 1,
            "eval_every_steps": max_steps,
        },
        "model": {"mtp": {"horizon": 4}},
        "data": {
            "train": {"sources": [str(rows)], "batch_size": 8, "max_length": max_length},
            "eval": {"max_examples": 32},
        },
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "eval": {"datasets": []},
    }
    run_training_pipeline(
        Config.model_validate(config), Recipe.model_validate(recipe), options=RunOptions(run_name="run")
    )
    return folder / "out/reports/run/metrics.jsonl"


@pytest.mark.parametrize("language", ["en"], indirect=True)
def test_fine_tuning_lowers_the_loss_of_every_new_head(converted: Path, tmp_path: Path) -> None:
    history = read_metrics(fine_tune(converted, tmp_path, max_steps=10, max_length=32))
    training = [row for row in history if "train/ce_head_0" in row]
    for head in (1, 2, 3):
        losses = [row[f"train/ce_head_{head}"] for row in training]
        assert len(losses) == 10
        assert sum(losses[-3:]) / 3 < losses[0] - 1.5


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en"], indirect=True)
def test_fine_tuned_heads_predict_held_out_text_better_than_token_counts(
    converted: Path, tmp_path: Path
) -> None:
    history = read_metrics(fine_tune(converted, tmp_path, max_steps=150, max_length=128))
    validation = [row for row in history if "val/ce_head_0" in row][-1]
    tokenizer = AutoTokenizer.from_pretrained(converted)
    counts = Counter(
        token
        for text in english_texts()
        for token in tokenizer(text, truncation=True, max_length=128)["input_ids"]
    )
    # What a model would lose that knew how often each token occurs, held-out text included, and no more.
    entropy = -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())
    losses = [validation[f"val/ce_head_{head}"] for head in range(4)]
    assert losses == sorted(losses)
    assert all(loss < entropy for loss in losses)
    exported = MTPModel.from_pretrained(tmp_path / "out/models/run/final")
    assert exported.horizon == 4
