"""Stage 1 of `critic-wmtp`: rewarded programs, a value head, and how good it is."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from wmtp.components.data import Feature
from wmtp.components.pretrainer import (
    CriticQuality,
    LabelledProgram,
    PretrainerContext,
    ProgramScorer,
    RewardedPrograms,
    collect_programs,
    label_by_median,
    measure_critic,
    read_programs,
    sample_rollouts,
    write_programs,
)
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.trainer.base import autocast_factory
from wmtp.exceptions import UserInputError
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel, ValueHead
from wmtp.modeling.value_head import DESCRIPTION_FILE, WEIGHTS_FILE
from wmtp.pipelines.data import PreparedData
from wmtp.pipelines.environment import Environment, RunPaths
from wmtp.settings import Config, Recipe
from wmtp.storage import PathResolver, create_s3_manager
from wmtp.tracking import Tracker, download_model_artifact

logger = logging.getLogger(__name__)

VALUE_HEAD_MODEL = "wmtp_critic_value_head"
_VALUE_HEAD_ARTIFACT = "critic/value_head"
_MEASURE_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class Critic:
    """A value head and the held-out programs it is measured on.

    Attributes:
        value_head: on the run's device.
        holdout: programs neither stage trains the value head on.
    """

    value_head: ValueHead
    holdout: RewardedPrograms


def prepare_critic(
    recipe: Recipe,
    environment: Environment,
    model: MTPModel,
    tokenizer: HfTokenizer,
    data: PreparedData,
    *,
    folder: Path,
    value_head: Path | None,
    load_scorer: Callable[[], ProgramScorer | None],
    unsafe_execution: bool,
    is_resumed: bool,
) -> Critic:
    """Reward programs, then train a value head on them, or load the one in the folder `value_head`.

    Programs and value head are kept in `folder`, and a resumed run takes both from there. The rewards of
    training programs also go to the features of `data`, for the auxiliary value loss of stage 2; held-out
    programs get none.
    """
    programs_file = folder / "programs.jsonl"
    if is_resumed:
        programs = read_programs(programs_file)
    else:
        programs = _reward_programs(
            recipe, model, tokenizer, data, load_scorer=load_scorer, unsafe_execution=unsafe_execution
        )
        write_programs(programs_file, programs)
    train, holdout = _split_by_prompt(programs, recipe)
    _reward_features(data, train)
    autocast = autocast_factory(environment.device, environment.precision)
    holdout_programs = _tokenize(holdout, tokenizer)
    saved_head = folder / "value_head" if is_resumed else value_head
    if saved_head is None:
        context = PretrainerContext(
            model=model,
            train=_tokenize(train, tokenizer),
            holdout=holdout_programs,
            collator=data.collator,
            device=environment.device,
            autocast=autocast,
        )
        trained = ComponentFactory.create_pretrainer(recipe).run(context).value_head
    else:
        trained = ValueHead.load(saved_head, model).to(environment.device)
    if not is_resumed:
        trained.save(folder / "value_head")
    return Critic(trained, holdout_programs)


@contextmanager
def local_value_head(config: Config, source: str | None) -> Iterator[Path | None]:
    """The folder of the value head that `critic.value_head` names, for the length of a block; None for none.

    What is on S3 or registered in MLflow (`models:/name/version`) is in a temporary folder for as long as it
    takes to load it.

    Raises:
        ModelLoadError: there is no such registered version.
        StorageError: there is no such object, or it cannot be had.
    """
    if source is None:
        yield None
        return
    kind, resolved = PathResolver().resolve(source)
    if kind not in ("s3", "models"):
        yield Path(resolved)
        return
    with TemporaryDirectory(prefix="wmtp-value-head-") as folder:
        target = Path(folder)
        if kind == "models":
            target = download_model_artifact(
                config, resolved, target, open_store=lambda: create_s3_manager(config)
            )
        else:
            manager = create_s3_manager(config)
            for name in (DESCRIPTION_FILE, WEIGHTS_FILE):
                uri = f"{resolved.rstrip('/')}/{name}"
                with manager.stream_model(uri) as stream, (target / name).open("wb") as file:
                    shutil.copyfileobj(stream, file)
        yield target


def register_value_head(tracker: Tracker, critic: Critic, paths: RunPaths) -> None:
    """Record the value head as it is after training, and register it as `wmtp_critic_value_head`."""
    folder = paths.checkpoints / "critic" / "value_head_final"
    critic.value_head.save(folder)
    tracker.log_model(VALUE_HEAD_MODEL, folder, _VALUE_HEAD_ARTIFACT)


def untrained_critic(recipe: Recipe, model: MTPModel, environment: Environment) -> Critic | None:
    """A value head that has learned nothing, for the shapes and the memory of a dry run."""
    if recipe.train.algo != "critic-wmtp":
        return None
    value_head = ValueHead.from_model(model, form=recipe.critic.head.form).to(environment.device)
    return Critic(value_head, RewardedPrograms([], []))


def critic_measurement(
    critic: Critic, model: MTPModel, data: PreparedData, environment: Environment
) -> Callable[[], CriticQuality]:
    """A function that measures the critic with the model as it is when called."""
    autocast = autocast_factory(environment.device, environment.precision)

    def measure() -> CriticQuality:
        return measure_critic(
            model,
            critic.value_head,
            critic.holdout,
            collator=data.collator,
            batch_size=_MEASURE_BATCH_SIZE,
            device=environment.device,
            autocast=autocast,
        )

    return measure


def _reward_programs(
    recipe: Recipe,
    model: MTPModel,
    tokenizer: HfTokenizer,
    data: PreparedData,
    *,
    load_scorer: Callable[[], ProgramScorer | None],
    unsafe_execution: bool,
) -> list[LabelledProgram]:
    """Programs of the data and rollouts with what they earned; a reward model is gone again afterwards."""
    scorer = load_scorer()
    examples = list(data.examples.values())
    programs = collect_programs(examples, recipe, unsafe_execution=unsafe_execution, scorer=scorer)
    programs += sample_rollouts(
        model, tokenizer, examples, recipe, unsafe_execution=unsafe_execution, scorer=scorer
    )
    return programs if scorer is None else label_by_median(programs)


def _split_by_prompt(
    programs: list[LabelledProgram], recipe: Recipe
) -> tuple[list[LabelledProgram], list[LabelledProgram]]:
    """Training and held-out programs; those of one prompt stay on one side (plain texts are their own)."""

    def prompt_of(program: LabelledProgram) -> str:
        return program.example.prompt or program.example.row_id

    prompts = sorted({prompt_of(program) for program in programs})
    generator = np.random.Generator(np.random.PCG64([recipe.train.seed, len(prompts), 2]))
    num_held_out = max(1, round(recipe.critic.pretrain.holdout_ratio * len(prompts)))
    held_out = {prompts[index] for index in generator.permutation(len(prompts))[:num_held_out]}
    train = [program for program in programs if prompt_of(program) not in held_out]
    holdout = [program for program in programs if prompt_of(program) in held_out]
    if not train:
        raise UserInputError(
            f"all {len(programs)} rewarded programs share one prompt, so none can be held out",
            remedy="train on data with several prompts, or name a trained critic.value_head",
        )
    return train, holdout


def _tokenize(programs: list[LabelledProgram], tokenizer: HfTokenizer) -> RewardedPrograms:
    features = tokenizer.tokenize_dataset([program.example for program in programs])
    by_row_id = {program.example.row_id: program for program in programs}
    for feature in features:
        _add_token_rewards(feature, by_row_id[feature["row_id"]])
    return RewardedPrograms(features, [by_row_id[feature["row_id"]].is_right for feature in features])


def _reward_features(data: PreparedData, programs: list[LabelledProgram]) -> None:
    """Give the training features the rewards that are known and not held out, and no others."""
    by_row_id = {program.example.row_id: program for program in programs}
    for feature in data.features:
        program = by_row_id.get(feature["row_id"])
        feature["reward"] = None if program is None else program.example.reward
        if program is not None:
            _add_token_rewards(feature, program)


def _add_token_rewards(feature: Feature, program: LabelledProgram) -> None:
    if program.token_rewards is not None:
        feature["rewards"] = program.token_rewards
