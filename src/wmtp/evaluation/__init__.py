"""Programming tasks, pass@k and its uncertainty."""

from wmtp.evaluation.pass_at_k import mean_pass_at_k, pass_at_k
from wmtp.evaluation.statistics import MeanInterval, bootstrap_mean_interval
from wmtp.evaluation.tasks import Task, assemble_program, cut_at_stop, humaneval_task, mbpp_task

__all__ = [
    "MeanInterval",
    "Task",
    "assemble_program",
    "bootstrap_mean_interval",
    "cut_at_stop",
    "humaneval_task",
    "mbpp_task",
    "mean_pass_at_k",
    "pass_at_k",
]
