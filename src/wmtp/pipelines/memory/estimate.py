"""How much memory training will take, from shapes alone; docs/concepts/memory.md explains it.

    weights, moments   P * 4 bytes, P_trained * 8 (AdamW), in fp32
    helpers            reference, snapshot, value head: as they are loaded
    activations        what autograd keeps (`wmtp.pipelines.memory.activations`)
    loss               the fused cross entropy's gradients and one chunk of logits
    gradients          P_trained * 4

These do not all exist at the same time, so the estimate is the largest sum over the moments that can be the
peak: the loss, the first and the last layer of the backward, the update, scoring, the value loss and stage 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from wmtp.modeling import MTPModel, ValueHead
from wmtp.objectives import default_chunk_size
from wmtp.pipelines.memory.activations import Counter, LayerShape, Workload
from wmtp.settings import Config, Recipe

_FP32 = 4
_MOMENTS = 8
# nf4 with its scales quantised too: 4 bits, and 8 bits and 32/256 bits of scale for every 64 numbers.
_PACKED_BYTES = (4 + (8 + 32 / 256) / 64) / 8


@dataclass(frozen=True, slots=True)
class Helpers:
    """Models beside the trained one, built without weights; None where the run has none.

    Attributes:
        reference: of `rho1-wmtp`, one head, in the compute precision.
        value_head: of `critic-wmtp`.
        reward_model: of `critic-wmtp` with `critic.reward.source: reward_model`; there before stage 1 alone.
    """

    reference: MTPModel | None = None
    value_head: ValueHead | None = None
    reward_model: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by purpose at the moment that needs most.

    Attributes:
        num_parameters: of model and heads.
        num_trained: those among them that are trained.
        device: kind of device and precision, for people.
        moment: which moment it is.
        parts: bytes by purpose at that moment.
        moments: total bytes of every moment.
    """

    num_parameters: int
    num_trained: int
    device: str
    moment: str
    parts: dict[str, int]
    moments: dict[str, int]

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return sum(self.parts.values())

    def describe(self) -> str:
        """One line for people."""
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts.items() if size)
        return f"{format_bytes(self.total)} on {self.device}, at {self.moment} ({listed})"


def estimate_memory(config: Config, recipe: Recipe, model: MTPModel, helpers: Helpers) -> MemoryEstimate:
    """Estimate for the device and precision of a config; `auto` is what this machine would choose."""
    devices = config.devices
    is_cuda = devices.accelerator == "cuda" or (devices.accelerator == "auto" and torch.cuda.is_available())
    is_bf16 = devices.precision == "bf16" or (devices.precision == "auto" and is_cuda)
    return estimate_training(
        model, recipe, helpers, compute=2 if is_bf16 else _FP32, device_type="cuda" if is_cuda else "cpu"
    )


def estimate_training(
    model: MTPModel, recipe: Recipe, helpers: Helpers, *, compute: int, device_type: str
) -> MemoryEstimate:
    """Estimate the peak of training `model`, whose `requires_grad` says what is trained; shapes suffice.

    Args:
        model: base with its heads; may be on the meta device.
        recipe: of the run.
        helpers: the models beside it.
        compute: bytes of a number in the compute precision, 2 or 4.
        device_type: `cpu` or `cuda`; decides how much of the logits exists at a time.
    """
    moments = _Moments(model, recipe, helpers, compute, device_type).all()
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(totals, key=lambda name: totals[name])
    return MemoryEstimate(
        count_parameters(model),
        count_trained(model),
        f"{device_type} in {'bf16' if compute != _FP32 else 'fp32'}",
        moment,
        moments[moment],
        totals,
    )


