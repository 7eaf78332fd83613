"""Speed of `wmtp.decoding.generate` beside `transformers`' own `generate`, in one run.

    python benchmarks/bench_generation.py
    python benchmarks/bench_generation.py --hidden 512 --layers 12 --rows 128

Both continue the same prompts with the same model, batch and dtype; the two take turns, and the median of the
ratios is reported. Three workloads: greedy to a fixed length (both do the same number of forwards), greedy
with prompts of one length, and sampling with rows that end at different times (about 1 token in 30 ends a
row).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wmtp.decoding import generate

VOCAB_SIZE = 512
PAD_ID = 0
END_IDS = list(range(1, 18))


def build_model(hidden: int, layers: int) -> LlamaForCausalLM:
    """Return a seeded Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=2048,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one word an id."""
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


def run_transformers(
    model: LlamaForCausalLM, prompts: list[list[int]], *, batch: int, new: int, sample: bool, eos: list[int]
) -> int:
    """Generate with `transformers`; returns the number of tokens that count."""
    generation = GenerationConfig(
        max_new_tokens=new,
        do_sample=sample,
        top_k=0,
        top_p=1.0,
        eos_token_id=eos or None,
        pad_token_id=PAD_ID,
        use_cache=True,
    )
    ordered = sorted(prompts, key=len, reverse=True)
    count = 0
    for start in range(0, len(ordered), batch):
        rows = ordered[start : start + batch]
        longest = max(map(len, rows))
        ids = torch.tensor([[PAD_ID] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        output = model.generate(ids, attention_mask=mask, generation_config=generation)[:, longest:]
        count += int((output != PAD_ID).sum())
    return count


def run_wmtp(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    *,
    batch: int,
    new: int,
    sample: bool,
    eos: list[int],
    seed: int,
) -> int:
    """Generate with this project; returns the number of tokens that count."""
    generations = generate(
        model,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=new,
        temperature=float(sample),
        eos_token_ids=eos,
        batch_size=batch,
        seed=seed,
    )
    return sum(len(generation.token_ids) for generation in generations)


def tokens_per_second(work: Callable[[], int]) -> float:
    """Return the speed of one call."""
    start = time.perf_counter()
    count = work()
    return count / (time.perf_counter() - start)


def main() -> None:
    """Print one line a workload: tokens per second of both, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = build_model(args.hidden, args.layers), build_tokenizer()
    source = random.Random(0)

    def prompts(low: int, high: int) -> list[list[int]]:
        return [
            [source.randrange(20, VOCAB_SIZE) for _ in range(source.randint(low, high))]
            for _ in range(args.rows)
        ]

    workloads = {
        "greedy, fixed length, mixed prompts": (prompts(40, 120), False, []),
        "greedy, fixed length, equal prompts": (prompts(80, 80), False, []),
        "sampling, rows end at different times": (prompts(40, 120), True, END_IDS),
    }
    print(f"{'workload':40} {'transformers':>14} {'wmtp':>14} {'ratio':>7}   (tokens/s; medians)")
    for name, (rows, sample, eos) in workloads.items():
        theirs, ours = [], []
        for round_index in range(args.rounds + 1):
            common = {"batch": args.batch, "new": args.new, "sample": sample, "eos": eos}
            speeds = (
                tokens_per_second(lambda r=rows, c=common: run_transformers(model, r, **c)),
                tokens_per_second(
                    lambda r=rows, c=common, s=round_index: run_wmtp(model, tokenizer, r, seed=s, **c)
                ),
            )
            if round_index:  # the first round warms up
                theirs.append(speeds[0])
                ours.append(speeds[1])
        ratio = statistics.median(own / other for own, other in zip(ours, theirs, strict=True))
        print(f"{name:40} {statistics.median(theirs):14.0f} {statistics.median(ours):14.0f} {ratio:7.2f}")


if __name__ == "__main__":
    main()
