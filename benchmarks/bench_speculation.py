"""Self-speculation beside plain decoding and beside `transformers`' own `generate`, in one run.

    python benchmarks/bench_speculation.py                    # 4, 12 and 24 layers, transformer heads
    python benchmarks/bench_speculation.py --layers 4 --forms linear medusa sequential
    # a vocabulary that is large for the model: drafts chosen among all tokens, and among the frequent ones
    python benchmarks/bench_speculation.py --layers 4 --vocab 32000 --draft-tokens 0 128
    # heads that are unsure: chains and trees
    python benchmarks/bench_speculation.py --layers 12 --noise 0.5 --steps 80 --widths 1,1,1 2,2,1 3,2,1

Trains a small Llama on MicroCode without noise by the training pipeline (kept in `--folder` for the next
time), then lets it write held-out tasks greedily, a row at a time, in ways that take turns, so that all see
the same machine. A row's time is its best round, and the speed-up the ratio of the sums of these; the median
of the rounds' ratios stands in brackets.

Prediction: a forward costs what the weights weigh that it uses. Plain decoding uses L layers and one
unembedding; speculation L + H - 1 layers (or the heads' own small maps) and H unembeddings, one a head (of
these, H - 1 of the share of the vocabulary that drafts are chosen among), and gains `tokens per forward`
tokens for it. In brackets, stricter: two unembeddings, as the drafts' are one product.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.tokenizer.hf import TokenizerSettings
from wmtp.decoding import GenerationCounts, Speculation, generate
from wmtp.evaluation.microcode import build_tokenizer, generate_problems, to_task
from wmtp.modeling import MTPModel
from wmtp.pipelines import RunOptions, run_training_pipeline
from wmtp.pipelines.generation import tokens_to_draft
from wmtp.settings import load_config, load_recipe

CONFIGS = Path(__file__).parents[1] / "configs"


def train(args: argparse.Namespace, layers: int, form: str) -> Path:
    """Train a model by the project's own pipeline, unless it is there; returns its export."""
    folder, hidden = args.folder.absolute(), args.hidden
    name = f"{layers}-layers-{hidden}-{form}-{args.horizon}-heads-{args.steps}-steps"
    name += f"-{args.vocab}-tokens" if args.vocab else ""
    name += f"-noise-{args.noise}" if args.noise else ""
    export = folder / "models" / name / "final"
    if (export / "wmtp.json").is_file():
        return export
    base = folder / "bases" / f"{layers}-{hidden}-{args.vocab}"
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab or len(tokenizer),
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 24,
            max_position_embeddings=512,
            # What layers add up to must not grow with their number.
            initializer_range=0.08 * (4 / layers) ** 0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(llama.model.embed_tokens.weight)
    llama.save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = load_config(
        CONFIGS / "config.example.yaml",
        overrides=[f"paths.output={folder}", f"paths.models.base={base}"],
    )
    recipe = load_recipe(
        CONFIGS / "recipe.baseline.yaml",
        overrides=[
            f"train.max_steps={args.steps}",
            "train.eval_every_steps=null",
            f"model.mtp.horizon={args.horizon}",
            f"model.mtp.head={form}",
            f"data.microcode.wrong_ratio={args.noise}",
            f"data.microcode.comment_ratio={args.noise}",
            "data.microcode.num_examples=8000",
            f"optim.lr={3e-3 if layers <= 8 else 1.5e-3}",
            "optim.warmup_steps=20",
            "eval.datasets=[]",
        ],
    )
    run_training_pipeline(config, recipe, options=RunOptions(run_name=name))
    return export


def best_times(
    ways: dict[str, Callable[[Sequence[int]], int]], prompts: Sequence[Sequence[int]], rounds: int
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, int]]:
    """Let the ways take turns; returns sums of best seconds, seconds of each round, and tokens."""
    best = {name: [float("inf")] * len(prompts) for name in ways}
    total = {name: [0.0] * rounds for name in ways}
    tokens = dict.fromkeys(ways, 0)
    for prompt in prompts[:2]:
        for way in ways.values():
            way(prompt)
    for round_index in range(rounds):
        for row, prompt in enumerate(prompts):
            for name, way in ways.items():
                start = time.perf_counter()
                count = way(prompt)
                seconds = time.perf_counter() - start
                best[name][row] = min(best[name][row], seconds)
                total[name][round_index] += seconds
                tokens[name] += count if round_index == 0 else 0
    return {name: sum(each) for name, each in best.items()}, total, tokens


