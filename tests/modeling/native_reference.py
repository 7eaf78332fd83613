"""Meta's native layout, written from its definition in plain torch and float64: random checkpoints, and the
logits of all heads.

Rotary positions are complex numbers, as in the layout's own definition: the rows 2i and 2i+1 of a head are
the real and imaginary part of one number, which position t turns by t * theta ** (-2i / d).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wmtp.modeling import MTPModel
from wmtp.modeling.formats.meta_native import read_native
from wmtp.modeling.formats.parts import LoadedParts

VOCAB_SIZE = 64


def native_params(
    *, n_future_tokens: int | None = 3, trunk_layers: int = 1, n_kv_heads: int | None = 2, **more: Any
) -> dict[str, Any]:
    """Fields of a tiny model; None leaves a field out. `layers` has trunk_layers + 1 members."""
    params: dict[str, Any] = {
        "dim": 32,
        "n_layers": trunk_layers + (n_future_tokens or 1),
        "n_heads": 4,
        "n_kv_heads": n_kv_heads,
        "vocab_size": VOCAB_SIZE,
        "multiple_of": 8,
        "norm_eps": 1e-5,
        "n_future_tokens": n_future_tokens,
        **more,
    }
    return {name: value for name, value in params.items() if value is not None}


def feed_forward_width(params: Mapping[str, Any]) -> int:
    """2/3 of 4 dim, cut to a whole number, scaled, cut again, rounded up to a multiple."""
    width = 8 * params["dim"] // 3
    if "ffn_dim_multiplier" in params:
        width = int(params["ffn_dim_multiplier"] * width)
    return -(-width // params["multiple_of"]) * params["multiple_of"]


def random_native(
    params: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """A checkpoint in which every tensor is random, the norms' weights too; `rope.freqs` is among them."""
    generator = torch.Generator().manual_seed(seed)
    dim, width = params["dim"], feed_forward_width(params)
    head_size = dim // params["n_heads"]
    key_size = params.get("n_kv_heads", params["n_heads"]) * head_size
    num_future = params.get("n_future_tokens", 1)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def norm() -> Tensor:
        return torch.rand(dim, generator=generator) + 0.5

    tensors = {
        "tok_embeddings.weight": matrix(VOCAB_SIZE, dim) * 3,
        "norm.weight": norm(),
        "output.weight": matrix(VOCAB_SIZE, dim),
        "rope.freqs": torch.rand(head_size // 2, generator=generator),
    }
    blocks = [f"layers.{i}." for i in range(params["n_layers"] - num_future + 1)]
    blocks += [f"extra_heads.{i}." for i in range(num_future - 1)]
    for block in blocks:
        tensors |= {
            # Twice the usual size, so that attention is far from uniform and depends on positions.
            block + "attention.wq.weight": 2 * matrix(dim, dim),
            block + "attention.wk.weight": 2 * matrix(key_size, dim),
            block + "attention.wv.weight": matrix(key_size, dim),
            block + "attention.wo.weight": matrix(dim, dim),
            block + "feed_forward.w1.weight": matrix(width, dim),
            block + "feed_forward.w2.weight": matrix(dim, width),
            block + "feed_forward.w3.weight": matrix(width, dim),
            block + "attention_norm.weight": norm(),
            block + "ffn_norm.weight": norm(),
        }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


class NativeReference:
    """The forward pass in float64; matrices are applied as `x @ W.T`."""

    def __init__(self, params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.params = params
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.num_future = params.get("n_future_tokens", 1)
        self.head_layer = f"layers.{params['n_layers'] - self.num_future}."

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[B,S,H,V]."""
        trunk_BSD = self.embed(tokens_BS)
        for index in range(self.params["n_layers"] - self.num_future):
            trunk_BSD = self.block(f"layers.{index}.", trunk_BSD)
        heads = [self.head_layer, *(f"extra_heads.{i}." for i in range(self.num_future - 1))]
        return torch.stack([self.unembed(self.block(head, trunk_BSD)) for head in heads], dim=2)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        return self.tensors["tok_embeddings.weight"][tokens_BS]

    def unembed(self, x_BSD: Tensor) -> Tensor:
        return self._norm(x_BSD, "norm.weight") @ self.tensors["output.weight"].T

    def block(self, prefix: str, x_BSD: Tensor) -> Tensor:
        """One decoder layer."""
        weight = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items()}
        normed = self._norm(x_BSD, prefix + "attention_norm.weight")
        middle = x_BSD + self._attention(prefix, normed) @ weight["attention.wo.weight"].T
        normed = self._norm(middle, prefix + "ffn_norm.weight")
        gate = normed @ weight["feed_forward.w1.weight"].T
        gated = gate * torch.sigmoid(gate) * (normed @ weight["feed_forward.w3.weight"].T)
        return middle + gated @ weight["feed_forward.w2.weight"].T

    def _attention(self, prefix: str, x_BSD: Tensor) -> Tensor:
        batch, length, _ = x_BSD.shape
        num_heads = self.params["n_heads"]
        num_key_heads = self.params.get("n_kv_heads", num_heads)
        query, key, value = (
            (x_BSD @ self.tensors[f"{prefix}attention.{name}.weight"].T).view(batch, length, heads, -1)
            for name, heads in (("wq", num_heads), ("wk", num_key_heads), ("wv", num_key_heads))
        )
        query, key = self._turn(query), self._turn(key)
        mixed = torch.zeros_like(query)
        future = torch.ones(length, length).triu(1).bool()
        for head in range(num_heads):
            group = head * num_key_heads // num_heads
            scores = query[:, :, head] @ key[:, :, group].transpose(1, 2) / query.shape[-1] ** 0.5
            mixed[:, :, head] = scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, :, group]
        return mixed.reshape(batch, length, -1)

    def _turn(self, x_BSHd: Tensor) -> Tensor:
        size = x_BSHd.shape[-1]
        theta = self.params.get("rope_theta", 10000.0)
        frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.arange(x_BSHd.shape[1], dtype=torch.float64)[:, None] * frequency
        pairs = torch.view_as_complex(x_BSHd.unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    def _norm(self, x_BSD: Tensor, name: str) -> Tensor:
        size = (x_BSD.square().mean(-1, keepdim=True) + self.params["norm_eps"]).sqrt()
        return x_BSD / size * self.tensors[name]


def read_parts(
    params: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> LoadedParts:
    """`read_native` with the usual file names."""
    return read_native(
        params, tensors, dtype=dtype, params_source="m/params.json", weights_source="m/consolidated.pth"
    )


def build_native(
    params: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> MTPModel:
    """The model of a native checkpoint, with all of its heads."""
    parts = read_parts(params, tensors, dtype)
    model = MTPModel(parts.causal_lm, form=parts.heads.form, offsets=parts.heads.offsets)
    for head, module in enumerate(model.extra_heads, start=1):
        module.load_state_dict(parts.head_tensors(head))
    return model
