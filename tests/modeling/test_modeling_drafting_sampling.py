"""Sampling with drafts follows head 0's distribution exactly."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from drafting_reference import FORMS, build_drafting_model
from scipy import stats

from wmtp.decoding import GenerationCounts, Speculation, generate
from wmtp.modeling import MTPModel

VOCAB = 5
PROMPT = [3, 4, 3]
NUM_NEW = 4


def build(form: str) -> MTPModel:
    """A model of five tokens whose probabilities and drafts differ from context to context."""
    torch.manual_seed(1)
    model = build_drafting_model("llama", form, vocab_size=VOCAB, bos_token_id=None, eos_token_id=None)
    with torch.no_grad():
        model.unembedding_VD.mul_(0.8)
    return model


def sample(model: MTPModel, num_samples: int, *, widths: Sequence[int] | None = None, **options):
    """Texts of one prompt, and how often drafts stood."""
    counts = GenerationCounts()
    speculation = options.pop("speculation", Speculation(model, widths, options.pop("token_ids", None)))
    generations = generate(
        model.causal_lm,
        [PROMPT] * num_samples,
        tokenizer=None,
        max_new_tokens=NUM_NEW,
        keys=[(7, index) for index in range(num_samples)],
        batch_size=2000,
        speculation=speculation,
        counts=counts,
        **{"temperature": 1.0, **options},
    )
    return [tuple(generation.token_ids) for generation in generations], counts


@torch.no_grad()
def exact(model: MTPModel, *, temperature: float = 1.0, top_k: int = VOCAB) -> dict[tuple[int, ...], float]:
    """Probability of every text, from the whole model without a cache."""
    texts = list(itertools.product(range(VOCAB), repeat=NUM_NEW))
    tokens = torch.tensor([[*PROMPT, *text] for text in texts])
    logits = model.causal_lm(tokens).logits[:, len(PROMPT) - 1 : -1] / temperature
    threshold = logits.sort(descending=True).values[..., top_k - 1 : top_k]
    weights = logits.exp() * (logits >= threshold)
    chosen = (weights / weights.sum(-1, keepdim=True)).gather(2, torch.tensor(texts)[..., None])[..., 0]
    return dict(zip(texts, chosen.prod(1).tolist(), strict=True))


def p_value(samples: Sequence[tuple[int, ...]], probability: dict[tuple[int, ...], float]) -> float:
    """Chi-square test of the joint distribution of all tokens; rare texts count as one cell."""
    observed, num = Counter(samples), len(samples)
    assert all(probability[text] > 0 for text in observed)
    cells = [text for text in probability if probability[text] * num >= 8]
    expected = [probability[text] * num for text in cells]
    found = [float(observed[text]) for text in cells]
    if num - sum(expected) >= 1:
        expected.append(num - sum(expected))
        found.append(num - sum(found))
    scale = sum(found) / sum(expected)
    return float(stats.chisquare(found, [value * scale for value in expected]).pvalue)


CASES = [
    *((form, None, {}) for form in FORMS),
    ("transformer", (2, 2, 1), {}),
    ("linear", (3, 1, 2), {}),
    ("medusa", (2, 2), {}),
    ("transformer", None, {"temperature": 0.6, "top_k": 3}),
    ("transformer", (2, 1, 1), {"temperature": 1.7, "top_k": 4}),
    ("transformer", None, {"token_ids": [0, 3, 4]}),
]


@pytest.mark.parametrize(("form", "widths", "options"), CASES)
def test_texts_are_distributed_as_head_0_says_by_a_chi_square_test(form: str, widths, options: dict) -> None:
    model = build(form)
    samples, counts = sample(model, 4000, widths=widths, **options)
    shape = {name: value for name, value in options.items() if name != "token_ids"}
    assert p_value(samples, exact(model, **shape)) > 1e-3
    # Both ways through the acceptance were taken often.
    assert 0.05 < counts.acceptance[1] < 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("form", "widths", "options"), CASES)
def test_a_hundred_thousand_texts_are_distributed_as_head_0_says(form: str, widths, options: dict) -> None:
    model = build(form)
    samples, _ = sample(model, 100_000, widths=widths, seed=1, **options)
    shape = {name: value for name, value in options.items() if name != "token_ids"}
    assert p_value(samples, exact(model, **shape)) > 1e-3


def test_the_test_tells_a_wrong_distribution() -> None:
    model = build("transformer")
    samples, _ = sample(model, 4000)
    assert p_value(samples, exact(model, temperature=1.3)) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_draws_depend_on_seed_problem_sample_and_position_only(form: str) -> None:
    model = build(form)

    def run(order: Sequence[int], batch_size: int, seed: int = 0) -> dict[int, list[int]]:
        prompts = [[3 + index % 2] * (1 + index % 4) for index in range(12)]
        generations = generate(
            model.causal_lm,
            [prompts[index] for index in order],
            tokenizer=None,
            max_new_tokens=12,
            temperature=1.0,
            seed=seed,
            keys=[(index // 3, index % 3) for index in order],
            batch_size=batch_size,
            speculation=Speculation(model),
        )
        return {index: each.token_ids for index, each in zip(order, generations, strict=True)}

    together = run(range(12), 12)
    assert run(range(11, -1, -1), 5) == together
    assert run([4], 1) == {4: together[4]}
    assert run(range(12), 12, seed=1) != together


def test_trees_draw_the_very_tokens_of_plain_sampling() -> None:
    """Alternatives are fixed tokens, so the draw itself decides, and it is plain sampling's."""
    model = build("transformer")
    plain, _ = sample(model, 200, speculation=None)
    assert sample(model, 200, widths=(2, 2, 1))[0] == plain
