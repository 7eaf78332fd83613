"""The state of every global random number generator as integer tensors, and back.

Python's, NumPy's, torch's CPU and torch's CUDA generators. Integer tensors, because the usual alternative is
a pickle.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from wmtp.exceptions import CheckpointError

_MT19937_WORDS = 624


def capture_rng_state() -> dict[str, Tensor]:
    """Return the state of all global generators: `python`, `numpy` (int64), `torch` and `cuda.<i>` (uint8).

    Generators that a data sampler owns are its own affair: it puts their state into its own part of the
    checkpoint.
    """
    states = {"python": _python_state(), "numpy": _numpy_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda.{index}"] = state
    return states


def restore_rng_state(states: Mapping[str, Tensor]) -> None:
    """Put all global generators back to what `capture_rng_state` saw.

    CUDA states are restored for the devices that exist here: a checkpoint moves between machines with
    different numbers of them, and there the draws differ in any case.

    Raises:
        CheckpointError: a state is missing or has a form that does not fit.
    """
    try:
        _restore_python(states["python"])
        _restore_numpy(states["numpy"])
        torch.set_rng_state(states["torch"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"The random states of the checkpoint cannot be restored: {error!r}",
            remedy="Resume from another checkpoint.",
        ) from error
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{index}"], index)


def _python_state() -> Tensor:
    version, words, gauss = random.getstate()
    return torch.tensor([version, *words, *_float_words(gauss)], dtype=torch.int64)


def _restore_python(state: Tensor) -> None:
    version, *words = state.tolist()
    gauss = _float_from_words(words[-2:])
    random.setstate((version, tuple(words[:-2]), gauss))


def _numpy_state() -> Tensor:
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    if name != "MT19937":
        raise CheckpointError(
            f"NumPy's global generator is {name}, only MT19937 can be saved.",
            remedy="Leave NumPy's global generator as it is; use a numpy.random.Generator of your own.",
        )
    values = [
        *(int(word) for word in words),
        int(position),
        *_float_words(float(gauss) if has_gauss else None),
    ]
    return torch.tensor(values, dtype=torch.int64)


def _restore_numpy(state: Tensor) -> None:
    values = state.tolist()
    words, position = values[:_MT19937_WORDS], values[_MT19937_WORDS]
    gauss = _float_from_words(values[_MT19937_WORDS + 1 :])
    np.random.set_state(
        (
            "MT19937",
            np.array(words, dtype=np.uint32),
            position,
            int(gauss is not None),
            0.0 if gauss is None else gauss,
        )
    )


def _float_words(value: float | None) -> tuple[int, int]:
    # A cached normal draw: (is there one, its bits), so that not even the last bit is lost.
    return (0, 0) if value is None else (1, struct.unpack("<q", struct.pack("<d", value))[0])


def _float_from_words(words: list[int]) -> float | None:
    is_present, bits = words
    return struct.unpack("<d", struct.pack("<q", bits))[0] if is_present else None
