"""Pure tensor functions of the training objectives: label shift, losses, token weights, scores, advantages.

No state, no settings objects, nothing but torch. Shape suffixes: B batch, S sequence, H horizon (heads), V
vocabulary, D hidden, N flattened. Head h (0-based) at position t predicts token t + h + 1.
"""

from wmtp.objectives.advantages import explained_variance, generalized_advantages, roc_auc
from wmtp.objectives.fused_cross_entropy import (
    default_chunk_size,
    token_cross_entropy,
    weighted_mtp_cross_entropy,
)
from wmtp.objectives.labels import (
    IGNORE_INDEX,
    REDUCTIONS,
    Reduction,
    count_positions,
    count_targets,
    head_offsets,
    loss_normalizer,
    shift_labels,
)
from wmtp.objectives.losses import MtpLoss, compute_weighted_mtp_loss, pair_coefficients
from wmtp.objectives.running import ScoreStatistics, normalize_with_statistics, score_statistics
from wmtp.objectives.scope import SpreadScope, spread_weights
from wmtp.objectives.scores import (
    ExcessScore,
    excess_loss,
    index_by_token,
    position_scores,
    valid_tokens,
    value_deltas,
)
from wmtp.objectives.selection import (
    num_selected,
    random_skip_weights,
    select_top,
    shuffle_weights,
    tokenskip_weights,
    weighted_excess_weights,
)
from wmtp.objectives.weights import (
    blend_strength,
    normalize_document_weights,
    normalize_head_weights,
    normalize_weights,
    rescale_to_mean_one,
    weight_statistics,
)

__all__ = [
    "IGNORE_INDEX",
    "REDUCTIONS",
    "ExcessScore",
    "MtpLoss",
    "Reduction",
    "ScoreStatistics",
    "SpreadScope",
    "blend_strength",
    "compute_weighted_mtp_loss",
    "count_positions",
    "count_targets",
    "default_chunk_size",
    "excess_loss",
    "explained_variance",
    "generalized_advantages",
    "head_offsets",
    "index_by_token",
    "loss_normalizer",
    "normalize_document_weights",
    "normalize_head_weights",
    "normalize_weights",
    "normalize_with_statistics",
    "num_selected",
    "pair_coefficients",
    "position_scores",
    "random_skip_weights",
    "rescale_to_mean_one",
    "roc_auc",
    "score_statistics",
    "select_top",
    "shift_labels",
    "shuffle_weights",
    "spread_weights",
    "token_cross_entropy",
    "tokenskip_weights",
    "valid_tokens",
    "value_deltas",
    "weight_statistics",
    "weighted_excess_weights",
    "weighted_mtp_cross_entropy",
]
