"""`ComponentFactory`: from settings to components."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from transformers import PreTrainedTokenizerBase

from wmtp.components.data import CollatorSettings, DataLoaderSettings, MicroCodeOptions, UnifiedDataLoader
from wmtp.components.data.batching import Collator
from wmtp.components.loader import CheckpointLoader, RewardModelLoader, UnifiedModelLoader
from wmtp.components.optimizer import AdamWOptimizer
from wmtp.components.pretrainer import CriticHeadPretrainer
from wmtp.components.registry import (
    collator_registry,
    evaluator_registry,
    loader_registry,
    optimizer_registry,
    pretrainer_registry,
    scorer_registry,
    tokenizer_registry,
    trainer_registry,
)
from wmtp.components.scorer import Scorer
from wmtp.components.tokenizer import HfTokenizer, TokenizerSettings
from wmtp.components.trainer import BaseWmtpTrainer
from wmtp.settings import Config, Recipe
from wmtp.settings.recipe_data import TrainDataSettings
from wmtp.storage import create_s3_manager
from wmtp.tracking import create_mlflow_manager

if TYPE_CHECKING:
    from wmtp.tracking.mlflow_tracker import MLflowManager

# The scorer of each algorithm that has one of its own.
_ALGORITHM_SCORERS: Final = {"critic-wmtp": "critic-delta-v1", "rho1-wmtp": "rho1-excess-v1"}
_MODEL_LOADER: Final = "unified-model-loader"
_REWARD_MODEL_LOADER: Final = "reward-model-loader"
_PACKED_PADDING: Final = 8


def padding_multiple(train: TrainDataSettings) -> int | None:
    """Row lengths are rounded up to this many tokens: 8 when packing, unless the recipe says otherwise."""
    default = _PACKED_PADDING if train.pack_sequences else None
    return train.pad_to_multiple_of or default


class ComponentFactory:
    """Looks components up by the keys of the recipe and builds them."""

    @staticmethod
    def create_trainer(recipe: Recipe, config: Config) -> BaseWmtpTrainer:
        """The trainer of `train.algo`."""
        trainer: BaseWmtpTrainer = trainer_registry.create(recipe.train.algo, recipe)
        return trainer

    @staticmethod
    def create_model_loader(
        config: Config, recipe: Recipe | None = None, type: str | None = None
    ) -> UnifiedModelLoader:
        """The model loader `type`, by default the unified one."""
        loader: UnifiedModelLoader = loader_registry.create(type or _MODEL_LOADER, config)
        return loader

    @staticmethod
    def create_reward_model_loader(config: Config) -> RewardModelLoader:
        """The loader of reward models."""
        loader: RewardModelLoader = loader_registry.create(_REWARD_MODEL_LOADER, config)
        return loader

    @staticmethod
    def create_data_loader(recipe: Recipe, config: Config) -> UnifiedDataLoader:
        """The data loader, with the recipe's generator settings and the config's access to S3."""
        settings = DataLoaderSettings(
            on_bad_row=recipe.data.on_bad_row,
            microcode=MicroCodeOptions(**recipe.data.microcode.model_dump()),
            s3=config.s3,
        )
        loader: UnifiedDataLoader = loader_registry.create("unified-data-loader", settings)
        return loader

    @staticmethod
    def create_tokenizer(
        recipe: Recipe,
        config: Config,
        *,
        path: str,
        type: str | None = None,
        trust_remote_code: bool = False,
    ) -> HfTokenizer:
        """The tokenizer of a type, the recipe's where none is given, read from `path`."""
        settings = TokenizerSettings(
            path=path,
            max_length=recipe.data.train.max_length,
            train_on_prompt=recipe.data.train.train_on_prompt,
            trust_remote_code=trust_remote_code,
            s3=config.s3,
        )
        tokenizer: HfTokenizer = tokenizer_registry.create(type or recipe.model.tokenizer.type, settings)
        return tokenizer

    @staticmethod
    def create_optimizer(recipe: Recipe, config: Config) -> AdamWOptimizer:
        """The optimizer of `optim.name`."""
        optimizer: AdamWOptimizer = optimizer_registry.create(recipe.optim.name, recipe.optim)
        return optimizer

    @staticmethod
    def create_pretrainer(recipe: Recipe) -> CriticHeadPretrainer:
        """The trainer of the critic's value head."""
        pretrainer: CriticHeadPretrainer = pretrainer_registry.create("critic-head-pretrainer", recipe)
        return pretrainer

    @staticmethod
    def create_scorer(recipe: Recipe) -> Scorer | None:
        """The scorer of the algorithm, or the one `train.scorer` names; None for uniform weights."""
        key = _ALGORITHM_SCORERS.get(recipe.train.algo, recipe.train.scorer)
        if key is None:
            return None
        scorer: Scorer = scorer_registry.create(key, recipe)
        return scorer

    @staticmethod
    def create_evaluator(recipe: Recipe, config: Config, type: str = "meta-mtp") -> Any:
        """The evaluator of an evaluation type."""
        return evaluator_registry.create(type, recipe.eval)

    @staticmethod
    def create_checkpoint_loader(config: Config) -> CheckpointLoader:
        """The loader of training checkpoints."""
        loader: CheckpointLoader = loader_registry.create("checkpoint-loader", config)
        return loader

    @staticmethod
    def create_mlflow_manager(config: Config) -> MLflowManager:
        """An MLflow run at the config's tracking store."""
        return create_mlflow_manager(config, open_store=lambda: create_s3_manager(config))

    @staticmethod
    def create_collator(
        recipe: Recipe,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        model_metadata: dict[str, Any] | None = None,
    ) -> Collator:
        """`MTPDataCollator` where the metadata says `training_algorithm: mtp`, else `LMDataCollator`."""
        metadata = model_metadata or {}
        is_mtp = metadata.get("training_algorithm") == "mtp"
        settings = CollatorSettings(
            tokenizer=tokenizer,
            horizon=metadata["horizon"] if is_mtp else 1,
            offsets=metadata.get("offsets"),
            pad_to_multiple_of=padding_multiple(recipe.data.train),
        )
        key = "mtp-data-collator" if is_mtp else "lm-data-collator"
        collator: Collator = collator_registry.create(key, settings)
        return collator
