"""How much arithmetic a training step needs, for the utilisation that is reported (MFU)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from wmtp.modeling.mtp_model import MTPModel


def flops_per_token(model: MTPModel, seq_len: int) -> float:
    """Estimate the floating-point operations of one forward and backward pass, per token of the sequence.

    After PaLM (Chowdhery et al., 2022, appendix B), counting what learns now. Each number of a matrix takes 2
    operations forward, 2 for the gradient of what goes in, and 2 for its own gradient where it learns. The
    attention of a layer takes `4 * width * seq_len` forward, in full though causal attention needs half of
    it, and twice that backward. With everything learning this is `6 * N + 12 * A * width * seq_len`: N the
    numbers in matrices, embeddings that are only looked up left out and the unembedding counted once a head;
    A the layers with attention, those of extra heads included; width the size of all queries of a token.

    Below the lowest module that learns there are no gradients, and none are counted. Within the layer that
    holds it, gradients of what goes in count for every matrix behind it in the order of registration, and for
    all if a norm of that layer learns. So LoRA in `q_proj` is taken to have a gradient through `k_proj` and
    `v_proj` beside it, at most 2 operations for each of their numbers in one layer too many, and attention is
    counted with its layer. The unembedding's input gradient counts for all heads if one needs it, because the
    loss takes them together.

    Norms, biases, the softmax and the loss beyond its matrix products are not counted, nor is recomputation.
    Every token is taken as a target and all experts of a mixture as active.
    """
    attention = 4.0 * _attention_width(model) * seq_len
    front = _count(_outside_layers(model), has_gradient=False)
    total, has_gradient = front.flops, front.gives_gradient
    embeddings_learn = front.gives_gradient
    for layer in list(model.decoder_layers)[:-1]:
        counted = _count([layer], has_gradient, attention)
        total, has_gradient = total + counted.flops, counted.gives_gradient
    first = _count([model.last_layer], has_gradient, attention)
    total += first.flops
    states_with_gradient = [first.gives_gradient]
    for head in model.extra_heads:
        reads_gradient = {
            "transformer": has_gradient,
            "sequential": states_with_gradient[-1] or embeddings_learn,
        }.get(model.head_form, states_with_gradient[0])
        has_layer = model.head_form in ("transformer", "sequential")
        counted = _count([head], reads_gradient, attention if has_layer else 0.0)
        total += counted.flops
        states_with_gradient.append(counted.gives_gradient)
    norm = _count([model.final_norm], any(states_with_gradient))
    unembedding_passes = 1 + norm.gives_gradient + model.unembedding_VD.requires_grad
    return total + norm.flops + 2.0 * unembedding_passes * model.horizon * model.unembedding_VD.numel()


@dataclass(frozen=True, slots=True)
class _Counted:
    flops: float
    gives_gradient: bool


def _count(roots: Iterable[nn.Module], has_gradient: bool, attention: float = 0.0) -> _Counted:
    """Count modules that run one after another; `has_gradient` says whether what goes into the first has
    one."""
    modules = [module for root in roots for module in root.modules()]
    norm_learns = any(_learns(module) and not _matrix_sizes(module) for module in modules)
    flops, gradient_inside = 0.0, has_gradient or norm_learns
    for module in modules:
        for size, learns in _matrix_sizes(module):
            flops += 2.0 * size * (1 + gradient_inside + learns)
        gradient_inside = gradient_inside or _learns(module)
    return _Counted(flops + attention * (3 if gradient_inside else 1), gradient_inside)


def _matrix_sizes(module: nn.Module) -> list[tuple[int, bool]]:
    """Size of every matrix of a module itself that is multiplied with, and whether it learns."""
    if isinstance(module, nn.Embedding):
        return []
    if isinstance(module, nn.Linear):
        # Not the parameter's own size: in four bits it holds two numbers a byte.
        return [(module.in_features * module.out_features, module.weight.requires_grad)]
    matrices = (p for p in module.parameters(recurse=False) if p.ndim > 1)
    return [(parameter.numel(), parameter.requires_grad) for parameter in matrices]


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _outside_layers(model: MTPModel) -> list[nn.Module]:
    """Leaf modules of the wrapped model in front of its layers: embeddings and what some families add."""
    behind = {*model.decoder_layers.modules(), *model.final_norm.modules()}
    behind |= {module for module in model.causal_lm.modules() if _is_unembedding(model, module)}
    return [m for m in model.causal_lm.modules() if m not in behind and not list(m.children())]


def _is_unembedding(model: MTPModel, module: nn.Module) -> bool:
    is_embedding = module is model.causal_lm.get_input_embeddings()
    own = module.parameters(recurse=False)
    return not is_embedding and any(parameter is model.unembedding_VD for parameter in own)


def _attention_width(model: MTPModel) -> int:
    config = model.config.get_text_config(decoder=True)
    # Some families have heads that together are wider or narrower than the hidden states.
    head_dim: int | None = config.to_dict().get("head_dim")
    return model.hidden_size if head_dim is None else head_dim * config.num_attention_heads
