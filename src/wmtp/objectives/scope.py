"""Which (position, head) pair gets which token's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from wmtp.exceptions import UserInputError
from wmtp.objectives.labels import head_offsets, look_ahead

SpreadScope = Literal["target", "position"]


def spread_weights(
    weight_BS: Tensor, horizon: int, *, scope: SpreadScope = "target", offsets: Sequence[int] | None = None
) -> Tensor:
    """Give every (position, head) pair its weight.

    - scope `target`: `weight_BS` is indexed by token; w[t, h] = weight[t + h + 1], the weight of the token
      that is predicted, whichever head predicts it. 0 past the end of the sequence.
    - scope `position`: `weight_BS` is indexed by position; w[t, h] = weight[t], one weight for predicting
      from t. (Its score is that of token t + 1: `position_scores` turns token scores into position scores.)

    Example, `horizon=2`: weights (a b c d) give, for positions 0..3, target: (b c) (c d) (d 0) (0 0);
    position: (a a) (b b) (c c) (d d). Pairs without a target get a number too; the loss leaves them out.

    Args:
        weight_BS: [B, S].
        horizon: number of heads H.
        scope: `target` or `position`.
        offsets: H distances in tokens, default 1..H.

    Returns:
        weight_BSH, [B, S, H].

    Raises:
        UserInputError: unknown scope, horizon below 1, offsets that do not fit.
    """
    distances = head_offsets(horizon, offsets)
    if scope == "target":
        return look_ahead(weight_BS, distances, 0)
    if scope == "position":
        return weight_BS.unsqueeze(-1).repeat(1, 1, horizon)
    raise UserInputError(
        f"unknown weight scope {scope!r}",
        remedy="use 'target' or 'position'; scope 'head' has weights per pair",
    )
