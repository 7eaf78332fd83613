"""AdamW with decoupled weight decay on matrices only (Loshchilov and Hutter, 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from wmtp.components.base import Component
from wmtp.components.optimizer.schedules import learning_rate_factor
from wmtp.components.registry import optimizer_registry
from wmtp.exceptions import UserInputError
from wmtp.modeling import LateParameters
from wmtp.settings.recipe_train import OptimSettings


@dataclass(frozen=True, slots=True)
class OptimizerContext:
    """What an optimizer works on.

    Attributes:
        modules: name -> module whose trainable parameters are optimised; the main model is called `model`.
        max_steps: number of updates of the whole run, which the schedule is stretched over.
        learning_rates: name -> peak learning rate of a module that has its own.
        late: parameters that are frozen at first; they are optimised too, and their learning rate is warmed
            up when they join, because then their moments are new.
    """

    modules: dict[str, nn.Module]
    max_steps: int
    learning_rates: dict[str, float]
    late: LateParameters | None = None


@dataclass(frozen=True, slots=True)
class OptimizerBundle:
    """An optimizer and the schedule that moves its learning rates."""

    optimizer: AdamW
    scheduler: LambdaLR


@optimizer_registry.register("adamw", version="1.0.0", description="AdamW, fused; decay on matrices only")
class AdamWOptimizer(Component[OptimizerContext, OptimizerBundle]):
    """Builds `torch.optim.AdamW` and its schedule from the `optim` section of a recipe."""

    def __init__(self, settings: OptimSettings) -> None:
        self.settings = settings

    def run(self, context: OptimizerContext) -> OptimizerBundle:
        """Build the optimizer.

        Raises:
            UserInputError: no parameter is trainable.
        """
        settings = self.settings
        groups = [
            group
            for name, module in context.modules.items()
            for group in _parameter_groups(
                name,
                module,
                context.learning_rates.get(name, settings.lr),
                settings.weight_decay,
                () if context.late is None else context.late.parameters,
            )
        ]
        if not groups:
            raise UserInputError("no parameter is trainable", remedy="set model.trainable: all")
        optimizer = AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)

        factors = [
            self._factor(context, context.late.first_step if group["late"] and context.late else 0)
            for group in optimizer.param_groups
        ]
        return OptimizerBundle(optimizer, LambdaLR(optimizer, factors))

    def _factor(self, context: OptimizerContext, first_step: int) -> Callable[[int], float]:
        """Factor on the learning rate of parameters that take part from the update `first_step` on."""
        settings = self.settings

        def factor(step: int) -> float:
            if step < first_step:
                return 0.0
            own_warmup = 1.0
            if first_step and settings.warmup_steps:
                own_warmup = min(1.0, (step - first_step + 1) / settings.warmup_steps)
            return own_warmup * learning_rate_factor(
                step,
                schedule=settings.scheduler,
                max_steps=context.max_steps,
                warmup_steps=settings.warmup_steps,
                decay_ratio=settings.decay_ratio,
                min_lr_ratio=settings.min_lr_ratio,
            )

        return factor


def _parameter_groups(
    name: str,
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
    late: Sequence[nn.Parameter],
) -> Iterator[dict[str, Any]]:
    """Groups of a module: matrices with decay, biases, norms and embeddings without; late ones apart."""
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    late_ids = {id(parameter) for parameter in late}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (is_late, is_decayed): [] for is_late in (False, True) for is_decayed in (True, False)
    }
    for parameter in module.parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim >= 2 and id(parameter) not in embeddings
            groups[id(parameter) in late_ids, is_decayed].append(parameter)
    for (is_late, is_decayed), parameters in groups.items():
        if parameters:
            yield {
                "params": parameters,
                "lr": learning_rate,
                "weight_decay": weight_decay if is_decayed else 0.0,
                "module": name,
                "late": is_late,
            }
