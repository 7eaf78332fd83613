"""AdamW with decoupled weight decay on matrices only (Loshchilov and Hutter, 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from wmtp.components.base import Component
from wmtp.components.optimizer.schedules import learning_rate_factor
from wmtp.components.registry import optimizer_registry
from wmtp.exceptions import UserInputError
from wmtp.settings.recipe_train import OptimSettings


@dataclass(frozen=True, slots=True)
class OptimizerContext:
    """What an optimizer works on.

    Attributes:
        modules: name -> module whose trainable parameters are optimised; the main model is called `model`.
        max_steps: number of updates of the whole run, which the schedule is stretched over.
        learning_rates: name -> peak learning rate of a module that has its own.
    """

    modules: dict[str, nn.Module]
    max_steps: int
    learning_rates: dict[str, float]


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
                name, module, context.learning_rates.get(name, settings.lr), settings.weight_decay
            )
        ]
        if not groups:
            raise UserInputError("no parameter is trainable", remedy="set model.trainable: all")
        optimizer = AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)

        def factor(step: int) -> float:
            return learning_rate_factor(
                step,
                schedule=settings.scheduler,
                max_steps=context.max_steps,
                warmup_steps=settings.warmup_steps,
                decay_ratio=settings.decay_ratio,
                min_lr_ratio=settings.min_lr_ratio,
            )

        return OptimizerBundle(optimizer, LambdaLR(optimizer, factor))


def _parameter_groups(
    name: str, module: nn.Module, learning_rate: float, weight_decay: float
) -> Iterator[dict[str, Any]]:
    """Two groups a module: matrices with decay; biases, norms and embeddings without."""
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    for parameters, decay in ((decayed, weight_decay), (plain, 0.0)):
        if parameters:
            yield {"params": parameters, "lr": learning_rate, "weight_decay": decay, "module": name}
