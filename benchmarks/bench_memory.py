"""The memory estimate of `wmtp validate` against the peak of real training steps.

    python benchmarks/bench_memory.py                # every case, a fresh process each; a Markdown table
    python benchmarks/bench_memory.py --case NAME    # one case in this process, as JSON

Each case is estimated from its configuration on the meta device; then its model is built at random and runs
three optimizer steps of the trainer the recipe names. What is compared is the largest sum of bytes
that torch's CPU allocator had handed out at any time, weights included, from its own log (`torch.profiler`,
`profile_memory`): exact, free of what the process held before, and the same quantity as
`torch.cuda.max_memory_allocated`, less rounding. The growth of the resident set in a run without the profiler
stands beside it as a check from outside. It is less suited as a yardstick: freed pages stay resident,
fragmentation and the buffers of libraries count, and memory that is handed out and never touched does not.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from wmtp.components.data import BatchPlan, MTPDataCollator, TrainingData
from wmtp.components.optimizer import OptimizerContext
from wmtp.components.pretrainer import PretrainerContext, RewardedPrograms
from wmtp.components.scorer import ScorerSetup
from wmtp.components.trainer import TrainerContext
from wmtp.components.trainer.base import autocast_factory
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel, ValueHead, choose_trainable
from wmtp.modeling.formats.kinds import ModelKind
from wmtp.modeling.heads import SavedHeads
from wmtp.modeling.lora import add_lora
from wmtp.pipelines.memory import Helpers, MemoryEstimate, estimate_memory
from wmtp.pipelines.meta_models import ModelDescription, build_base, build_reference
from wmtp.settings import Config, Recipe

NUM_STEPS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """A small Llama and how it is trained."""

    hidden: int = 256
    layers: int = 6
    feed_forward: int = 688
    vocab: int = 4096
    num_kv_heads: int = 8
    tied: bool = False
    horizon: int = 4
    head: str = "transformer"
    adapter: str = "heads"
    algo: str = "baseline-mtp"
    current: str = "live"
    value_loss_coef: float = 0.1
    pretrain_rows: int = 2
    length: int = 512
    rows: int = 2
    documents: int = 1
    precision: str = "fp32"
    accumulation: int = 1
    trainable: str = "all"
    lora_rank: int | None = None

    def recipe(self) -> Recipe:
        """The recipe of the case."""
        lora = None if self.lora_rank is None else {"rank": self.lora_rank}
        data = {
            "train": {
                "algo": self.algo,
                "max_steps": NUM_STEPS,
                "gradient_accumulation_steps": self.accumulation,
            },
            "model": {
                "mtp": {"horizon": self.horizon, "head": self.head, "adapter": self.adapter},
                "trainable": self.trainable,
                "lora": lora,
            },
            "data": {
                "train": {
                    "sources": ["microcode"],
                    "batch_size": self.rows,
                    "max_length": self.length,
                    "pack_sequences": self.documents > 1,
                }
            },
            "rho1": {"current": self.current},
            "critic": {
                "value_loss_coef": self.value_loss_coef,
                "reward": {"source": "column"},
                "pretrain": {"max_steps": 2, "batch_size": self.pretrain_rows},
            },
        }
        return Recipe.model_validate(data)

    def config(self) -> Config:
        """Where the case runs."""
        return Config.model_validate({"devices": {"accelerator": "cpu", "precision": self.precision}})

    def llama(self) -> LlamaConfig:
        """The model's configuration."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=self.tied,
        )


_SMALL = Case()
CASES: dict[str, Case] = {
    "baseline": _SMALL,
    "one head": Case(horizon=1),
    "bf16": Case(precision="bf16"),
    "bf16, accumulation": Case(precision="bf16", accumulation=2),
    "packed": Case(documents=4),
    "packed, bf16, grouped keys": Case(documents=4, precision="bf16", num_kv_heads=2),
    "grouped keys": Case(num_kv_heads=2),
    "linear": Case(head="linear", precision="bf16"),
    "medusa": Case(head="medusa", precision="bf16"),
    "sequential": Case(head="sequential"),
    "sequential, bf16": Case(head="sequential", precision="bf16"),
    "teacher forcing": Case(adapter="teacher_forcing"),
    "rho1": Case(algo="rho1-wmtp", precision="bf16"),
    "rho1, frozen, accumulation": Case(algo="rho1-wmtp", current="frozen", accumulation=2),
    "critic": Case(algo="critic-wmtp", precision="bf16"),
    "critic, stage 1": Case(
        algo="critic-wmtp", precision="bf16", layers=2, length=256, rows=1, pretrain_rows=16
    ),
    "critic, stage 1, fp32": Case(algo="critic-wmtp", layers=2, length=256, rows=1, pretrain_rows=16),
    "large vocabulary, bf16": Case(vocab=32000, length=256, rows=1, precision="bf16"),
    "large vocabulary": Case(vocab=32000, length=256, rows=1),
    "long": Case(length=2048, rows=1, layers=4),
    "wide vocabulary, wide model": Case(
        vocab=32000, hidden=512, feed_forward=1376, length=256, rows=1, layers=3
    ),
    "wide feed-forward, one head": Case(vocab=128, feed_forward=4096, horizon=1, layers=2),
    "wide feed-forward, bf16": Case(vocab=128, feed_forward=4096, horizon=1, layers=2, precision="bf16"),
    "critic, shallow": Case(
        algo="critic-wmtp", precision="bf16", horizon=1, layers=2, vocab=128, length=1024
    ),
    "rho1, shallow": Case(algo="rho1-wmtp", horizon=1, layers=2, vocab=128, length=1024),
    "states alone": Case(hidden=512, feed_forward=1376, length=64, rows=1),
    "tied, wide horizon": Case(tied=True, horizon=8, layers=4),
    "LoRA": Case(lora_rank=16, precision="bf16"),
    "LoRA, fp32, packed": Case(lora_rank=16, documents=4),
    "heads only, linear": Case(trainable="heads_only", head="linear"),
    "heads only": Case(trainable="heads_only", precision="bf16"),
}