class _Moments:
    """Bytes by purpose at each moment of a run that can be its peak."""

    def __init__(
        self, model: MTPModel, recipe: Recipe, helpers: Helpers, compute: int, device_type: str
    ) -> None:
        self.model, self.recipe, self.helpers = model, recipe, helpers
        self.device_type = device_type
        self.work = workload(recipe, compute)
        lora = recipe.model.lora
        self.has_packed_trunk = lora is not None and lora.quantization == "nf4"
        shape = LayerShape.of(model.config, is_packed=self.work.is_packed)
        self.counter = Counter(shape, self.work, has_packed_trunk=self.has_packed_trunk)
        self.learns_values = helpers.value_head is not None and recipe.critic.value_loss_coef > 0

    def all(self) -> dict[str, dict[str, int]]:
        """Moment -> purpose -> bytes."""
        persistent, activations = self._persistent(), self.counter.model(self.model).total(self.work)
        is_accumulating = self.recipe.train.gradient_accumulation_steps > 1
        earlier = self._gradients() if is_accumulating else 0
        forward = {**persistent, "gradients": earlier, "activations": activations}
        hidden = _FP32 * self.work.num_tokens * self.model.horizon * self.counter.shape.hidden
        moments = {
            "the loss": {**forward, "loss": self._loss_bytes()},
            # The first decoder layer that the backward reaches, with the loss's gradients still there.
            "the first backward": {
                **forward,
                "loss": self._loss_gradients(),
                "temporary": self.counter.backward_bytes() + self._largest_gradient(),
            },
            "the end of the backward": {
                **persistent,
                "gradients": self._gradients(),
                "activations": hidden,
            },
            "the update": {**persistent, "gradients": self._gradients()},
        }
        if self.helpers.reference is not None:
            # One micro-batch is scored while the graph of its forward waits for the loss; several are scored
            # before any graph exists.
            waiting = 0 if is_accumulating else activations
            scoring = self.counter.forward_bytes() + self._scoring_bytes()
            moments["scoring"] = {**persistent, "activations": waiting, "temporary": scoring}
        if self.learns_values:
            moments["the value loss"] = {
                **forward,
                "loss": self._loss_gradients(),
                "value activations": self._value_activations(self.work),
            }
        if self.helpers.value_head is not None:
            moments["stage 1"] = self._stage_1(self.helpers.value_head)
        if self.helpers.reward_model is not None:
            # Programs are scored before stage 1, and the reward model is gone by then.
            reward = count_parameters(self.helpers.reward_model) * self.work.compute
            scoring = self.counter.forward_bytes()
            moments["rewards"] = {"weights": self._weights(), "reward model": reward, "temporary": scoring}
        return moments

    def _persistent(self) -> dict[str, int]:
        """What is there from the second step on."""
        recipe, helpers = self.recipe, self.helpers
        parts = {
            "weights": self._weights(),
            "optimizer moments": count_trained(self.model) * _MOMENTS,
        }
        if helpers.reference is not None:
            parts["reference"] = count_parameters(helpers.reference) * self.work.compute
            if recipe.rho1.current == "frozen":
                parts["frozen snapshot"] = self._weights()
        if helpers.value_head is not None:
            moments = _MOMENTS if self.learns_values else 0
            parts["value head"] = count_parameters(helpers.value_head) * (_FP32 + moments)
        if recipe.train.async_checkpoints and self.device_type == "cpu":
            # A checkpoint on its way to the disk; on a GPU it is in the host's memory, which is not counted
            # here.
            learned = count_trained(self.model)
            saved = self._weights() if recipe.model.lora is None else learned * _FP32
            parts["checkpoint copy"] = saved + learned * _MOMENTS + parts.get("value head", 0)
        return parts

    def _weights(self) -> int:
        """In fp32, but for the matrices of a trunk in four bits."""
        packed = 0
        if self.has_packed_trunk:
            trunk = list(self.model.decoder_layers)[:-1]
            modules = (module for layer in trunk for module in layer.modules())
            frozen = (m.weight for m in modules if isinstance(m, nn.Linear) and not m.weight.requires_grad)
            packed = sum(weight.numel() for weight in frozen)
        return (count_parameters(self.model) - packed) * _FP32 + math.ceil(packed * _PACKED_BYTES)

    def _gradients(self) -> int:
        return count_trained(self.model) * _FP32 + self._value_gradients()

    def _value_gradients(self) -> int:
        if self.helpers.value_head is None or not self.learns_values:
            return 0
        return count_parameters(self.helpers.value_head) * _FP32

    def _largest_gradient(self) -> int:
        """The gradient of one matrix of a decoder layer; under autocast also in 16 bits, before its cast."""
        sizes = [p.numel() for p in self.model.last_layer.parameters()]
        return max(sizes) * (_FP32 + (self.work.compute if self.work.is_mixed else 0))

    def _loss_gradients(self) -> int:
        """Of the hidden states and of the unembedding, in fp32."""
        weight_VD = self.model.unembedding_VD
        numbers = self.work.num_tokens * self.model.horizon * weight_VD.shape[1]
        return _FP32 * (numbers + (weight_VD.numel() if weight_VD.requires_grad else 0))

    def _loss_bytes(self) -> int:
        """The fused cross entropy: the larger of its forward and its backward."""
        vocab_size, hidden = self.model.unembedding_VD.shape
        num_pairs = self.work.num_tokens * self.model.horizon
        rows = min(default_chunk_size(vocab_size, self.device_type), num_pairs)
        compute = self.work.compute
        # Logits and probabilities of a chunk; its hidden states, plain and weighted; their gradient, twice.
        chunk = rows * (vocab_size * (compute + _FP32) + 2 * hidden * (compute + _FP32))
        gradients = held = self._loss_gradients()
        if self.work.is_mixed:
            is_trained = self.model.unembedding_VD.requires_grad
            # The gradient of the logits once more, and copies in 16 bits of the unembedding and of each
            # chunk's part of its gradient; the gradient of the hidden states waits in 16 bits.
            chunk += compute * (rows * vocab_size + (1 + is_trained) * vocab_size * hidden)
            held -= (_FP32 - compute) * num_pairs * hidden
            if is_trained and self.device_type == "cpu":
                # Adding numbers of two widths, a CPU makes a copy of the narrower ones first.
                chunk += _FP32 * vocab_size * hidden
        # The backward scales the gradients into new tensors before it lets go of the old ones; the value
        # loss has been through its own backward by then.
        return held + max(chunk, gradients + self._value_gradients())

    def _scoring_bytes(self) -> int:
        """A chunk of the logits of head 0, in the compute precision, and its probabilities in fp32."""
        vocab_size, hidden = self.model.unembedding_VD.shape
        rows = min(default_chunk_size(vocab_size, self.device_type), self.work.num_tokens)
        copy = vocab_size * hidden * self.work.compute if self.work.is_mixed else 0
        return rows * vocab_size * (self.work.compute + _FP32) + copy

    def _value_activations(self, work: Workload) -> int:
        value_head = self.helpers.value_head
        assert value_head is not None
        counter = Counter(LayerShape.of(self.model.config, is_packed=work.is_packed), work)
        return counter.value_head(value_head)

    def _stage_1(self, value_head: ValueHead) -> dict[str, int]:
        """The value head learns on programs of at most a full row; the base is frozen, and the optimizer of
        stage 2 does not exist yet."""
        recipe, compute = self.recipe, self.work.compute
        length = self.work.length
        work = Workload(recipe.critic.pretrain.batch_size * length, length, False, compute)
        counter = Counter(LayerShape.of(self.model.config, is_packed=False), work)
        parts = {
            "weights": self._weights(),
            "value head": count_parameters(value_head) * (_FP32 + _MOMENTS + _FP32),
            # The base's forward is over before the value head's begins; trunk and hidden states stay.
            "activations": 2 * _FP32 * work.num_tokens * counter.shape.hidden
            + max(self._value_activations(work), counter.forward_bytes()),
        }
        if self.work.is_mixed:
            # Autocast keeps its copies of parameters that require gradients until its context ends.
            parts["weights in bf16"] = compute * sum(
                module.weight.numel()
                for module in self.model.decoder_layers.modules()
                if isinstance(module, nn.Linear) and module.weight.requires_grad
            )
        return parts


def workload(recipe: Recipe, compute: int) -> Workload:
    """Size of a micro-batch."""
    train = recipe.data.train
    multiple = train.pad_to_multiple_of or (8 if train.pack_sequences else 1)
    length = -(-train.max_length // multiple) * multiple
    num_tokens = max(length, train.max_tokens_per_batch or train.batch_size * length)
    return Workload(num_tokens, length, train.pack_sequences, compute)


def count_parameters(module: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_trained(module: nn.Module) -> int:
    """Those that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def format_bytes(num_bytes: int) -> str:
    """GiB or MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
