"""Low-rank adapters on the trunk, through peft, also on a trunk in four bits (QLoRA).

The matrices of decoder layers 0..L-2 stay as they are and get a low-rank update `B A * alpha / rank` beside
them (Hu et al., 2021, LoRA, arXiv:2106.09685); with `nf4` they are held in four bits (Dettmers et al., 2023,
QLoRA, arXiv:2305.14314). The last layer and the extra heads learn in full, because a head has to become
something new; embeddings, final norm and unembedding stay. B starts at zero, so the model starts as it was.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wmtp.exceptions import ModelLoadError, UserInputError

if TYPE_CHECKING:
    from wmtp.modeling.mtp_model import MTPModel

Quantization = Literal["none", "nf4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "nf4")
_ADAPTER = "default"
_SAMPLE_SIZE = 256
_NUM_NAMED = 3
_BITSANDBYTES_REMEDY = (
    "install it (pip install bitsandbytes) on a machine it supports (CUDA, or a CPU, slowly), or set "
    "model.lora.quantization: none"
)


@dataclass(frozen=True, slots=True)
class LoraAdapters:
    """What `add_lora` did to a model.

    Attributes:
        parameter_names: parameters of the adapters, as `MTPModel.named_parameters` names them.
        adapted: modules of the wrapped model that have an adapter.
        quantized: modules of the wrapped model that are held in four bits.
        base: tensor name of the wrapped model before that -> shape and checksum, see `fingerprint`.
    """

    parameter_names: frozenset[str]
    adapted: frozenset[str]
    quantized: frozenset[str]
    base: dict[str, str]


def add_lora(
    model: MTPModel,
    *,
    rank: int,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    quantization: Quantization = "none",
    compute_dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    seed: int = 0,
) -> LoraAdapters:
    """Put adapters on the trunk of a model, in place, and freeze what does not learn beside them.

    Works without weights too (meta tensors), where nothing is quantised.

    Args:
        model: the model; `model.lora` is set.
        rank: of the update.
        alpha: the update is multiplied by alpha / rank.
        dropout: probability, on the adapter's input.
        target_modules: names of linear modules in the decoder layers, such as `q_proj`; None takes peft's
            choice for the architecture.
        quantization: `nf4` holds every linear module of the trunk in four bits.
        compute_dtype: of the products with quantised matrices.
        device: where matrices are quantised and stay, so that a model still on the CPU need not fit whole on
            the GPU it is meant for; None leaves them where they are.
        seed: of the adapters' start; the global random state is left as it was.

    Raises:
        UserInputError: no trunk, a model that has adapters, settings out of bounds, a name no linear module
            has, an architecture peft makes no choice for, or four bits where they cannot be had.
    """
    _check_settings(model, rank, alpha, dropout, quantization)
    # peft is slow to import and most runs do without it.
    from peft import LoraConfig, inject_adapter_in_model

    linears = _trunk_linears(model)
    targets = _choose_targets(model, linears, target_modules)
    causal_lm = model.causal_lm
    base = fingerprint(causal_lm)
    is_quantized = quantization == "nf4" and model.device.type != "meta"
    quantized = _quantize_trunk(model, linears, compute_dtype, device) if is_quantized else frozenset()
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # annotated int, used as a number
        lora_dropout=dropout,
        target_modules=sorted(targets),
        fan_in_fan_out=all(isinstance(linears[name], Conv1D) for name in targets),
    )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, causal_lm, adapter_name=_ADAPTER)
    for name in targets:
        # New modules begin in training mode: dropout would be on in a model that is evaluated.
        causal_lm.get_submodule(name).train(linears[name].training)
    # peft has frozen everything but the adapters.
    names = frozenset(f"causal_lm.{name}" for name, p in causal_lm.named_parameters() if p.requires_grad)
    model.last_layer.requires_grad_(True)
    model.lora = LoraAdapters(names, frozenset(targets), quantized, base)
    return model.lora


def _check_settings(
    model: MTPModel, rank: int, alpha: float, dropout: float, quantization: Quantization
) -> None:
    problems = {
        f"rank is {rank}": rank < 1,
        f"alpha is {alpha}": not alpha > 0,
        f"dropout is {dropout}": not 0 <= dropout < 1,
        f"quantization is {quantization!r}": quantization not in QUANTIZATIONS,
    }
    wrong = [problem for problem, is_wrong in problems.items() if is_wrong]
    if wrong:
        raise UserInputError(
            f"LoRA cannot be set up: {', '.join(wrong)}",
            remedy="rank at least 1, alpha above 0, dropout in [0, 1), quantization none or nf4 (model.lora)",
        )
    if model.lora is not None:
        raise UserInputError("the model already has adapters", remedy="load it again")


def _trunk_linears(model: MTPModel) -> dict[str, nn.Module]:
    """Linear modules of decoder layers 0..L-2, by their name in the wrapped model."""
    last_layer = set(model.last_layer.modules())
    in_layers = {module for module in model.decoder_layers.modules() if module not in last_layer}
    linears: dict[str, nn.Module] = {
        name: module
        for name, module in model.causal_lm.named_modules()
        if module in in_layers and isinstance(module, nn.Linear | Conv1D)
    }
    if not linears:
        raise UserInputError(
            f"{type(model.causal_lm).__name__} has {len(model.decoder_layers)} decoder layer(s) and no "
            "linear module in front of the last one, so there is nothing to adapt",
            remedy="train it whole (model.lora: null)",
        )
    return linears


def _choose_targets(
    model: MTPModel, linears: Mapping[str, nn.Module], target_modules: Sequence[str] | None
) -> set[str]:
    """Full names of the modules to adapt."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES

    there = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    remedy = f"linear modules of its decoder layers: {there} (model.lora.target_modules)"
    wanted: Sequence[str] | str
    if target_modules is not None:
        wanted = list(target_modules)
    else:
        model_type = model.config.get_text_config(decoder=True).model_type
        if model_type not in CHOICES:
            raise UserInputError(f"peft has no choice of modules for {model_type!r}", remedy=remedy)
        wanted = CHOICES[model_type]
    if isinstance(wanted, str):
        # A few entries of peft's table are patterns.
        targets = {name for name in linears if re.fullmatch(wanted, name)}
        unknown = [] if targets else [wanted]
    else:
        found = {target: {n for n in linears if f".{n}".endswith(f".{target}")} for target in wanted}
        targets = set().union(*found.values())
        unknown = sorted(target for target, names in found.items() if not names)
    if unknown:
        raise UserInputError(
            f"the trunk of {type(model.causal_lm).__name__} has no linear module "
            f"{', '.join(map(repr, unknown))}",
            remedy=remedy,
        )
    return targets


