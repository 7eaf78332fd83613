"""The memory estimate against the peak of real steps, and its parts against counts by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.modeling import MTPModel
from wmtp.pipelines.memory import Helpers, MemoryEstimate, estimate_training
from wmtp.settings import Recipe

BAND = 0.15


def _load_benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks/bench_memory.py"
    spec = importlib.util.spec_from_file_location("bench_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_memory"] = module
    spec.loader.exec_module(module)
    return module


bench = _load_benchmark()
SMALL = {"hidden": 64, "feed_forward": 192, "layers": 3, "vocab": 512, "length": 256, "rows": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "documents": 4, "accumulation": 2},
        {"algo": "rho1-wmtp", "head": "sequential", "horizon": 3, "precision": "bf16", "num_kv_heads": 2},
        {"algo": "critic-wmtp", "horizon": 1, "pretrain_rows": 8},
        {"trainable": "heads_only", "head": "medusa", "precision": "bf16"},
        {"lora_rank": 4, "precision": "bf16"},
        {"hidden": 256, "feed_forward": 688, "length": 32, "rows": 1},
    ],
    ids=["plain", "packed", "rho1", "critic stage 1", "heads only", "LoRA", "states"],
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(changes: dict[str, Any]) -> None:
    case = bench.Case(**{**SMALL, **changes})
    measured = bench.peak_allocated(lambda: bench.train(case))
    assert bench.estimate(case).total == pytest.approx(measured, rel=BAND)


def test_the_measurement_sees_what_is_allocated_and_freed_again() -> None:
    def work() -> None:
        kept = torch.zeros(1000, 250)
        for _ in range(3):
            kept = kept + 1

    assert bench.peak_allocated(work) == pytest.approx(2 * 1_000_000, rel=0.01)


def _estimate(compute: int = 4, device_type: str = "cpu", **settings: Any) -> MemoryEstimate:
    data = {
        "train": {"algo": "baseline-mtp", "max_steps": 1, "gradient_accumulation_steps": 2},
        "model": {"mtp": {"horizon": 2}},
        "data": {
            "train": {"sources": ["microcode"], "batch_size": 3, "max_length": 64, "pack_sequences": False}
        },
        **settings,
    }
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        model = MTPModel.from_causal_lm(LlamaForCausalLM(config), horizon=2)
    recipe = Recipe.model_validate(data)
    return estimate_training(model, recipe, Helpers(), compute=compute, device_type=device_type)


def test_the_parts_of_a_plain_run_are_those_counted_by_hand() -> None:
    estimate = _estimate()
    block = 4 * 32 * 32 + 3 * 32 * 80 + 2 * 32
    assert estimate.num_parameters == estimate.num_trained == 3 * block + 2 * 100 * 32 + 32
    parts = estimate.parts
    assert parts["weights"] == parts["gradients"] == 4 * estimate.num_parameters
    assert parts["optimizer moments"] == 8 * estimate.num_parameters
    # Three blocks, two final norms and the stacked output; heads 0 and 1 share the trunk as their input.
    layer = 6 * 32 + 4 * 32 + 4 * 80
    assert parts["activations"] == 3 * 64 * 4 * (3 * layer - 32 + 2 * 2 * 32 + 2 * 32)


def test_an_asynchronous_checkpoint_is_a_copy_of_weights_and_moments_in_the_hosts_memory() -> None:
    train = {"algo": "baseline-mtp", "max_steps": 1, "async_checkpoints": True}
    on_cpu, on_gpu = _estimate(train=train), _estimate(train=train, device_type="cuda")
    parts = on_cpu.parts
    assert parts["checkpoint copy"] == parts["weights"] + parts["optimizer moments"]
    assert "checkpoint copy" not in on_gpu.parts


def test_a_padded_token_limit_counts_in_place_of_rows() -> None:
    train = {"sources": ["microcode"], "max_tokens_per_batch": 640, "max_length": 64, "pack_sequences": False}
    limited = _estimate(data={"train": train})
    assert limited.parts["activations"] * 3 == _estimate().parts["activations"] * 10


def test_half_precision_keeps_less_per_token_and_copies_of_the_weights() -> None:
    long = {"train": {"sources": ["microcode"], "max_length": 4096, "pack_sequences": False}}
    assert _estimate(2, data=long).parts["activations"] < _estimate(4, data=long).parts["activations"]
    short = {"train": {"sources": ["microcode"], "max_length": 4, "pack_sequences": False}}
    assert _estimate(2, data=short).parts["activations"] > _estimate(4, data=short).parts["activations"]


def test_the_description_names_total_device_moment_and_parts() -> None:
    text = _estimate().describe()
    assert "on cpu in fp32, at the loss" in text
    assert "optimizer moments" in text
