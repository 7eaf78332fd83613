"""Which columns of the cache the tokens of a block may look at.

All rows see the same picture, shifted: everything before the block, and inside the block a token's ancestors
and itself. So the picture is drawn once, wide enough for any shift, and a step cuts its part out of it.

Shapes: B rows, T tokens of a block, K columns in use, C columns that fit.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BlockMask:
    """Additive attention masks of blocks that all have the same form.

    Args:
        is_ancestor_TT: entry [i, j]: whether token i of the block may look at token j; true on the diagonal.
        depth_T: how far behind the block's first token each one stands in the text.
        window: a token sees itself and the `window - 1` tokens before it; None sees all.
        capacity: C.
        dtype: of the attention scores.
    """

    def __init__(
        self,
        is_ancestor_TT: Tensor,
        depth_T: Tensor,
        *,
        window: int | None,
        capacity: int,
        dtype: torch.dtype,
    ) -> None:
        num_tokens = is_ancestor_TT.shape[0]
        device = is_ancestor_TT.device
        self._capacity = capacity
        before_TC = torch.ones(num_tokens, capacity, dtype=torch.bool, device=device)
        after_TC = torch.zeros(num_tokens, capacity, dtype=torch.bool, device=device)
        visible = torch.cat([before_TC, is_ancestor_TT, after_TC], dim=1)
        if window is not None:
            columns = torch.arange(-capacity, 0, device=device)
            positions = torch.cat([columns, depth_T, torch.arange(capacity, device=device)])
            visible &= depth_T[:, None] - positions[None, :] < window
        # Column `capacity` is the block's first token. Additive and in the scores' dtype, because attention
        # would turn booleans into this in every layer.
        self._picture = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )

    def cut(self, start: int | Tensor, num_columns: int) -> Tensor:
        """Return the mask [1 or B, 1, T, K] of blocks that begin at column `start` (a number, or [B])."""
        if isinstance(start, int):
            first = self._capacity - start
            return self._picture[None, None, :, first : first + num_columns]
        columns_BK = (self._capacity - start)[:, None] + torch.arange(num_columns, device=start.device)
        return self._picture[:, columns_BK].transpose(0, 1)[:, None]


def causal_blocks(num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ancestors [T,T] and depths [T] of a block whose tokens follow one another."""
    ancestors_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    return ancestors_TT, torch.arange(num_tokens, device=device)
