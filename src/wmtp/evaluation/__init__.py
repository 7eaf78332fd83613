"""Programming tasks, from a completion to a program, pass@k and its uncertainty."""

from wmtp.evaluation.contests import contest_prompt, contest_task
from wmtp.evaluation.custom import custom_task
from wmtp.evaluation.mbpp import few_shot_tasks, mbpp_task
from wmtp.evaluation.pass_at_k import mean_pass_at_k, pass_at_k
from wmtp.evaluation.programs import assemble_program
from wmtp.evaluation.statistics import MeanInterval, bootstrap_mean_interval
from wmtp.evaluation.tasks import Task, cut_at_stop, humaneval_task, unix_lines

__all__ = [
    "MeanInterval",
    "Task",
    "assemble_program",
    "bootstrap_mean_interval",
    "contest_prompt",
    "contest_task",
    "custom_task",
    "cut_at_stop",
    "few_shot_tasks",
    "humaneval_task",
    "mbpp_task",
    "mean_pass_at_k",
    "pass_at_k",
    "unix_lines",
]
