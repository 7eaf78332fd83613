"""Two numerical checks that a wrapped model is understood, each a forward pass of a few tokens.

Families differ in ways a list of names cannot cover: a projection after the last layer, an unknown factor on
the logits, a recurrent state that runs on across documents. Instead of guessing from class names, the model
is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wmtp.exceptions import ModelLoadError, UserInputError

if TYPE_CHECKING:
    from wmtp.modeling.mtp_model import MTPModel

PROBE_LENGTH = 8


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off and gradients off inside the block, and restore the mode of every submodule after
    it.

    Consumes no random numbers, so a probe in the middle of training changes nothing that follows.
    """
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


def probe_tokens(vocab_size: int, device: torch.device) -> Tensor:
    """Return two rows whose first halves differ and whose second halves agree, [2, PROBE_LENGTH]."""
    half = PROBE_LENGTH // 2
    first_row = torch.arange(PROBE_LENGTH, device=device)
    second_row = torch.cat([torch.arange(half, device=device) + PROBE_LENGTH, first_row[half:]])
    return torch.stack([first_row, second_row]) % vocab_size


def differs(actual: Tensor, expected: Tensor) -> bool:
    """Tell whether two results of the same operations differ by more than the order of sums explains.

    In 16 bits a sum in another order mostly rounds to the same number, so the tolerance is a fraction of a
    step: a leak between documents can be smaller than one.
    """
    is_half = expected.dtype in (torch.bfloat16, torch.float16)
    tolerance = torch.finfo(expected.dtype).eps * (1 / 64 if is_half else 16)
    return bool((actual - expected).abs().max() > tolerance * expected.abs().max())


def verify_structure(model: MTPModel) -> None:
    """Compare head 0 with the wrapped model on a few tokens.

    Raises:
        ModelLoadError: they differ: the model does something unknown after its last layer.
    """
    tokens = probe_tokens(model.unembedding_VD.shape[0], model.device)
    with evaluating(model):
        expected_BSV = model.causal_lm(input_ids=tokens, use_cache=False).logits
        hidden_BSD = model.run_head(0, model.run_trunk_unchecked(tokens))
        is_understood = hidden_BSD.shape[-1] == model.hidden_size and not differs(
            model.unembed(hidden_BSD), expected_BSV
        )
    if not is_understood:
        raise ModelLoadError(
            f"{type(model.causal_lm).__name__} changes its hidden states or logits after the last decoder "
            "layer in a way that heads could not repeat",
            remedy="use a model whose logits are unembedding(norm(last layer)), scaled or soft-capped",
        )


def verify_document_isolation(model: MTPModel) -> None:
    """Check on a few tokens that a document does not see the one packed before it.

    Raises:
        UserInputError: it does, as with recurrent layers.
    """
    name = type(model.causal_lm).__name__
    remedy = (
        "switch packing off (data.train.pack_sequences: false), or load the model with SDPA attention "
        "where it has attention layers only"
    )
    if "position_ids" not in inspect.signature(model.causal_lm.base_model.forward).parameters:
        raise UserInputError(
            f"{name} takes no positions, so it cannot keep packed documents apart", remedy=remedy
        )
    half = PROBE_LENGTH // 2
    tokens = probe_tokens(model.unembedding_VD.shape[0], model.device)
    positions = (torch.arange(PROBE_LENGTH, device=model.device) % half).expand_as(tokens)
    with evaluating(model):
        hidden_BSD = model.run_head(0, model.run_trunk_unchecked(tokens, position_ids=positions))
    if differs(hidden_BSD[0, half:], hidden_BSD[1, half:]):
        raise UserInputError(
            f"{name} carries information from one packed document into the next (recurrent layers, or an "
            "attention implementation that ignores restarted positions)",
            remedy=remedy,
        )
