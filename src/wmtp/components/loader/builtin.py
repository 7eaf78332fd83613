"""The small model that comes with the package: a seeded, untrained Llama for MicroCode."""

from __future__ import annotations

from typing import Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from wmtp.evaluation.microcode import build_tokenizer

MICRO_LLAMA: Final = "builtin:micro-llama"
# Trained from MICRO_LLAMA by the training pipeline on first use.
MICRO_BASE: Final = "builtin:micro-base"
MICRO_REFERENCE: Final = "builtin:micro-reference"

MICRO_LLAMA_SEED: Final = 0


def build_micro_llama(seed: int = MICRO_LLAMA_SEED) -> LlamaForCausalLM:
    """Build the model: 0.5 M parameters, 4 layers, at most 512 tokens; the same weights for the same
    seed.

    The global random state is left as it was.
    """
    tokenizer = micro_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # Wider than the usual 0.02, so that so narrow a model learns from its first steps.
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # As wide as what the layers add to them. With smaller embeddings the trunk of so small a model
        # forgets which token stood where, and a critic on it sees little but the instruction.
        torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def micro_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the built-in models."""
    return build_tokenizer()
