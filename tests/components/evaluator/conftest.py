"""A tiny Llama that knows a few answers by heart."""

from __future__ import annotations

import pytest
import torch
from evaluator_answers import ANSWERS
from transformers import LlamaConfig, LlamaForCausalLM

from wmtp.components.tokenizer import HfTokenizer, TokenizerSettings
from wmtp.evaluation.microcode import build_tokenizer
from wmtp.modeling import MTPModel


@pytest.fixture(scope="session")
def tokenizer() -> HfTokenizer:
    return HfTokenizer(TokenizerSettings(tokenizer=build_tokenizer()))


@pytest.fixture(scope="session")
def model(tokenizer: HfTokenizer) -> MTPModel:
    """Trained until it writes every answer after its prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.tokenizer.pad_token_id,
        bos_token_id=tokenizer.tokenizer.bos_token_id,
        eos_token_id=tokenizer.tokenizer.eos_token_id,
    )
    causal_lm = LlamaForCausalLM(config)
    rows = [{"prompt": f"{name}:\n", "completion": answer} for name, answer in ANSWERS.items()]
    features = tokenizer.tokenize_dataset(rows)
    optimizer = torch.optim.Adam(causal_lm.parameters(), lr=1e-2)
    for _ in range(60):
        for feature in features:
            ids, labels = torch.tensor([feature["input_ids"]]), torch.tensor([feature["labels"]])
            causal_lm(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return MTPModel.from_causal_lm(causal_lm.eval(), horizon=2)
