"""pass@k: the chance that at least one of k samples is right, estimated without bias from n samples.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1 and figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wmtp.exceptions import UserInputError


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate 1 - C(n-c, k) / C(n, k) for one problem.

    The ratio of binomials is the product over i = n-c+1 .. n of (1 - k/i): no overflow, no cancellation.

    Args:
        num_samples: n, programs generated for the problem.
        num_correct: c, how many of them passed.
        k: how many tries a user has; at most `num_samples`.

    Raises:
        UserInputError: (a `ValueError`) a count is out of range.
    """
    if num_samples < 1:
        raise UserInputError(f"num_samples must be at least 1, got {num_samples}", remedy="generate a sample")
    if not 0 <= num_correct <= num_samples:
        raise UserInputError(
            f"num_correct must be in 0..{num_samples} (num_samples), got {num_correct}",
            remedy="check the counts",
        )
    if not 1 <= k <= num_samples:
        raise UserInputError(
            f"k must be in 1..{num_samples} (num_samples), got {k}",
            remedy="generate more samples or lower k",
        )
    if num_samples - num_correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_correct + 1, num_samples + 1)))


def mean_pass_at_k(num_samples: Sequence[int], num_correct: Sequence[int], k: int) -> float:
    """Return the mean of `pass_at_k` over problems; entry i of both sequences is about problem i.

    Raises:
        UserInputError: no problems, lengths differ, or a count is out of range.
    """
    if len(num_samples) != len(num_correct) or not num_samples:
        raise UserInputError(
            f"num_samples and num_correct must be equally long and not empty, got {len(num_samples)} and "
            f"{len(num_correct)}",
            remedy="give one entry per problem to both",
        )
    return float(np.mean([pass_at_k(n, c, k) for n, c in zip(num_samples, num_correct, strict=True)]))
