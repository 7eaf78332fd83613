"""`MTPModel.generate`: tensors in, tensors out.

Shapes: B rows, P prompt, T new tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wmtp.decoding import GenerationCounts, Speculation, generate
from wmtp.exceptions import UserInputError
from wmtp.modeling.formats.configuration import context_length

if TYPE_CHECKING:
    from wmtp.modeling.mtp_model import MTPModel


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """Options of `MTPModel.generate` that have a good default.

    Attributes:
        temperature, top_k, top_p, min_p: see `wmtp.decoding.SamplingSettings`; read when sampling.
        seed: of all draws, which depend on seed, row and position only.
        eos_token_ids: tokens that end a row; None takes the model's.
        pad_token_id: fills rows that ended earlier; None takes the model's, else 0.
        widths: alternatives that heads 1, 2, ... draft; None for one each.
        draft_token_ids: tokens that drafts are chosen among; None for all.
        batch_size: rows that run together.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    eos_token_ids: Sequence[int] | None = None
    pad_token_id: int | None = None
    widths: Sequence[int] | None = None
    draft_token_ids: Sequence[int] | None = None
    batch_size: int = 64


class GenerateKeywords(TypedDict, total=False):
    """`GenerateOptions` as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    eos_token_ids: Sequence[int] | None
    pad_token_id: int | None
    widths: Sequence[int] | None
    draft_token_ids: Sequence[int] | None
    batch_size: int


@dataclass(frozen=True, slots=True)
class GenerateOutput:
    """What was generated, and what it took.

    Attributes:
        sequences: [B, P + T]: the prompts as they came, the new tokens, and padding behind rows that ended.
        num_forwards: forwards of the model; rows that run together share one.
        accepted_per_head: [H]; entry 0: forwards that rows took part in, each of which gave a row one token
            of head 0; entry h: how many of them gave an (h+1)-th one, as the drafts of heads 1..h stood. The
            sum is the number of new tokens.
    """

    sequences: Tensor
    num_forwards: int
    accepted_per_head: list[int]


def generate_tokens(
    model: MTPModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    max_new_tokens: int,
    do_sample: bool,
    speculative: bool,
    options: GenerateOptions,
) -> GenerateOutput:
    """See `MTPModel.generate`."""
    if do_sample and options.temperature == 0:
        raise UserInputError(
            "do_sample=True with temperature 0", remedy="use do_sample=False, or a temperature above 0"
        )
    if (options.widths is not None or options.draft_token_ids is not None) and not speculative:
        raise UserInputError(
            "widths and draft_token_ids say how to draft, and speculative=False drafts nothing",
            remedy="leave them out, or use speculative=True",
        )
    counts = GenerationCounts(accepted_per_head=[0] * model.horizon)
    config = model.config
    generations = generate(
        model.causal_lm,
        _prompts(input_ids, attention_mask),
        tokenizer=None,
        max_new_tokens=max_new_tokens,
        temperature=options.temperature if do_sample else 0.0,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        eos_token_ids=_end_ids(model.causal_lm) if options.eos_token_ids is None else options.eos_token_ids,
        batch_size=options.batch_size,
        context_length=context_length(config),
        speculation=Speculation(model, options.widths, options.draft_token_ids) if speculative else None,
        counts=counts,
    )
    pad_id = options.pad_token_id
    if pad_id is None:
        pad_id = config.get_text_config(decoder=True).pad_token_id
    longest = max((len(generation.token_ids) for generation in generations), default=0)
    new_ids = torch.full(
        (len(generations), longest), pad_id or 0, dtype=input_ids.dtype, device=input_ids.device
    )
    for row, generation in enumerate(generations):
        new_ids[row, : len(generation.token_ids)] = torch.tensor(generation.token_ids, dtype=input_ids.dtype)
    return GenerateOutput(
        torch.cat([input_ids, new_ids], dim=1), counts.num_forwards, counts.accepted_per_head
    )


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Return the real tokens of each row."""
    if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        mask_shape = None if attention_mask is None else tuple(attention_mask.shape)
        raise UserInputError(
            f"input_ids has shape {tuple(input_ids.shape)}, attention_mask {mask_shape}",
            remedy="pass both as [B,P]",
        )
    rows: list[list[int]] = input_ids.tolist()
    if attention_mask is None:
        return rows
    prompts = []
    for index, (row, mask) in enumerate(zip(rows, attention_mask.tolist(), strict=True)):
        real = [position for position, value in enumerate(mask) if value]
        if real and real[-1] - real[0] + 1 != len(real):
            raise UserInputError(
                f"row {index} of attention_mask has padding between its tokens",
                remedy="pad on the left or on the right",
            )
        prompts.append([row[position] for position in real])
    return prompts


def _end_ids(causal_lm: PreTrainedModel) -> Sequence[int]:
    """Return the end-of-sequence tokens that the model names."""
    generation_config = causal_lm.generation_config
    named = None if generation_config is None else generation_config.eos_token_id
    if named is None:
        named = causal_lm.config.get_text_config(decoder=True).eos_token_id
    if named is None:
        return ()
    return (named,) if isinstance(named, int) else tuple(named)
