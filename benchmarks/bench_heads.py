"""A training step with each head form beside one with a single head: time, memory and predicted arithmetic.

    python benchmarks/bench_heads.py                  # both sizes, horizon 4
    python benchmarks/bench_heads.py --sizes micro --rounds 20

A step is forward, fused loss and backward, of the same random Llama in fp32. The forms take turns, round by
round, so that all see the same machine; times are compared by the best round, and by the median in brackets.
The prediction is the ratio of `wmtp.modeling.flops_per_token`, and the floor of the ratio of times as long as
arithmetic is what takes the time. Peak memory is the largest sum of bytes torch's allocator had handed out
during a step (`torch.profiler`), gradients included, parameters not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.components.loader.builtin import build_micro_llama
from wmtp.modeling import MTPModel, flops_per_token
from wmtp.modeling.heads import HEAD_FORMS
from wmtp.objectives import shift_labels, weighted_mtp_cross_entropy

ONE_HEAD = "one head"


def build_small() -> LlamaForCausalLM:
    """A random Llama: hidden size 512, 8 layers, vocabulary 8192."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


# Name -> how the model is made, rows and tokens a row.
SIZES: dict[str, tuple[Callable[[], LlamaForCausalLM], int, int]] = {
    "micro": (build_micro_llama, 4, 256),
    "small": (build_small, 1, 512),
}


def build(size: str, form: str, horizon: int) -> MTPModel:
    """The model of a size with heads of a form."""
    causal_lm = SIZES[size][0]()
    if form == ONE_HEAD:
        return MTPModel.from_causal_lm(causal_lm, horizon=1).train()
    if form == "teacher_forcing":
        return MTPModel.from_causal_lm(causal_lm, horizon=horizon, adapter=form).train()
    return MTPModel.from_causal_lm(causal_lm, horizon=horizon, head=form).train()


def step(model: MTPModel, tokens_BS: torch.Tensor) -> None:
    """Forward, fused loss, backward."""
    labels_BSH = shift_labels(tokens_BS, model.horizon)
    weighted_mtp_cross_entropy(model(tokens_BS).hidden_BSHD, model.unembedding_VD, labels_BSH).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest sum of bytes that torch's CPU allocator had handed out while `work` ran, beyond the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak


def measure(size: str, horizon: int, rounds: int) -> None:
    """Print the table of one size."""
    _, rows, length = SIZES[size]
    forms = (ONE_HEAD, *HEAD_FORMS)
    # All at once, so that they can take turns.
    models = {form: build(size, form, horizon) for form in forms}
    tokens = torch.randint(0, models[ONE_HEAD].unembedding_VD.shape[0], (rows, length))
    peaks = {form: peak_bytes(lambda model=model: step(model, tokens)) for form, model in models.items()}
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(rounds):
        for form, model in models.items():
            start = time.perf_counter()
            step(model, tokens)
            seconds[form].append(time.perf_counter() - start)
    flops = {form: flops_per_token(model, length) for form, model in models.items()}
    print(f"## {size}: {rows} x {length} tokens, {models[ONE_HEAD].num_parameters / 1e6:.1f} M parameters\n")
    print(
        "| form | min ms | GFLOP/s | ratio of times (medians) | predicted | measured / predicted "
        "| peak MiB | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for form in forms:
        best, base = min(seconds[form]), min(seconds[ONE_HEAD])
        medians = statistics.median(seconds[form]) / statistics.median(seconds[ONE_HEAD])
        predicted = flops[form] / flops[ONE_HEAD]
        speed = flops[form] * tokens.numel() / best / 1e9
        print(
            f"| {form} | {best * 1e3:.1f} | {speed:.0f} | {best / base:.2f} ({medians:.2f}) "
            f"| {predicted:.2f} | {best / base / predicted:.2f} | {peaks[form] / 2**20:.1f} "
            f"| {peaks[form] / peaks[ONE_HEAD]:.2f} |",
            flush=True,
        )
    print(flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"horizon={args.horizon} rounds={args.rounds} threads=1 torch {torch.__version__}\n")
    for size in args.sizes:
        measure(size, args.horizon, args.rounds)


if __name__ == "__main__":
    main()