def cost_ratio(model: MTPModel, num_unembeddings: float) -> float:
    """Weights that a speculative forward uses over those of a plain one."""

    def size(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    layers = sum(map(size, model.decoder_layers))
    unembedding = model.unembedding_VD.numel()
    return (layers + size(model.extra_heads) + num_unembeddings * unembedding) / (layers + unembedding)


def measure(model: MTPModel, tokenizer: HfTokenizer, args: argparse.Namespace, label: str) -> None:
    """Print a line of the table for every shape of drafts."""
    tasks = [
        to_task(problem) for problem in generate_problems(split="test", num_problems=args.prompts, seed=1)
    ]
    prompts = [tokenizer.encode_prompt(task.prompt) for task in tasks]
    end_id = tokenizer.tokenizer.eos_token_id
    hf_config = GenerationConfig(
        max_new_tokens=args.new, do_sample=False, eos_token_id=end_id, pad_token_id=0, use_cache=True
    )

    def by_transformers(prompt: Sequence[int]) -> int:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.causal_lm.generate(ids, attention_mask=mask, generation_config=hf_config)
        return output.shape[1] - len(prompt)

    def by_wmtp(
        prompts: Sequence[Sequence[int]],
        speculation: Speculation | None = None,
        counts: GenerationCounts | None = None,
    ) -> list[list[int]]:
        generations = generate(
            model.causal_lm,
            prompts,
            tokenizer=None,
            max_new_tokens=args.new,
            eos_token_ids=[end_id],
            context_length=512,
            batch_size=args.batch,
            speculation=speculation,
            counts=counts,
        )
        return [generation.token_ids for generation in generations]

    plain_tokens = by_wmtp(prompts)
    shapes: dict[str, Speculation] = {}
    for widths in args.widths:
        for num_tokens in args.draft_tokens:
            name = f"{widths} of {num_tokens or 'all'} tokens"
            token_ids = tokens_to_draft("builtin:microcode", num_tokens, tokenizer) if num_tokens else None
            shapes[name] = Speculation(model, tuple(map(int, widths.split(","))), token_ids)
    ways: dict[str, Callable[[Sequence[int]], int]] = {
        "transformers": by_transformers,
        "plain": lambda prompt: len(by_wmtp([prompt])[0]),
    }
    for name, speculation in shapes.items():
        ways[name] = lambda prompt, speculation=speculation: len(by_wmtp([prompt], speculation)[0])
    best, rounds, tokens = best_times(ways, prompts, args.rounds)

    def ratio(first: str, second: str) -> str:
        pairs = zip(rounds[first], rounds[second], strict=True)
        median = statistics.median(one / other for one, other in pairs)
        return f"{best[first] / best[second]:.2f} ({median:.2f})"

    vocab_size = len(model.unembedding_VD)
    for name, speculation in shapes.items():
        counts = GenerationCounts()
        drafted_tokens = by_wmtp(prompts, speculation, counts)
        same = sum(ours == other for ours, other in zip(drafted_tokens, plain_tokens, strict=True))
        share = len(speculation.token_ids or range(vocab_size)) / vocab_size
        predicted = counts.tokens_per_forward / cost_ratio(model, 1 + (model.horizon - 1) * share)
        strict = counts.tokens_per_forward / cost_ratio(model, 1 + share)
        speed_up = best["plain"] / best[name]
        acceptance = " ".join(f"{share:.2f}" for share in counts.acceptance[1:])
        print(
            f"| {label} | {name} | {counts.tokens_per_forward:.2f} | {acceptance} "
            f"| {tokens['transformers'] / best['transformers']:.0f} | {tokens['plain'] / best['plain']:.0f} "
            f"| {tokens[name] / best[name]:.0f} | {ratio('transformers', 'plain')} | {ratio('plain', name)} "
            f"| {predicted:.2f} ({strict:.2f}) | {speed_up / predicted:.2f} ({speed_up / strict:.2f}) "
            f"| {same}/{len(prompts)} |",
            flush=True,
        )


def main() -> None:
    """Train where needed, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 12, 24])
    parser.add_argument("--forms", nargs="+", default=["transformer"])
    parser.add_argument("--widths", nargs="+", default=["1,1,1"], help="shapes of drafts")
    parser.add_argument("--draft-tokens", nargs="+", type=int, default=[0], help="drafted among; 0: all")
    parser.add_argument("--vocab", type=int, default=0, help="of the model; 0: the tokenizer's")
    parser.add_argument("--noise", type=float, default=0.0, help="share of wrong and of commented examples")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new", type=int, default=112)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wmtp-bench-speculation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| layers, heads | drafts | tokens per forward | acceptance of heads 1.. | transformers tokens/s "
        "| plain tokens/s | speculative tokens/s | plain over transformers | speed-up | predicted "
        "| measured / predicted | same tokens |"
    )
    print("|" + "---|" * 12, flush=True)
    for layers in args.layers:
        for form in args.forms:
            export = train(args, layers, form)
            if args.train_only:
                continue
            model = MTPModel.from_pretrained(export).eval().to(getattr(torch, args.dtype))
            tokenizer = HfTokenizer(TokenizerSettings(path=str(export)))
            measure(model, tokenizer, args, f"{layers}, {form}")


if __name__ == "__main__":
    main()
