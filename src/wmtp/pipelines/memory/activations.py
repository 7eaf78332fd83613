"""What autograd keeps of a forward pass for its backward, in bytes a token.

Counted on Llama's decoder layer as transformers writes it, with `scaled_dot_product_attention`, which keeps
no S x S matrix unless it is given a mask. D hidden size, A width of all query heads, K of all key heads, F
feed-forward size. Norms and the residual stream are fp32 also under autocast, because the parameters are.

    operation             keeps                                fp32        autocast to bf16
    norm                  its input, its normalised input      4D + 4D     4D + 4D
    q, k, v               the norm's output                    4D          3 * 2D, each its own cast copy
    attention             q, k, v after rotation, its output   4(2A + 2K)  2(2A + 2K)
    norm                  its input, its normalised input      4D + 4D     4D + 4D
    gate, up              the norm's output                    4D          2 * 2D
    silu, product, down   gate, silu(gate), up, the product    4 * 4F      4 * 2F

Under autocast the weights of these products have copies in bf16 as well, kept until the backward has used
them. A frozen weight keeps no input, a frozen norm no normalised input. Where no gradient arrives, nothing is
kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig

from wmtp.modeling import MTPModel, ValueHead
from wmtp.modeling.heads import LinearHead, MedusaHead, SequentialHead, TransformerHead

_FP32 = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """What a micro-batch is and how it is computed.

    Attributes:
        num_tokens: tokens of a micro-batch, padding included.
        length: tokens of a row.
        is_packed: several documents share a row, so attention is given a mask.
        compute: bytes of a number in the compute precision; 2 means autocast to bf16.
    """

    num_tokens: int
    length: int
    is_packed: bool
    compute: int

    @property
    def is_mixed(self) -> bool:
        """Whether matrix products run in another precision than the parameters have."""
        return self.compute != _FP32

    @property
    def mask_bytes(self) -> int:
        """One additive attention mask [rows, 1, S, S]; each layer makes its own of the shared boolean one."""
        return self.num_tokens * self.length * self.compute if self.is_packed else 0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of a decoder layer: D, A, K and F of the table above."""

    hidden: int
    attention: int
    keys: int
    feed_forward: int

    @classmethod
    def of(cls, config: PreTrainedConfig, *, is_packed: bool) -> LayerShape:
        """Read them from a configuration."""
        settings = config.get_text_config(decoder=True)
        values = settings.to_dict()
        hidden, num_heads = int(settings.hidden_size), int(settings.num_attention_heads)
        head_size = values.get("head_dim") or hidden // num_heads
        num_key_heads = values.get("num_key_value_heads") or num_heads
        # With a mask, keys and values are repeated for every query head before attention.
        keys = head_size * (num_heads if is_packed else num_key_heads)
        feed_forward = values.get("intermediate_size") or values.get("n_inner") or 4 * hidden
        return cls(hidden, head_size * num_heads, keys, int(feed_forward))


@dataclass(frozen=True, slots=True)
class Stream:
    """Hidden states on their way: bytes of a number, and whether a gradient comes back along it."""

    width: int
    needs_grad: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """What was kept so far.

    Attributes:
        per_token: bytes a token.
        num_masks: attention masks.
        cast_weights: numbers in the copies of weights that autocast made and the backward needs.
    """

    per_token: int = 0
    num_masks: int = 0
    cast_weights: int = 0

    def __add__(self, other: Kept) -> Kept:
        return Kept(
            self.per_token + other.per_token,
            self.num_masks + other.num_masks,
            self.cast_weights + other.cast_weights,
        )

    def total(self, work: Workload) -> int:
        """In bytes, for a micro-batch."""
        copies = self.cast_weights * work.compute if work.is_mixed else 0
        return self.per_token * work.num_tokens + self.num_masks * work.mask_bytes + copies


