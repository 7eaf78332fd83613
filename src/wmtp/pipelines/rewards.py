"""The reward model of a run: loaded where the recipe asks it for rewards, with the tokenizer beside it."""

from __future__ import annotations

import logging

from wmtp.components.loader import RewardLoaderContext
from wmtp.components.pretrainer import ProgramScorer
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.tokenizer.pairs import compare_tokenizers
from wmtp.exceptions import ModelLoadError
from wmtp.factory import ComponentFactory
from wmtp.pipelines.environment import Environment
from wmtp.pipelines.models import load_own_tokenizer
from wmtp.settings import Config, Recipe, require_model

logger = logging.getLogger(__name__)


def needs_reward_model(recipe: Recipe) -> bool:
    """Whether stage 1 of the run asks a reward model."""
    return recipe.train.algo == "critic-wmtp" and recipe.critic.reward.source == "reward_model"


def load_program_scorer(
    config: Config,
    recipe: Recipe,
    environment: Environment,
    tokenizer: HfTokenizer,
    *,
    trust_remote_code: bool,
) -> ProgramScorer | None:
    """The reward model, in the run's precision and on its device; None where the recipe asks none.

    Raises:
        UserInputError: no reward model is named, or texts cannot be aligned between its tokenizer and the
            base's.
        ModelLoadError: it or its tokenizer cannot be loaded.
    """
    if not needs_reward_model(recipe):
        return None
    path = require_model(config, recipe, "rm").path
    reward_tokenizer = load_reward_tokenizer(config, recipe, path, trust_remote_code=trust_remote_code)
    loader = ComponentFactory.create_reward_model_loader(config)
    model = loader.run(RewardLoaderContext(path, environment.precision, trust_remote_code))
    pair = compare_tokenizers(tokenizer, reward_tokenizer, num_rows=model.vocabulary_size)
    if pair.relation != "same":
        logger.warning("the reward model's tokenizer is %s", pair.describe())
    return ProgramScorer(
        model.to(environment.device),
        pair,
        granularity=recipe.critic.reward.granularity,
        batch_size=recipe.critic.pretrain.batch_size,
    )


def load_reward_tokenizer(
    config: Config, recipe: Recipe, path: str, *, trust_remote_code: bool
) -> HfTokenizer:
    """The tokenizer beside the reward model.

    Raises:
        ModelLoadError: there is none.
    """
    try:
        return load_own_tokenizer(config, recipe, path, trust_remote_code=trust_remote_code)
    except ModelLoadError as error:
        raise ModelLoadError(
            error.message,
            remedy="put the tokenizer the reward model was trained with (tokenizer.json, "
            "tokenizer_config.json) into its directory",
        ) from error
