"""The parts of a Hugging Face causal language model that multi-token prediction needs to tell apart.

A decoder-only model is: embeddings, a list of decoder layers, a final norm, an unembedding. The families
differ in the names and in what they do to the logits; both are found here, and `MTPModel` checks the result
numerically.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wmtp.exceptions import ModelLoadError

LAYER_LIST_NAMES = ("layers", "h", "blocks")
FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm")


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """Base model, decoder layers and final norm of a wrapped model. Holds references, owns nothing."""

    base: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model family does to `hidden @ W.T + b` before it calls the result logits.

    Cohere multiplies (`logit_scale`), Granite divides (`logits_scaling`), Gemma 2 soft-caps
    (`final_logit_softcapping`): `softcap * tanh(logits / softcap)`.
    """

    multiplier: float = 1.0
    divisor: float = 1.0
    softcap: float | None = None

    @property
    def scale(self) -> float:
        """Multiplier and divisor as one factor, applied before the soft cap."""
        return self.multiplier / self.divisor

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply the transform to `hidden @ W.T + b`, any shape."""
        # The operations of the model family in its own order: a fused factor would differ in the last bit.
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def find_decoder_parts(causal_lm: PreTrainedModel) -> DecoderParts:
    """Find layers, final norm and unembedding.

    Raises:
        ModelLoadError: the model has no single list of decoder layers, no known final norm, or no
            unembedding.
    """
    base = causal_lm.base_model
    name = type(causal_lm).__name__
    remedy = "use a decoder-only causal language model of the Llama, Qwen, Gemma, GPT-2 or a similar family"
    num_layers = causal_lm.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        (path, module)
        for path, module in base.named_modules()
        if path.rpartition(".")[2] in LAYER_LIST_NAMES
        and isinstance(module, nn.ModuleList)
        and len(module) == num_layers
    ]
    if len(lists) != 1:
        found = ", ".join(path for path, _ in lists) or "none"
        raise ModelLoadError(
            f"{name} does not have one list of {num_layers} decoder layers (found: {found})", remedy=remedy
        )
    path, layers = lists[0]
    owner = base.get_submodule(path.rpartition(".")[0])
    children = dict(owner.named_children())
    norms = [children[norm_name] for norm_name in FINAL_NORM_NAMES if norm_name in children]
    if not norms:
        raise ModelLoadError(
            f"{name} has no final norm beside its decoder layers (children: {', '.join(children)})",
            remedy=remedy,
        )
    if causal_lm.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise ModelLoadError(f"{name} has no unembedding, so it predicts no tokens", remedy=remedy)
    return DecoderParts(base=base, layers=layers, final_norm=norms[0])


def find_logit_transform(causal_lm: PreTrainedModel) -> LogitTransform:
    """Read scaling and soft-capping of the logits from the configuration; absent or null means none."""
    config = causal_lm.config.get_text_config(decoder=True).to_dict()

    def read(key: str) -> float | None:
        value = config.get(key)
        return None if value is None else float(value)

    multiplier, divisor = read("logit_scale"), read("logits_scaling")
    return LogitTransform(
        multiplier=1.0 if multiplier is None else multiplier,
        divisor=1.0 if divisor is None else divisor,
        softcap=read("final_logit_softcapping"),
    )
