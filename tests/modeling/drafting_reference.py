"""Generation and drafting without a cache: the whole text goes through the whole model for every token.

Written for float64 models and small numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from modeling_families import FAMILIES, build_causal_lm, perturb

from wmtp.modeling import MTPModel

VOCAB_SIZE = 12
FORMS = ("transformer", "linear", "medusa", "sequential")


def build_drafting_model(
    family: str, form: str, *, horizon: int = 4, scale: float = 0.3, **changes: object
) -> MTPModel:
    """A random float64 model of few tokens, so that drafts stand by chance, and of large weights, so that
    each token depends on all before it. Its heads all differ; scale 0 leaves them as they start, as copies.
    """
    if family == "mixtral":
        # The fused kernel of its experts knows no float64.
        changes = {"experts_implementation": "eager", **changes}
    causal_lm = build_causal_lm(family, **{"vocab_size": VOCAB_SIZE, **changes})
    perturb(causal_lm, 0.3)
    model = MTPModel.from_causal_lm(causal_lm, horizon=horizon, head=form).eval()
    perturb(model.extra_heads, scale)
    return model.double()


def random_prompts(
    num: int, longest: int = 14, *, seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num,), generator=generator).tolist()
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def head_logits(model: MTPModel, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [S,H,V] of a text."""
    return model(torch.tensor([tokens])).logits()[0]


def naive_greedy(
    model: MTPModel, prompt: Sequence[int], num_new: int, end_ids: Sequence[int] = ()
) -> list[int]:
    new: list[int] = []
    while len(new) < num_new and not (new and new[-1] in end_ids):
        new.append(int(head_logits(model, [*prompt, *new])[-1, 0].argmax()))
    return new


def naive_candidates(
    model: MTPModel, seen: Sequence[int], next_token: int, widths: Sequence[int]
) -> list[list[int]]:
    """What heads 1, 2, ... draft after `seen` and `next_token`, from the last token of `seen`."""
    last = len(seen) - 1
    if model.head_form != "sequential":
        logits = head_logits(model, seen)[last]
        return [logits[head].topk(width).indices.tolist() for head, width in enumerate(widths, start=1)]
    tokens, candidates = [*seen, next_token], []
    for head, width in enumerate(widths, start=1):
        assert width == 1
        draft = int(head_logits(model, tokens)[last, head].argmax())
        candidates.append([draft])
        tokens.append(draft)
    return candidates


def naive_speculation(
    model: MTPModel, prompt: Sequence[int], new: Sequence[int], widths: Sequence[int]
) -> tuple[list[int], dict[int, list[list[int]]]]:
    """Speculate the way to the tokens `new`.

    Returns how many forwards gave 1, 2, ... tokens or more; and, by the number of tokens there were, what
    each head drafted.
    """
    counts = [1] + [0] * (model.horizon - 1)
    drafted = {}
    position = 1
    while position < len(new):
        candidates = naive_candidates(model, [*prompt, *new[: position - 1]], new[position - 1], widths)
        drafted[position] = candidates
        num_accepted = 0
        for depth, drafts in enumerate(candidates):
            if position + depth >= len(new) or new[position + depth] not in drafts:
                break
            num_accepted += 1
        num_kept = min(num_accepted + 1, len(new) - position)
        for head in range(num_kept):
            counts[head] += 1
        position += num_kept
    return counts, drafted


__all__ = [
    "FAMILIES",
    "FORMS",
    "VOCAB_SIZE",
    "build_drafting_model",
    "head_logits",
    "naive_candidates",
    "naive_greedy",
    "naive_speculation",
    "random_prompts",
]
