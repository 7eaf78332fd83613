"""How much memory a run will take, estimated without weights; see docs/concepts/memory.md."""

from wmtp.pipelines.memory.estimate import Helpers, MemoryEstimate, estimate_memory, estimate_training

__all__ = ["Helpers", "MemoryEstimate", "estimate_memory", "estimate_training"]