# -------------------------------------------------------------------- four bits


def _quantize_trunk(
    model: MTPModel,
    linears: Mapping[str, nn.Module],
    compute_dtype: torch.dtype,
    device: torch.device | None,
) -> frozenset[str]:
    """Hold every `nn.Linear` of the trunk in four bits; returns their names."""
    names = [name for name, module in linears.items() if isinstance(module, nn.Linear)]
    trunk = [layer for layer in model.decoder_layers if layer is not model.last_layer]
    total = sum(parameter.numel() for layer in trunk for parameter in layer.parameters())
    share = sum(linears[name].get_parameter("weight").numel() for name in names) / total
    if not names:
        raise UserInputError(
            f"nf4 needs linear layers, and the trunk of {type(model.causal_lm).__name__} has none",
            remedy="set model.lora.quantization: none",
        )
    if share < 0.5:
        warnings.warn(
            f"nf4 covers {share:.0%} of the trunk's parameters; the rest (experts, say) is not in linear "
            "layers and stays as it is",
            stacklevel=3,
        )
    try:
        import bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        raise UserInputError(
            f"model.lora.quantization: nf4 needs bitsandbytes, which cannot be imported: {error}",
            remedy=_BITSANDBYTES_REMEDY,
        ) from error
    try:
        for name in names:
            linear = model.causal_lm.get_submodule(name)
            model.causal_lm.set_submodule(name, _quantize(bitsandbytes, linear, compute_dtype, device))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserInputError(
            f"bitsandbytes cannot quantise on {(device or model.device).type}: {error}",
            remedy=_BITSANDBYTES_REMEDY,
        ) from error
    # Where peft looks to tell that its layers go on four-bit ones.
    model.causal_lm.is_loaded_in_4bit = True  # type: ignore[assignment]
    return frozenset(names)


def _quantize(
    bitsandbytes: Any, linear: nn.Module, compute_dtype: torch.dtype, device: torch.device | None
) -> nn.Module:
    assert isinstance(linear, nn.Linear)
    layer: nn.Module = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    # Params4bit quantises when it is moved to a device, also the one where it is.
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to(device or linear.weight.device)
    layer.bias = linear.bias
    # On CPUs with AVX512-BF16 a forward without gradients would repack the matrix in place and round its
    # scales to 16 bits: an evaluation in the middle of training would change the base for good.
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return layer.train(linear.training)


