"""Tiny random models of many families, with every trait that tells them apart switched on."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

from wmtp.modeling import MTPModel

VOCAB_SIZE = 97
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "llama_tied": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2": (
        "Qwen2Config",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 4}),
    "gemma": ("GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {**_GROUPED, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.5},
    ),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 8, "sliding_window": 4}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "starcoder2": ("Starcoder2Config", _GROUPED),
    "phi": ("PhiConfig", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "stablelm": ("StableLmConfig", _GROUPED),
    "cohere": ("CohereConfig", {**_GROUPED, "logit_scale": 0.0625}),
    "granite": ("GraniteConfig", {**_GROUPED, "logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 2}),
    "gpt2": ("GPT2Config", {**_GPT, **_IDS}),
    "gptj": ("GPTJConfig", {**_GPT, **_IDS, "rotary_dim": 4}),
}


def build_causal_lm(family: str, **changes: object) -> PreTrainedModel:
    """Return a random model in evaluation mode, with biases and norms that are not at their neutral start."""
    config_name, sizes = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    perturb(model)
    return model


def build_mtp(family: str, *, horizon: int = 3, **changes: object) -> MTPModel:
    """Return an MTP model whose heads all differ: exact copies would hide a mix-up."""
    model = MTPModel.from_causal_lm(build_causal_lm(family, **changes), horizon=horizon).eval()
    perturb(model.extra_heads)
    return model


def perturb(module: torch.nn.Module, scale: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def random_tokens(batch: int = 2, length: int = 16, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)
