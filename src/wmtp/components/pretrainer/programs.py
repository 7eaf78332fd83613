"""Right and wrong programs for a critic: the dataset's own, and rollouts sampled from the base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from wmtp.components.data.examples import Example
from wmtp.components.pretrainer.rewards import LabelledProgram, ProgramScorer, ProgramSource
from wmtp.components.tokenizer import HfTokenizer
from wmtp.decoding import generate
from wmtp.evaluation import Task, assemble_program
from wmtp.exceptions import CheckpointError, UserInputError
from wmtp.execution import ProgramJob, run_programs
from wmtp.modeling import MTPModel
from wmtp.settings import Recipe

_WANTED = {"column": "a `reward` field", "execution": "tests", "reward_model": "text (chats are not scored)"}


def collect_programs(
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    unsafe_execution: bool,
    scorer: ProgramScorer | None = None,
) -> list[LabelledProgram]:
    """Reward up to `critic.reward.num_programs` programs of the dataset.

    Which ones is a function of `train.seed`. With source `execution` their tests are run; with `column` the
    rows' `reward` is taken, and a program with a reward above 0 is right; with `reward_model` the scorer
    rewards them, and which are right is left to `label_by_median`.

    Raises:
        UserInputError: no example can be rewarded this way.
        SandboxUnavailableError: programs would have to be run, and no sandbox works here.
    """
    reward = recipe.critic.reward
    usable = [example for example in examples if _is_usable(example, recipe)]
    if not usable:
        raise UserInputError(
            f"critic.reward.source is {reward.source!r}, but no training row has {_WANTED[reward.source]}",
            remedy="train on rows that have it, or choose another source (execution, column, reward_model)",
        )
    generator = np.random.Generator(np.random.PCG64([recipe.train.seed, len(usable)]))
    chosen = sorted(generator.permutation(len(usable))[: reward.num_programs].tolist())
    programs = [usable[index] for index in chosen]
    if reward.source == "column":
        return [
            LabelledProgram(example, example.reward is not None and example.reward > 0, "data")
            for example in programs
        ]
    return _reward(programs, "data", recipe, unsafe_execution=unsafe_execution, scorer=scorer)


def sample_rollouts(
    model: MTPModel,
    tokenizer: HfTokenizer,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    unsafe_execution: bool,
    scorer: ProgramScorer | None = None,
) -> list[LabelledProgram]:
    """Sample `critic.pretrain.num_rollouts` programs from the base and reward them.

    Prompts are those of `examples` that have tests (any prompt, for a reward model), in an order that is a
    function of `train.seed`; none where there are none, or with a reward column, which says nothing of
    programs that are not in the data.
    """
    settings = recipe.critic.pretrain
    prompted = [example for example in examples if example.prompt and _is_usable(example, recipe)]
    if not prompted or settings.num_rollouts == 0 or recipe.critic.reward.source == "column":
        return []
    generator = np.random.Generator(np.random.PCG64([recipe.train.seed, len(prompted), 1]))
    order = generator.permutation(len(prompted))
    chosen = [prompted[order[index % len(order)]] for index in range(settings.num_rollouts)]
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
    return _reward(rollouts, "rollout", recipe, unsafe_execution=unsafe_execution, scorer=scorer)


def _is_usable(example: Example, recipe: Recipe) -> bool:
    """Whether the recipe's reward source can reward the example."""
    source = recipe.critic.reward.source
    if source == "column":
        return example.reward is not None
    return example.task is not None if source == "execution" else example.messages is None


def _reward(
    examples: Sequence[Example],
    source: ProgramSource,
    recipe: Recipe,
    *,
    unsafe_execution: bool,
    scorer: ProgramScorer | None,
) -> list[LabelledProgram]:
    if recipe.critic.reward.source == "execution":
        return _execute(examples, source, recipe, unsafe_execution=unsafe_execution)
    if scorer is None:
        raise UserInputError(
            "critic.reward.source is 'reward_model', and there is none", remedy="set model.rm_id"
        )
    return scorer.reward(examples, source)


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
                "token_rewards": program.token_rewards,
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
            None if row["token_rewards"] is None else tuple(row["token_rewards"]),
        )
        for row in rows
    ]
