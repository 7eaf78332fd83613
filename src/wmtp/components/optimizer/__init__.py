"""Optimizers and learning-rate schedules."""

from wmtp.components.optimizer.adamw import AdamWOptimizer, OptimizerBundle, OptimizerContext
from wmtp.components.optimizer.schedules import learning_rate_factor

__all__ = ["AdamWOptimizer", "OptimizerBundle", "OptimizerContext", "learning_rate_factor"]
