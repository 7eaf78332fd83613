"""The evaluation type `self-speculation` on a tiny real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wmtp.components.evaluator import EvaluatorContext, SelfSpeculationEvaluator
from wmtp.components.loader.builtin import build_micro_llama, micro_tokenizer
from wmtp.components.tokenizer import HfTokenizer, TokenizerSettings
from wmtp.decoding import GenerationCounts, Speculation, compare_greedy, generate
from wmtp.evaluation.microcode import generate_problems, to_task
from wmtp.exceptions import UserInputError
from wmtp.modeling import MTPModel
from wmtp.settings.recipe_eval import EvalSettings


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> EvaluatorContext:
    folder = tmp_path_factory.mktemp("tokenizer")
    micro_tokenizer().save_pretrained(folder)
    model = MTPModel.from_causal_lm(build_micro_llama(), horizon=4, head="medusa").eval()
    tasks = [to_task(problem) for problem in generate_problems(split="test", num_problems=3)]
    return EvaluatorContext(
        model=model,
        tokenizer=HfTokenizer(TokenizerSettings(path=str(folder))),
        tasks={"microcode": tasks},
    )


def test_the_figures_are_those_of_generating_by_hand(context: EvaluatorContext) -> None:
    result = SelfSpeculationEvaluator(EvalSettings(max_new_tokens=16)).run(context)
    counts = GenerationCounts()
    generate(
        context.model.causal_lm,
        [context.tokenizer.encode_prompt(task.prompt) for task in context.tasks["microcode"]],
        tokenizer=context.tokenizer.tokenizer,
        max_new_tokens=16,
        speculation=Speculation(context.model),
        counts=counts,
    )
    acceptance = [*counts.acceptance, 0.0, 0.0, 0.0]
    assert result.metrics["speculation/tokens_per_forward"] == counts.tokens_per_forward
    for head in (1, 2, 3):
        assert result.metrics[f"speculation/acceptance_head_{head}"] == acceptance[head]
    assert result.metrics["speculation/speedup"] > 0
    assert result.metrics["speculation/mismatches"] == 0


def test_without_prompts_or_heads_it_says_so(context: EvaluatorContext) -> None:
    evaluator = SelfSpeculationEvaluator(EvalSettings(max_new_tokens=4))
    with pytest.raises(UserInputError, match="no prompts"):
        evaluator.run(EvaluatorContext(model=context.model, tokenizer=context.tokenizer))
    one_head = MTPModel.from_causal_lm(build_micro_llama(), horizon=1)
    with pytest.raises(UserInputError, match="one head"):
        evaluator.run(EvaluatorContext(model=one_head, tokenizer=context.tokenizer, tasks=context.tasks))


def test_a_near_tie_is_told_from_a_mismatch() -> None:
    model = build_micro_llama()
    prompt = [5, 6, 7]
    with torch.no_grad():
        order = model(torch.tensor([prompt])).logits[0, -1].argsort(descending=True).tolist()
        best, second, last = order[0], order[1], order[-1]
        same = compare_greedy(model, [prompt], [[best, 4]], [[best, 4]])
        apart = compare_greedy(model, [prompt] * 2, [[best, 4]] * 2, [[last, 4], [best]])
        model.lm_head.weight[second] = model.lm_head.weight[best]
        tie = compare_greedy(model, [prompt], [[best, 4]], [[second, 4]])
    assert (same.num_identical, same.near_ties, same.mismatches) == (1, [], [])
    assert apart.num_identical == 0
    assert apart.mismatches[0] > 0.1
    assert apart.mismatches[1] == float("inf")
    assert len(tie.near_ties) == 1
    assert tie.mismatches == []


@pytest.mark.parametrize(
    ("dtype", "gap", "is_tie"),
    [
        (torch.float32, 0.9e-4, True),
        (torch.float32, 1.1e-4, False),
        # A unit of bfloat16 is 1/16 between 8 and 16.
        (torch.bfloat16, 1 / 16, True),
        (torch.bfloat16, 3 / 16, False),
    ],
)
def test_how_near_a_tie_is_depends_on_the_precision(dtype: torch.dtype, gap: float, is_tie: bool) -> None:
    model = build_micro_llama().to(dtype)
    logits_V = torch.zeros(512, dtype=dtype)
    logits_V[7], logits_V[8] = 10.0, 10.0 - gap

    def answer(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = logits_V.expand_as(output.logits)
        return output

    with torch.no_grad():
        model.register_forward_hook(answer)
        compared = compare_greedy(model, [[5, 6]], [[7]], [[8]])
    assert (len(compared.near_ties), len(compared.mismatches)) == (int(is_tie), int(not is_tie))