def estimate(case: Case) -> MemoryEstimate:
    """What `wmtp validate` says of the case."""
    recipe = case.recipe()
    description = ModelDescription("model", ModelKind.HUGGING_FACE, case.llama(), SavedHeads())
    model, _ = build_base(description, recipe)
    helpers = Helpers(
        reference=build_reference(description) if case.algo == "rho1-wmtp" else None,
        value_head=ValueHead.from_model(model) if case.algo == "critic-wmtp" else None,
    )
    return estimate_memory(case.config(), recipe, model, helpers)


def build(case: Case) -> tuple[TrainerContext, Recipe]:
    """Model, helpers, optimizer and data, as the training pipeline builds them."""
    recipe, config = case.recipe(), case.config()
    device = torch.device("cpu")
    precision = torch.bfloat16 if case.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(case.llama())
    model = MTPModel.from_causal_lm(causal_lm, horizon=case.horizon, head=case.head, adapter=case.adapter)
    if recipe.model.lora is not None:
        add_lora(model, **recipe.model.lora.model_dump(), compute_dtype=precision)
    choose_trainable(model, recipe.model.trainable)
    modules: dict[str, torch.nn.Module] = {"model": model}
    reference = value_head = None
    if case.algo == "rho1-wmtp":
        reference = MTPModel.from_causal_lm(AutoModelForCausalLM.from_config(case.llama()), horizon=1)
        reference = reference.to(precision).requires_grad_(False).eval()
    if case.algo == "critic-wmtp":
        value_head = train_value_head(case, recipe, model, precision)
        if case.value_loss_coef:
            modules["value_head"] = value_head
    scorer = ComponentFactory.create_scorer(recipe)
    if scorer is not None:
        scorer.prepare(ScorerSetup(model=model, reference=reference, value_head=value_head))
    optimizer = ComponentFactory.create_optimizer(recipe, config).run(
        OptimizerContext(modules, NUM_STEPS, {})
    )
    return TrainerContext(
        modules, optimizer, training_data(case), scorer=scorer, device=device, precision=precision
    ), recipe


def train_value_head(case: Case, recipe: Recipe, model: MTPModel, precision: torch.dtype) -> ValueHead:
    """Stage 1 of the critic, on full rows."""
    programs = features_of(case, recipe.critic.pretrain.batch_size, case.length)
    context = PretrainerContext(
        model=model,
        train=RewardedPrograms(programs, [True] * len(programs)),
        holdout=RewardedPrograms(programs[:2], [False, True]),
        collator=collator_of(case),
        device=torch.device("cpu"),
        autocast=autocast_factory(torch.device("cpu"), precision),
    )
    return ComponentFactory.create_pretrainer(recipe).run(context).value_head


class _Tokenizer:
    pad_token_id = eos_token_id = 0


def collator_of(case: Case) -> MTPDataCollator:
    """The collator of a case."""
    return MTPDataCollator({"tokenizer": _Tokenizer(), "horizon": case.horizon})


def features_of(case: Case, count: int, length: int) -> list[Any]:
    """Random tokens, every second row with a reward."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randint(1, case.vocab, (length,), generator=generator).tolist() for _ in range(count))
    return [
        {"input_ids": tokens, "labels": tokens, "row_id": str(index), "reward": float(index % 2)}
        for index, tokens in enumerate(rows)
    ]


def training_data(case: Case) -> TrainingData:
    """Rows full of random tokens."""
    length = case.length // case.documents
    features = features_of(case, case.rows * case.documents * case.accumulation, length)
    plan = BatchPlan(
        [length] * len(features), batch_size=case.rows, max_length=case.length, pack=case.documents > 1
    )
    return TrainingData(features, plan, collator_of(case))


def train(case: Case) -> None:
    """Three steps from scratch."""
    context, recipe = build(case)
    trainer = ComponentFactory.create_trainer(recipe, case.config())
    trainer.setup(context)
    trainer.run(context)


def peak_allocated(work: Callable[[], object]) -> int:
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


def resident_bytes() -> int:
    """Peak resident set of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_case(name: str) -> dict[str, Any]:
    """Estimate and measurement of one case, in bytes."""
    torch.set_num_threads(1)
    case = CASES[name]
    estimated = estimate(case)
    train(Case(hidden=32, layers=2, feed_forward=64, vocab=64, length=16, rows=1, algo=case.algo))  # imports
    before = resident_bytes()
    train(case)
    resident = resident_bytes() - before
    measured = peak_allocated(lambda: train(case))
    return {
        "name": name,
        "estimate": estimated.total,
        "measured": measured,
        "resident": resident,
    }


def main() -> None:
    """Run one case, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(run_case(arguments.case)))
        return
    print("| case | what differs | estimate MiB | measured MiB | ratio | resident MiB |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        command = [sys.executable, __file__, "--case", name]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        default = asdict(_SMALL)
        changed = ", ".join(f"{key}={value}" for key, value in asdict(case).items() if value != default[key])
        sizes = [row[key] / 2**20 for key in ("estimate", "measured", "resident")]
        ratio = row["estimate"] / row["measured"]
        print(f"| {name} | {changed} | {sizes[0]:.1f} | {sizes[1]:.1f} | {ratio:.2f} | {sizes[2]:.1f} |")


if __name__ == "__main__":
    main()