# -------------------------------------------------------------------- the plain model


@torch.no_grad()
def plain_state_dict(model: MTPModel) -> dict[str, Tensor]:
    """State dict of the wrapped model as an ordinary one: adapters merged, four-bit matrices written out.

    The model itself is unchanged: merging in place and back would cost its last bits. What had to be computed
    is on the CPU.
    """
    causal_lm, lora = model.causal_lm, model.lora
    state: dict[str, Tensor] = dict(causal_lm.state_dict())
    if lora is None:
        return state
    plain = {}
    for name in lora.base:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in lora.adapted | lora.quantized:
            plain[name] = _merged_weight(causal_lm, lora, owner).cpu()
        else:
            plain[name] = state[f"{owner}.base_layer.{leaf}" if owner in lora.adapted else name]
    return plain


@torch.no_grad()
def merge_lora(model: MTPModel) -> None:
    """Make a model with adapters an ordinary one, in place; nothing happens to one without."""
    causal_lm, lora = model.causal_lm, model.lora
    if lora is None:
        return
    for name in lora.adapted | lora.quantized:
        module: Any = causal_lm.get_submodule(name)
        layer = module.base_layer if name in lora.adapted else module
        weight = _merged_weight(causal_lm, lora, name)
        if name in lora.quantized:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            dense.bias = layer.bias
            layer = dense.train(module.training)
        layer.weight = nn.Parameter(weight)
        causal_lm.set_submodule(name, layer)
    model.lora = None


def _merged_weight(causal_lm: nn.Module, lora: LoraAdapters, name: str) -> Tensor:
    module: Any = causal_lm.get_submodule(name)
    layer = module.base_layer if name in lora.adapted else module
    weight: Tensor = _dequantize(layer.weight) if name in lora.quantized else layer.weight
    if name in lora.adapted:
        weight = weight + module.get_delta_weight(_ADAPTER).to(weight.dtype)
    return weight


def _dequantize(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    matrix: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return matrix


# -------------------------------------------------------------------- which base


@torch.no_grad()
def fingerprint(module: nn.Module) -> dict[str, str]:
    """Tensor name -> `4096x4096:1a2b3c4d`: shape, and CRC-32 of at most 256 evenly spaced values as fp32.

    Cheap and enough to tell one model from another, or from a later training stage of itself; no defence
    against somebody who wants two models to look alike. Tensors without values have `meta` for a checksum.
    """
    return {name: _describe(tensor) for name, tensor in module.state_dict().items()}


def _describe(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape))
    if tensor.is_meta:
        return f"{shape}:meta"
    flat = tensor.detach().reshape(-1)
    indices = torch.linspace(
        0, max(flat.numel() - 1, 0), min(_SAMPLE_SIZE, flat.numel()), dtype=torch.float64
    )
    sample = flat[indices.long().to(flat.device)].float().cpu()
    return f"{shape}:{zlib.crc32(sample.numpy().tobytes()):08x}"


def check_same_base(model: MTPModel, saved: Mapping[str, str] | None) -> None:
    """Check that the adapters of a checkpoint go on the base they were trained on.

    Args:
        model: the model they are to be loaded into.
        saved: the fingerprint in the checkpoint; None for one of a run without adapters.

    Raises:
        ModelLoadError: another base, or adapters on one side only; the message names tensors.
    """
    present = None if model.lora is None else model.lora.base
    if saved is None or present is None:
        if saved is not present:
            has, has_none = ("recipe", "checkpoint") if saved is None else ("checkpoint", "recipe")
            raise ModelLoadError(
                f"the {has} has LoRA adapters and the {has_none} has none",
                remedy="use the recipe of the run (model.lora)",
            )
        return
    different = sorted(name for name in {*saved, *present} if saved.get(name) != present.get(name))
    if different:
        shown = "; ".join(
            f"{name}: {saved.get(name, 'absent')} then, {present.get(name, 'absent')} now"
            for name in different[:_NUM_NAMED]
        )
        raise ModelLoadError(
            f"the adapters were trained on another base model: {len(different)} of {len(saved)} tensors "
            f"differ in shape or values ({shown})",
            remedy="give the base model the run was started with (model.base_id or paths.models.base)",
        )
