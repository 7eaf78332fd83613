"""Weighted multi-token cross entropy, plain against fused: time and peak memory of a step, in one run.

    python benchmarks/bench_cross_entropy.py                      # CPU sizes
    python benchmarks/bench_cross_entropy.py --valid-ratio 0.4    # masked prompts and padding
    python benchmarks/bench_cross_entropy.py --device cuda --dtype bfloat16 --vocab 32000 --hidden 4096

Each variant is timed in turn, round by round, so that both see the same machine; the best round counts. Peak
memory is measured in a process of its own for each variant, above what the inputs take (resident size on a
CPU, allocated memory on CUDA), and includes the gradients of hidden states and unembedding.

The floor. With N = B * S * H pairs that have a target, V the vocabulary and D the hidden size:

- arithmetic: 3 matrix products (logits, gradient of the hidden states, gradient of the unembedding) of 2 * N
  * V * D each, 6 * N * V * D in all. No exact method does with less. The table gives the share of it that
  each variant reaches, against the speed of one large matrix product of the same dtype measured in the same
  run.
- memory traffic: every logit is written and read once by the products at each end of the softmax, and the
  softmax reads and writes it once, so about 6 * 4 * N * V bytes when a chunk does not fit the cache, against
  which arithmetic takes 6 * N * V * D: the loss is bound by arithmetic as soon as D is above a few times
  (operations per byte) of the machine.
- memory: the gradients themselves, N * D + V * D numbers, and one chunk of logits. The plain loss holds the
  logits, their log-softmax and their gradient, 3 * N * V numbers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from wmtp.objectives import compute_weighted_mtp_loss, shift_labels, weighted_mtp_cross_entropy

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(args: argparse.Namespace) -> Inputs:
    """Hidden states [1, S, H, D], unembedding [V, D], labels and weights [1, S, H]."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    place = {"device": args.device, "dtype": dtype}
    hidden = torch.randn(1, args.tokens, args.horizon, args.hidden, **place).requires_grad_()
    unembedding = (torch.randn(args.vocab, args.hidden, **place) * args.hidden**-0.5).requires_grad_()
    tokens = torch.randint(0, args.vocab, (1, args.tokens), device=args.device)
    tokens[:, : round(args.tokens * (1 - args.valid_ratio))] = -100
    labels = shift_labels(tokens, args.horizon)
    return hidden, unembedding, labels, torch.rand(labels.shape, device=args.device)


def run_plain(
    hidden: torch.Tensor, unembedding: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> None:
    """One step of the plain reference."""
    compute_weighted_mtp_loss(hidden @ unembedding.T, labels, weights).loss.backward()


def run_fused(
    hidden: torch.Tensor, unembedding: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> None:
    """One step of the fused loss."""
    weighted_mtp_cross_entropy(hidden, unembedding, labels, weights).loss.backward()


VARIANTS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]] = {
    "plain": run_plain,
    "fused": run_fused,
}


def synchronize(device: str) -> None:
    """Wait for the device, where it works asynchronously."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def measure_times(args: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Best seconds of each variant, and the machine's FLOP/s in one large matrix product."""
    inputs = make_inputs(args)
    best = dict.fromkeys(VARIANTS, float("inf"))
    best_product = float("inf")
    rows = min(args.tokens, 2048)
    left = torch.randn(rows, args.hidden, device=args.device, dtype=inputs[0].dtype)
    out = torch.empty(rows, args.vocab, device=args.device, dtype=inputs[0].dtype)
    right = inputs[1].detach().T
    for _ in range(args.rounds + 1):
        for name, variant in VARIANTS.items():
            inputs[0].grad = inputs[1].grad = None
            best[name] = min(best[name], timed(args.device, lambda variant=variant: variant(*inputs)))
        for _ in range(5):
            best_product = min(best_product, timed(args.device, lambda: torch.mm(left, right, out=out)))
    return best, 2 * rows * args.vocab * args.hidden / best_product


def resident_mib(field: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process; getrusage counts the parent's peak too."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status[field].split()[0]) / 2**10


def measure_peak_mib(args: argparse.Namespace, name: str) -> float:
    """Peak memory of one step above its inputs, in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def print_peak_of(args: argparse.Namespace) -> None:
    """Print the peak of one variant in MiB; runs in the process that `measure_peak_mib` starts."""
    inputs = make_inputs(args)
    # a tiny step first: thread pools and kernels are not the loss's memory
    small = tuple(tensor[:, :8] for tensor in (inputs[0], inputs[2], inputs[3]))
    VARIANTS[args.peak_of](small[0], inputs[1][:64], small[1].clamp(max=63), small[2])
    inputs[0].grad = inputs[1].grad = None
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        VARIANTS[args.peak_of](*inputs)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    before = resident_mib("VmRSS")
    VARIANTS[args.peak_of](*inputs)
    print(resident_mib("VmHWM") - before)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="plain against fused weighted multi-token cross entropy")
    parser.add_argument("--tokens", type=int, default=4096, help="positions, B * S")
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--valid-ratio", type=float, default=1.0, help="share of tokens that are targets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak_of(args)
        return
    seconds, flops_per_s = measure_times(args)
    peaks = {name: measure_peak_mib(args, name) for name in VARIANTS}
    num_pairs = args.tokens * args.horizon * args.valid_ratio
    floor_s = 6 * num_pairs * args.vocab * args.hidden / flops_per_s
    print(
        f"tokens={args.tokens} horizon={args.horizon} vocab={args.vocab} hidden={args.hidden} {args.dtype} "
        f"{args.device} threads={torch.get_num_threads()} valid={args.valid_ratio} torch {torch.__version__}"
    )
    print(f"arithmetic floor {floor_s:.3f} s at {flops_per_s / 1e9:.0f} GFLOP/s of one matrix product\n")
    print("| variant | seconds | of the floor | peak MiB |")
    print("|---|---|---|---|")
    for name in VARIANTS:
        print(f"| {name} | {seconds[name]:.3f} | {floor_s / seconds[name]:.0%} | {peaks[name]:.0f} |")
    time_ratio, peak_ratio = seconds["fused"] / seconds["plain"], peaks["fused"] / peaks["plain"]
    print(f"| fused / plain | {time_ratio:.2f} | | {peak_ratio:.2f} |")


if __name__ == "__main__":
    main()
