"""Loading a model: `MTPModel.from_pretrained` beside transformers and beside the floor, in one run.

    python benchmarks/bench_loading.py                          # every layout, fp32 and bf16; Markdown tables
    python benchmarks/bench_loading.py --layouts file sharded --rounds 7 --hidden 512

A random Llama is written into a temporary directory in every layout. Each measurement is one load in a fresh
process that has loaded a tiny model of the same layout before, so that imports do not count. The loaders take
turns, round by round, so that all see the same machine. Files are in the page cache.

- floor: the same bytes read piece by piece into a buffer that stays in the processor's cache, and each piece
  converted into fresh memory. No loader that fills parameters of its own does with less.
- transformers: `AutoModelForCausalLM.from_pretrained`. Where nothing is converted its parameters stay views
  of the mapped file: next to no time and memory, the bytes are read at the first use, and the model changes
  when somebody writes the file anew. It has no reader for Meta's layout, and of the export it reads the
  next-token model alone, so there it has less to do.
- transformers, copied: the same, and every parameter that is a view copied: the work that wmtp does.
- wmtp: `MTPModel.from_pretrained`, the check of the structure (two forward passes of 16 tokens) included.

Memory: the largest growth of the process's resident set while it loads, without the pages of mapped files
(RssAnon: the page cache holds these and gives them up when memory runs short), sampled from outside every two
milliseconds in a run of its own, over the bytes of the loaded parameters.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from wmtp.modeling import MTPModel
from wmtp.modeling.formats.meta_native_write import write_native

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = ("file", "sharded", "bin", "native", "export")
CONVERTED = ("file", "native")
EXPORT_HORIZON = 4
_PIECE_BYTES = 2**18
_SAMPLE_EVERY_S = 0.002


def build_llama(hidden: int, layers: int, vocab: int) -> LlamaForCausalLM:
    """A random Llama in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def write_layouts(directory: Path, causal_lm: LlamaForCausalLM, dtype: str, layouts: list[str]) -> None:
    """Write `directory/<layout>-<dtype>` for every layout; converts the model in place."""
    causal_lm.to(DTYPES[dtype])
    for layout in layouts:
        path = directory / f"{layout}-{dtype}"
        match layout:
            case "file":
                causal_lm.save_pretrained(path, max_shard_size="100GB")
            case "sharded":
                causal_lm.save_pretrained(path, max_shard_size="64MB")
            case "bin":
                path.mkdir()
                causal_lm.config.save_pretrained(path)
                torch.save(causal_lm.state_dict(), path / "pytorch_model.bin")
            case "native":
                write_native(MTPModel.from_causal_lm(causal_lm, horizon=1), path, dtype=DTYPES[dtype])
            case "export":
                MTPModel.from_causal_lm(causal_lm, horizon=EXPORT_HORIZON).save_pretrained(path)


def weight_files(path: Path) -> list[Path]:
    """The files of tensors in a model's directory."""
    return sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))


# -------------------------------------------------------------------- loaders


