"""How much memory training will take, from the model's configuration alone.

    states       = P * (4 weights + 4 gradients + 8 AdamW moments) bytes, P parameters in fp32
    reference    = P_1 * bytes of the compute precision, P_1 parameters with one head
    activations  = T * ((L - 1 + H) * (16 * D + 6 * F) + 4 * H * D) * bytes of the compute precision,
                   T tokens of a micro-batch, L layers, H heads, D hidden size, F feed-forward size
    loss         = 2 * chunk * V * 4 bytes, V vocabulary: logits of one chunk and their gradient

The activation term counts what a decoder layer keeps for its backward: inputs of two norms, of four attention
and three feed-forward matrices, and the attention output; attention itself keeps no S x S matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from wmtp.components.loader import MICRO_LLAMA
from wmtp.components.loader.builtin import build_micro_llama
from wmtp.exceptions import ModelLoadError
from wmtp.modeling import MTPModel
from wmtp.pipelines.outputs import RunOptions
from wmtp.settings import Config, Recipe

_STATE_BYTES = 16
_LOSS_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by purpose."""

    num_parameters: int
    states: int
    reference: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.states + self.reference + self.activations + self.loss

    def describe(self) -> str:
        """One line for people."""
        parts = {
            "weights, gradients, moments": self.states,
            "reference": self.reference,
            "activations": self.activations,
            "loss": self.loss,
        }
        listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
        return f"{_gib(self.total)} ({listed})"


def estimate_memory(config: Config, recipe: Recipe, path: str, options: RunOptions) -> MemoryEstimate:
    """Estimate from shapes; no weights are read.

    Raises:
        ModelLoadError: the configuration cannot be read.
    """
    model = _meta_model(path, recipe.model.mtp.horizon, options)
    settings = model.config
    hidden, vocabulary = model.unembedding_VD.shape[1], model.unembedding_VD.shape[0]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_heads = recipe.model.mtp.horizon
    one_head = sum(parameter.numel() for parameter in model.causal_lm.parameters())
    size = 2 if config.devices.precision == "bf16" else 4
    train = recipe.data.train
    num_tokens = train.max_tokens_per_batch or train.batch_size * train.max_length
    feed_forward = settings.to_dict().get("intermediate_size") or 4 * hidden
    num_layers = settings.num_hidden_layers - 1 + num_heads
    per_token = num_layers * (16 * hidden + 6 * feed_forward) + 4 * num_heads * hidden
    return MemoryEstimate(
        num_parameters=num_parameters,
        states=num_parameters * _STATE_BYTES,
        reference=one_head * size if recipe.train.algo == "rho1-wmtp" else 0,
        activations=num_tokens * per_token * size,
        loss=2 * min(_LOSS_CHUNK, num_tokens * num_heads) * vocabulary * 4,
    )


def _meta_model(path: str, horizon: int, options: RunOptions) -> MTPModel:
    with torch.device("meta"):
        if path == MICRO_LLAMA:
            return MTPModel.from_causal_lm(build_micro_llama(), horizon=horizon)
        try:
            model_config = AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code)
            causal_lm = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                model_config, trust_remote_code=options.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ModelLoadError(
                f"{path} has no readable model configuration: {str(error).splitlines()[0]}",
                remedy="give a Hugging Face model folder or a hub id that can be reached",
            ) from error
        return MTPModel.from_causal_lm(causal_lm, horizon=horizon)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
