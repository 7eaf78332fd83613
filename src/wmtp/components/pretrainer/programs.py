"""Right and wrong programs for a critic: the dataset's own, and rollouts sampled from the base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from wmtp.components.data.examples import Example
from wmtp.components.tokenizer import HfTokenizer
from wmtp.decoding import generate
from wmtp.evaluation import Task, assemble_program
from wmtp.exceptions import CheckpointError, UserInputError
from wmtp.execution import ProgramJob, run_programs
from wmtp.modeling import MTPModel
from wmtp.settings import Recipe

ProgramSource = Literal["data", "rollout"]


@dataclass(frozen=True, slots=True)
class LabelledProgram:
    """A program and what it earned.

    Attributes:
        example: prompt and completion; its `reward` is set.
        is_right: whether the program is right.
        source: the dataset, or a rollout of the base.
    """

    example: Example
    is_right: bool
    source: ProgramSource


def collect_programs(
    examples: Sequence[Example], recipe: Recipe, *, unsafe_execution: bool
) -> list[LabelledProgram]:
    """Reward up to `critic.reward.num_programs` programs of the dataset.

    Which ones is a function of `train.seed`. With source `execution` their tests are run; with `column` the
    rows'
    `reward` is taken, and a program with a reward above 0 is right.

    Raises:
        UserInputError: no example can be rewarded this way.
        SandboxUnavailableError: programs would have to be run, and no sandbox works here.
    """
    reward = recipe.critic.reward
    is_column = reward.source == "column"
    usable = [example for example in examples if (example.reward if is_column else example.task) is not None]
    if not usable:
        wanted = "a `reward` field" if is_column else "tests"
        raise UserInputError(
            f"critic.reward.source is {reward.source!r}, but no training row has {wanted}",
            remedy="train on rows that have it, or choose the other source (execution or column)",
        )
    generator = np.random.Generator(np.random.PCG64([recipe.train.seed, len(usable)]))
    chosen = sorted(generator.permutation(len(usable))[: reward.num_programs].tolist())
    programs = [usable[index] for index in chosen]
    if is_column:
        return [
            LabelledProgram(example, example.reward is not None and example.reward > 0, "data")
            for example in programs
        ]
    return _execute(programs, "data", recipe, unsafe_execution=unsafe_execution)


def sample_rollouts(
    model: MTPModel,
    tokenizer: HfTokenizer,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    unsafe_execution: bool,
) -> list[LabelledProgram]:
    """Sample `critic.pretrain.num_rollouts` programs from the base and run their tests.

    Prompts are those of `examples` that have tests, in an order that is a function of `train.seed`; none
    where there are no tests (a reward column says nothing of programs that are not in the data).
    """
    settings = recipe.critic.pretrain
    with_tests = [example for example in examples if example.task is not None]
    if not with_tests or settings.num_rollouts == 0 or recipe.critic.reward.source == "column":
        return []
    generator = np.random.Generator(np.random.PCG64([recipe.train.seed, len(with_tests), 1]))
    order = generator.permutation(len(with_tests))
    chosen = [with_tests[order[index % len(order)]] for index in range(settings.num_rollouts)]
    # Tasks of one dataset share their stop strings; elsewhere assembling the program cuts at its own.
    stops = {example.task.stop for example in chosen if example.task is not None}
    generations = generate(
        model.causal_lm,
        [tokenizer.encode_prompt(example.prompt) for example in chosen],
        tokenizer=tokenizer.tokenizer,
        max_new_tokens=recipe.eval.max_new_tokens,
        temperature=settings.rollout_temperature,
        seed=recipe.train.seed,
        stop=stops.pop() if len(stops) == 1 else (),
        batch_size=recipe.eval.batch_size,
    )
    rollouts = [
        replace(example, row_id=f"{example.row_id}#rollout-{index}", completion=generation.text, reward=None)
        for index, (example, generation) in enumerate(zip(chosen, generations, strict=True))
    ]
    return _execute(rollouts, "rollout", recipe, unsafe_execution=unsafe_execution)


def _execute(
    examples: Sequence[Example], source: ProgramSource, recipe: Recipe, *, unsafe_execution: bool
) -> list[LabelledProgram]:
    """Run every example's completion against its tests; the reward is the fraction of asserts passed."""
    jobs = [
        _job(example.task, example.completion, recipe) for example in examples if example.task is not None
    ]
    results = run_programs(jobs, num_workers=recipe.eval.num_workers, unsafe=unsafe_execution)
    return [
        LabelledProgram(
            replace(example, reward=result.asserts_passed / max(result.asserts_total, 1)),
            result.passed,
            source,
        )
        for example, result in zip(examples, results, strict=True)
    ]


def _job(task: Task, completion: str, recipe: Recipe) -> ProgramJob:
    return ProgramJob(
        source=assemble_program(task, completion),
        tests=task.tests,
        setup=task.setup,
        timeout_s=recipe.eval.timeout_s,
        memory_mib=recipe.eval.memory_mib,
        stop_at_failure=False,
    )


def write_programs(path: Path, programs: Sequence[LabelledProgram]) -> None:
    """Keep programs and rewards, one JSON object a line, to look at and to resume from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {
                "row_id": program.example.row_id,
                "source": program.source,
                "prompt": program.example.prompt,
                "completion": program.example.completion,
                "reward": program.example.reward,
                "is_right": program.is_right,
            },
            ensure_ascii=False,
        )
        for program in programs
    ]
    # Generated text may hold lone surrogates (bytes that are no character).
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))


def read_programs(path: Path) -> list[LabelledProgram]:
    """Read what `write_programs` kept.

    Raises:
        CheckpointError: the file is missing.
    """
    if not path.is_file():
        raise CheckpointError(f"the run has no rewarded programs at {path}", remedy="start the run anew")
    # By bytes, because `str.splitlines` also cuts at characters that may stand inside a program.
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [
        LabelledProgram(
            Example(row["row_id"], row["prompt"], row["completion"], reward=row["reward"]),
            row["is_right"],
            row["source"],
        )
        for row in rows
    ]
