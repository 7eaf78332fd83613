"""MicroCode: generated programming tasks small enough to learn in a minute on a laptop."""

from wmtp.evaluation.microcode.generator import MicroCodeProblem, generate_problems, to_task
from wmtp.evaluation.microcode.problems import Split
from wmtp.evaluation.microcode.tokenizer import build_tokenizer

__all__ = ["MicroCodeProblem", "Split", "build_tokenizer", "generate_problems", "to_task"]
