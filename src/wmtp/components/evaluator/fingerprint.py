"""What a generation depends on besides its own settings: the model's numbers and the tokenizer, as a hash."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from wmtp.components.tokenizer import HfTokenizer
from wmtp.evaluation.records import key_of
from wmtp.modeling import MTPModel


def model_fingerprint(model: MTPModel) -> str:
    """Hash every parameter and saved buffer of a model, its heads' form and offsets; about a second a GB.

    Numbers and not files: the same checkpoint loaded in another precision, with other heads or other
    adapters is another model.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(key_of(model.head_form, list(model.offsets)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().reshape(-1).contiguous()
            digest.update(flat.view(torch.uint8).cpu().numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: HfTokenizer) -> str:
    """Hash the vocabulary and the ids that end a text; a prompt's ids are hashed where it is used."""
    inner = tokenizer.tokenizer
    vocabulary = sorted(inner.get_vocab().items(), key=lambda item: item[1])
    return key_of(type(inner).__name__, vocabulary, inner.all_special_ids, inner.eos_token_id)