@dataclass(frozen=True, slots=True)
class Counter:
    """Counts what the parts of one model keep.

    Attributes:
        shape: of its layers.
        work: the micro-batch.
        has_packed_trunk: the trunk's frozen matrices are held in four bits (QLoRA).
    """

    shape: LayerShape
    work: Workload
    has_packed_trunk: bool = False

    def model(self, model: MTPModel) -> Kept:
        """Trunk and all heads, and the hidden states [B,S,H,D] that the loss reads."""
        learns_embedding = any(p.requires_grad for p in model.causal_lm.get_input_embeddings().parameters())
        stream = Stream(_FP32, learns_embedding)
        kept = Kept()
        *trunk, last = model.decoder_layers
        for layer in trunk:
            more, stream = self.layer(layer, stream)
            kept += more
        # The trunk's output is kept once, whichever heads read it.
        head_0, state_0 = self.layer(last, stream)
        kept += head_0 + self.norm(model.final_norm, state_0)
        state = state_0
        for head in model.extra_heads:
            more, state = self.head(
                head, trunk=stream, first=state_0, before=state, embedding=learns_embedding
            )
            kept += more + self.norm(model.final_norm, state)
        return kept + Kept(_FP32 * model.horizon * self.shape.hidden)

    def head(
        self, head: nn.Module, *, trunk: Stream, first: Stream, before: Stream, embedding: bool
    ) -> tuple[Kept, Stream]:
        """One extra head without the final norm."""
        hidden, compute = self.shape.hidden, self.work.compute
        match head:
            case TransformerHead():
                return self.layer(head.layer, trunk, is_input_shared=True)
            case LinearHead() | MedusaHead():
                kept = self.linears([head.map], hidden, is_input_shared=first.needs_grad)
                if isinstance(head, LinearHead):
                    return kept, Stream(compute, True)
                return kept + Kept(compute * hidden), Stream(_FP32, True)
            case SequentialHead():
                kept = self.norm(head.hidden_norm, before, is_input_shared=before.width == _FP32)
                kept += self.norm(head.embedding_norm, Stream(_FP32, embedding))
                kept += self.linears([head.projection], 2 * hidden)
                more, state = self.layer(head.layer, Stream(compute, True))
                return kept + more, state
            case _:  # teacher forcing: a shifted copy of head 0
                return Kept(), first

    def layer(
        self, layer: nn.Module, stream: Stream, *, is_input_shared: bool = False
    ) -> tuple[Kept, Stream]:
        """One decoder layer, and the stream behind it."""
        shape, compute = self.shape, self.work.compute
        linears = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
        norms = [module for name, module in layer.named_children() if "norm" in name]

        def pick(*names: str) -> list[nn.Module]:
            return [linears[name] for name in names if name in linears]

        kept = self.norm(norms[0], stream, is_input_shared=is_input_shared)
        queries, output = pick("q_proj", "k_proj", "v_proj"), pick("o_proj")
        needs_grad = stream.needs_grad or any(map(learns, (norms[0], *queries)))
        kept += self.linears(queries, shape.hidden, needs_input_grad=stream.needs_grad or learns(norms[0]))
        if needs_grad:
            kept += Kept(compute * (shape.attention + 2 * shape.keys), num_masks=1)
        if needs_grad or any(map(learns, output)):
            kept += Kept(compute * shape.attention)
        kept += self.weights(output, needs_grad)
        stream = Stream(
            max(stream.width, compute), stream.needs_grad or needs_grad or any(map(learns, output))
        )
        kept += self.norm(norms[-1], stream)
        gates, down = pick("gate_proj", "up_proj"), pick("down_proj")
        kept += self.linears(gates, shape.hidden, needs_input_grad=stream.needs_grad or learns(norms[-1]))
        needs_grad = stream.needs_grad or any(map(learns, (norms[-1], *gates)))
        if needs_grad:
            kept += Kept(3 * compute * shape.feed_forward)
        if any(map(learns, down)):
            kept += Kept(compute * shape.feed_forward)
        kept += self.weights(down, needs_grad)
        return kept, replace(stream, needs_grad=needs_grad or any(map(learns, down)))

    def value_head(self, value_head: ValueHead) -> int:
        """Bytes at the peak of a value head's forward and backward; no gradient goes on into the trunk."""
        work, numbers = self.work, self.shape.hidden * self.work.num_tokens
        if value_head.layer is None:
            inputs = 0 if value_head.hidden_map is None else 2 * work.compute
            return (inputs + _FP32) * numbers
        kept, _ = self.layer(value_head.layer, Stream(_FP32, False))
        # The norm and the value map behind the layer, two inputs and a normalised one, have let go of theirs
        # when the backward reaches the layer.
        return kept.total(work) + max(3 * _FP32 * numbers, self.backward_bytes())

    def forward_bytes(self) -> int:
        """What a forward without gradients holds at a time: the widest of one layer's tensors."""
        shape, compute = self.shape, self.work.compute
        attention = 2 * (2 * shape.attention + 2 * shape.keys)
        widest = max(3 * shape.feed_forward, attention)
        return (compute * widest + 2 * _FP32 * shape.hidden) * self.work.num_tokens + self.work.mask_bytes

    def backward_bytes(self) -> int:
        """What the backward of a feed-forward block adds to what is kept: the gradients of silu(gate) and up
        beside that of their product, which takes the product's place; and of the residual stream."""
        shape, compute = self.shape, self.work.compute
        return (2 * compute * shape.feed_forward + 2 * _FP32 * shape.hidden) * self.work.num_tokens

    def norm(self, norm: nn.Module, stream: Stream, *, is_input_shared: bool = False) -> Kept:
        """A norm: its input in fp32, and what its weight is multiplied with, in the input's width."""
        numbers = 0
        if stream.needs_grad and not (is_input_shared and stream.width == _FP32):
            numbers += _FP32
        if learns(norm):
            numbers += stream.width
        return Kept(numbers * self.shape.hidden)

    def linears(
        self,
        modules: Iterable[nn.Module],
        size: int,
        *,
        needs_input_grad: bool = True,
        is_input_shared: bool = False,
    ) -> Kept:
        """Linear maps of one fp32 input of `size` numbers a token; autocast casts it for each of them."""
        modules = list(modules)
        num_learning = sum(map(learns, modules))
        if self.work.is_mixed:
            per_token = num_learning * self.work.compute * size
        else:
            per_token = _FP32 * size if num_learning and not is_input_shared else 0
        return Kept(per_token) + self.weights(modules, needs_input_grad)

    def weights(self, modules: Iterable[nn.Module], needs_input_grad: bool) -> Kept:
        """The weights that the backward multiplies with, which autocast has copies of."""
        if not self.work.is_mixed:
            return Kept()
        numbers = 0
        for module in modules:
            if not needs_input_grad and not learns(module):
                continue
            # Frozen matrices in four bits are unpacked again in the backward; only the adapter is cast.
            is_kept = not self.has_packed_trunk
            numbers += sum(p.numel() for p in module.parameters() if p.requires_grad or is_kept)
        return Kept(cast_weights=numbers)


def learns(module: nn.Module) -> bool:
    """Whether any parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())
