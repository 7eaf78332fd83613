"""Self-speculation measured: tokens a forward, acceptance of each head, and time beside plain decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain

from wmtp.components.base import Component
from wmtp.components.evaluator.base import EvaluationResult, EvaluatorContext
from wmtp.components.registry import evaluator_registry
from wmtp.decoding import GenerationCounts, Speculation, compare_greedy, generate
from wmtp.exceptions import UserInputError
from wmtp.modeling.formats.configuration import context_length
from wmtp.settings.recipe_eval import EvalSettings

_ROUNDS = 3
_MAX_PROMPTS = 64


@evaluator_registry.register("self-speculation", version="1.0.0")
class SelfSpeculationEvaluator(Component[EvaluatorContext, EvaluationResult]):
    """Greedy decoding with drafts beside the same without, on the prompts of `context.tasks`."""

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings

    def run(self, context: EvaluatorContext) -> EvaluationResult:
        """Write on from up to 64 prompts, one at a time, both ways in turns.

        Metrics: `speculation/tokens_per_forward`, `speculation/acceptance_head_{h}` (share of forwards in
        which the drafts of heads 1..h all stood), `speculation/speedup` (wall-clock, best of three rounds of
        each prompt), `speculation/near_ties` (texts that part where the two likeliest tokens are within 1e-4,
        or within the rounding of half precision) and `speculation/mismatches` (texts that part elsewhere,
        which would be a defect).

        Raises:
            UserInputError: there are no prompts, or the heads cannot draft.
        """
        tasks = list(chain.from_iterable(context.tasks.values()))[:_MAX_PROMPTS]
        if not tasks:
            raise UserInputError(
                "there are no prompts to write on from", remedy="name benchmarks in eval.datasets"
            )
        prompts = [context.tokenizer.encode_prompt(task.prompt) for task in tasks]
        counts = GenerationCounts()
        plain_s: list[float] = []
        drafted_s: list[float] = []
        plain: list[list[int]] = []
        drafted: list[list[int]] = []
        speculation = Speculation(context.model)
        with context.autocast():
            # Once for nothing: kernels are chosen and memory is taken at the first use.
            for way in (None, speculation):
                self._generate(context, prompts[0], way)
            for index, prompt in enumerate(prompts):
                for way, texts, seconds in ((None, plain, plain_s), (speculation, drafted, drafted_s)):
                    text, best_s = self._time(context, prompt, way)
                    texts.append(text)
                    seconds.append(best_s)
                self._generate(context, prompt, speculation, counts)
                context.on_progress("self-speculation", index + 1, len(prompts))
            comparison = compare_greedy(context.model.causal_lm, prompts, plain, drafted)
        metrics = {
            "speculation/tokens_per_forward": counts.tokens_per_forward,
            "speculation/speedup": sum(plain_s) / sum(drafted_s),
            "speculation/near_ties": float(len(comparison.near_ties)),
            "speculation/mismatches": float(len(comparison.mismatches)),
        }
        acceptance = [*counts.acceptance, *[0.0] * context.model.horizon]
        for head in range(1, context.model.horizon):
            metrics[f"speculation/acceptance_head_{head}"] = acceptance[head]
        return EvaluationResult(
            type="self-speculation", metrics=metrics, notes=self._notes(comparison.near_ties)
        )

    def _time(
        self, context: EvaluatorContext, prompt: Sequence[int], speculation: Speculation | None
    ) -> tuple[list[int], float]:
        """Return the new tokens, and the shortest time of a few calls in seconds."""
        seconds = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            token_ids = self._generate(context, prompt, speculation)
            seconds.append(time.perf_counter() - start)
        return token_ids, min(seconds)

    def _generate(
        self,
        context: EvaluatorContext,
        prompt: Sequence[int],
        speculation: Speculation | None,
        counts: GenerationCounts | None = None,
    ) -> list[int]:
        model = context.model.causal_lm
        (generation,) = generate(
            model,
            [prompt],
            tokenizer=context.tokenizer.tokenizer,
            max_new_tokens=self.settings.max_new_tokens,
            context_length=context_length(model.config),
            speculation=speculation,
            counts=counts,
        )
        return generation.token_ids

    def _notes(self, near_ties: Sequence[float]) -> list[str]:
        if not near_ties:
            return []
        return [
            f"self-speculation: {len(near_ties)} text(s) part from plain decoding at a near-tie, "
            f"where two tokens are at most {max(near_ties):.1e} apart."
        ]
