"""Two numerical checks that a wrapped model is understood, each a forward pass of a few tokens.

Families differ in ways a list of names cannot cover: a projection after the last layer, an unknown factor on
the logits, a recurrent state that runs on across documents. Instead of guessing from class names, the model
is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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
