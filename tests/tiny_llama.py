"""Small Llamas on disk, with the tokenizer of the built-in models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.components.loader.builtin import micro_tokenizer


def write_llama(folder: Path, **sizes: Any) -> Path:
    """Write one of these sizes, with weights from torch's generator as it is; returns the folder."""
    tokenizer = micro_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