def load_floor(path: Path, dtype: torch.dtype) -> object:
    """Read and convert the bytes and nothing else."""
    on_disk = DTYPES[path.name.rpartition("-")[2]]
    buffer = bytearray(_PIECE_BYTES)
    numbers = torch.frombuffer(buffer, dtype=on_disk)
    kept = []
    for file in weight_files(path):
        whole = torch.empty(file.stat().st_size // on_disk.itemsize, dtype=dtype)
        done = 0
        with file.open("rb", buffering=0) as stream:
            while count := min(stream.readinto(buffer) // on_disk.itemsize, whole.numel() - done):
                whole[done : done + count].copy_(numbers[:count])
                done += count
        kept.append(whole)
    return kept


def load_transformers(path: Path, dtype: torch.dtype) -> object:
    """Transformers alone."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def load_transformers_copied(path: Path, dtype: torch.dtype) -> object:
    """Transformers, and then parameters of its own in place of mapped ones."""
    causal_lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if dtype == DTYPES[path.name.rpartition("-")[2]]:
        for parameter in causal_lm.parameters():
            parameter.data = parameter.data.clone()
    return causal_lm


def load_wmtp(path: Path, dtype: torch.dtype) -> object:
    """The model with its heads."""
    return MTPModel.from_pretrained(path, dtype=dtype)


LOADERS: dict[str, Callable[[Path, torch.dtype], object]] = {
    "floor": load_floor,
    "transformers": load_transformers,
    "transformers, copied": load_transformers_copied,
    "wmtp": load_wmtp,
}


# -------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Measured:
    """One load: seconds, the growth of anonymous memory, and the bytes of what was loaded."""

    seconds: float
    peak_bytes: int
    loaded_bytes: int


def anonymous_bytes(process: int) -> int:
    """Resident memory of a process that is no page of a file."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # it has ended


def size_of(loaded: object) -> int:
    """Bytes of parameters, or of a list of tensors."""
    tensors = list(loaded.parameters()) if isinstance(loaded, torch.nn.Module) else loaded
    assert isinstance(tensors, list)
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def load_once(loader: str, path: Path, tiny: Path, dtype: torch.dtype) -> None:
    """What a process of its own does: load something tiny, say so, wait, load, and print what it took."""
    set_up()
    LOADERS[loader](tiny, dtype)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    loaded = LOADERS[loader](path, dtype)
    print(time.perf_counter() - start, size_of(loaded), flush=True)


def measure(loader: str, path: Path, dtype: str, *, is_sampled: bool = False) -> Measured:
    """Load once in a process of its own; `is_sampled` watches its memory, which costs it time."""
    tiny = path.parent / "tiny" / path.name
    command = [sys.executable, __file__, "--load", loader, str(path), str(tiny), dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise RuntimeError(f"{loader} failed on {tiny.name}")
        before = peak = anonymous_bytes(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        while is_sampled and child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(_SAMPLE_EVERY_S)
        answer = child.stdout.read().split()
    if len(answer) != 2:
        raise RuntimeError(f"{loader} failed on {path.name}")
    return Measured(float(answer[0]), peak - before, int(answer[1]))


@dataclass(frozen=True, slots=True)
class Row:
    """All measurements of one loader on one case."""

    seconds: list[float]
    peak_ratio: float


def measure_case(path: Path, dtype: str, rounds: int) -> dict[str, Row]:
    """Loader -> its measurements, in turns."""
    is_native = path.name.startswith("native")
    names = [name for name in LOADERS if not (is_native and name.startswith("transformers"))]
    sampled = {name: measure(name, path, dtype, is_sampled=True) for name in names}  # warms the page cache
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            seconds[name].append(measure(name, path, dtype).seconds)
    return {name: Row(seconds[name], sampled[name].peak_bytes / sampled[name].loaded_bytes) for name in names}


def print_case(name: str, num_bytes: int, rows: dict[str, Row]) -> None:
    """One line a loader."""
    others = rows.get("transformers, copied")
    for loader, row in rows.items():
        best, median = min(row.seconds), statistics.median(row.seconds)
        of_floor = best / min(rows["floor"].seconds)
        line = f"{best:.3f} | {median:.3f} | {num_bytes / best / 1e9:.2f} | {of_floor:.2f}"
        compared = ""
        if others is not None and loader == "wmtp":
            of_median = median / statistics.median(others.seconds)
            compared = f"{best / min(others.seconds):.2f} ({of_median:.2f})"
        print(f"| {name} | {loader} | {line} | {compared} | {row.peak_ratio:.2f} |", flush=True)


def set_up() -> None:
    """One thread, and no talk."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def main() -> None:
    """Write the models, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=24000)
    parser.add_argument("--load", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load is not None:
        loader, path, tiny, dtype = args.load
        load_once(loader, Path(path), Path(tiny), DTYPES[dtype])
        return
    set_up()
    directory = Path(tempfile.mkdtemp(prefix="bench-loading-"))
    try:
        run(args, directory)
    finally:
        shutil.rmtree(directory)


def run(args: argparse.Namespace, directory: Path) -> None:
    """Everything in one temporary directory."""
    for dtype in DTYPES:
        write_layouts(directory / "tiny", build_llama(32, 2, 64), dtype, args.layouts)
        write_layouts(directory, build_llama(args.hidden, args.layers, args.vocab), dtype, args.layouts)
    print(
        f"hidden={args.hidden} layers={args.layers} vocab={args.vocab} rounds={args.rounds} "
        f"threads={torch.get_num_threads()} torch {torch.__version__}\n"
    )
    print(
        "| layout, disk to memory | loader | min s | median s | GB/s | of floor | of copied (medians) "
        "| memory |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for layout in args.layouts:
        for disk, memory in itertools.product(DTYPES, DTYPES):
            # What is converted while it is read is so in every layout.
            if disk != memory and layout not in CONVERTED:
                continue
            path = directory / f"{layout}-{disk}"
            num_bytes = sum(file.stat().st_size for file in weight_files(path))
            print_case(f"{layout}, {disk} to {memory}", num_bytes, measure_case(path, memory, args.rounds))


if __name__ == "__main__":
    main()
