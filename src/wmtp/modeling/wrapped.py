"""A wrapped Hugging Face causal language model, and its parts under names of our own.

Shapes: V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from wmtp.modeling.structure import find_decoder_parts, find_logit_transform


class WrappedModel(nn.Module):
    """Base of models around a causal language model.

    Args:
        causal_lm: the model to wrap; it is kept, not copied.

    Raises:
        ModelLoadError: its parts are not found.
    """

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._parts = find_decoder_parts(causal_lm)
        self._logit_transform = find_logit_transform(causal_lm)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., D] after the final norm to logits [..., V], as the wrapped model does."""
        return self._logit_transform(self._unembedding(hidden))

    def build_unembedding(self, token_ids: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Return a map of hidden states [..., D] to logits, all of them or those of some tokens alone.

        Made once and used often: it looks nothing up. It does not follow a change of the vocabulary.
        """
        transform = self._logit_transform
        if token_ids is None:
            module = self._unembedding
            return lambda hidden: transform(module(hidden))
        weight, bias = self.unembedding_VD[token_ids], self.unembedding_bias_V
        part = None if bias is None else bias[token_ids]
        return lambda hidden: transform(nn.functional.linear(hidden, weight, part))

    @property
    def base_model(self) -> nn.Module:
        """The wrapped model without its unembedding."""
        return self._parts.base

    @property
    def config(self) -> PreTrainedConfig:
        """The wrapped model's configuration."""
        return self.causal_lm.config

    @property
    def device(self) -> torch.device:
        """Where the unembedding lives."""
        return self.unembedding_VD.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the unembedding."""
        return self.unembedding_VD.dtype

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """All decoder layers of the wrapped model: the trunk's, then head 0's."""
        return self._parts.layers

    @property
    def last_layer(self) -> nn.Module:
        """Decoder layer of head 0: the wrapped model's own last one."""
        return self._parts.layers[-1]

    @property
    def final_norm(self) -> nn.Module:
        """Norm between every head and the unembedding."""
        return self._parts.final_norm

    @property
    def unembedding_VD(self) -> Tensor:
        """Weight of the unembedding; with tied embeddings the embedding itself."""
        weight: Tensor = self._unembedding.weight  # type: ignore[assignment]  # any linear layer has it
        return weight

    @property
    def unembedding_bias_V(self) -> Tensor | None:
        """Bias of the unembedding (Phi, GPT-J), else None."""
        bias: Tensor | None = self._unembedding.bias  # type: ignore[assignment]  # any linear layer has it
        return bias

    @property
    def logit_scale(self) -> float:
        """Factor on the logits (Cohere, Granite), before the soft cap."""
        return self._logit_transform.scale

    @property
    def logit_softcap(self) -> float | None:
        """Soft cap c of `c * tanh(logits / c)` (Gemma 2), else None."""
        return self._logit_transform.softcap

    @property
    def num_parameters(self) -> int:
        """Parameters of wrapped model and heads, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.unembedding_VD.shape[1]

    @property
    def _vocab_size(self) -> int:
        return self.unembedding_VD.shape[0]

    @property
    def _unembedding(self) -> nn.Module:
        # Asked for at each use: resizing the vocabulary replaces it.
        module: nn.Module = self.causal_lm.get_output_embeddings()  # type: ignore[no-untyped-call]
        return module

    @property
    def _is_on_meta_device(self) -> bool:
        return any(parameter.is_meta for parameter in self.parameters())
