"""A reward model: a decoder that scores text, told after each token.

Shapes: B batch, S sequence, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wmtp.exceptions import UserInputError
from wmtp.modeling.formats.configuration import context_length
from wmtp.modeling.formats.reward import read_reward_model
from wmtp.modeling.formats.sources import ModelSource
from wmtp.modeling.hidden_states import extract_hidden_states
from wmtp.modeling.packing import plan_attention


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """Scores of a batch of texts.

    Attributes:
        token_scores_BS: fp32, the score of the text up to and including each token; 0 on padding.
        pooled_B: fp32, the score of the whole text: that of its last real token.
    """

    token_scores_BS: Tensor
    pooled_B: Tensor


class RewardModel(nn.Module):
    """A decoder without unembedding and a linear map from its last hidden state to one number.

    Frozen and in evaluation mode, whatever it was built from.

    Args:
        base: Hugging Face decoder whose output has `last_hidden_state`; causal, so that the score at a token
            is that of the text up to it.
        head_weight_1D: the linear map, without bias.
    """

    def __init__(self, base: PreTrainedModel, head_weight_1D: Tensor) -> None:
        super().__init__()
        self.base = base
        self.head = nn.Linear(head_weight_1D.shape[1], 1, bias=False, device=head_weight_1D.device)
        with torch.no_grad():
            self.head.weight.copy_(head_weight_1D)
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.head.weight.device

    @property
    def vocabulary_size(self) -> int:
        """Token ids the decoder knows are below this."""
        embeddings = self.base.get_input_embeddings()
        assert isinstance(embeddings.weight, Tensor)
        return embeddings.weight.shape[0]

    @property
    def context_length(self) -> int | None:
        """Most tokens of a text, None where the decoder names no limit."""
        return context_length(self.base.config)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a reward with dropout would change from call to call."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, input_ids_BS: Tensor, attention_mask_BS: Tensor | None = None) -> RewardOutput:
        """Score every prefix of every row.

        Args:
            input_ids_BS: token ids.
            attention_mask_BS: 0 on padding, on either side; None where there is none. Padding is known by
                this mask and never by its id: many models pad with a token that real text contains.

        Raises:
            UserInputError: a row without a real token.
        """
        mask_BS = torch.ones_like(input_ids_BS) if attention_mask_BS is None else attention_mask_BS
        is_real_BS = mask_BS.bool()
        if not bool(is_real_BS.any(dim=1).all()):
            raise UserInputError(
                "a text without tokens cannot be scored", remedy="leave empty texts out of the batch"
            )
        plan = plan_attention(mask_BS, None, None)
        output = self.base(
            input_ids=input_ids_BS,
            attention_mask=plan.attention_mask_BS,
            position_ids=plan.position_ids_BS,
            use_cache=False,
        )
        hidden_BSD = extract_hidden_states({"last_hidden_state": output.last_hidden_state})
        # In fp32 also under autocast: scores are differenced, and 16 bits would leave noise.
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            scores_BS = nn.functional.linear(hidden_BSD.float(), self.head.weight.float()).squeeze(-1)
        index_S = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)
        last_B = torch.where(is_real_BS, index_S, -1).amax(dim=1)
        pooled_B = scores_BS.gather(1, last_B[:, None]).squeeze(1)
        return RewardOutput(scores_BS.masked_fill(~is_real_BS, 0.0), pooled_B)


def load_reward_model(
    path: str | Path | ModelSource, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> RewardModel:
    """Load a reward model of either layout: Starling-RM, or a sequence classifier with one label.

    Args:
        path: a model directory, its one file of weights, a hub id, or the source of the files.
        dtype: of the decoder; the head is fp32.
        trust_remote_code: let the model's own code run.

    Raises:
        ModelLoadError: nothing is there that can be read, or the reward head is missing, misshapen or not
            finite; the message names file and tensor.
    """
    parts = read_reward_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
    return RewardModel(parts.base, parts.head_weight_1D)
