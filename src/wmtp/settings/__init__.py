"""Settings: the two schemas (`Config`: where it runs, `Recipe`: what is run), loader and documentation.

Nothing here imports torch, so that a command with a wrong setting answers at once.
"""

from wmtp.settings.availability import require_available
from wmtp.settings.config import (
    Config,
    DatasetPaths,
    DeviceSettings,
    LauncherResources,
    LauncherSettings,
    MlflowSettings,
    ModelPaths,
    PathSettings,
    S3Settings,
)
from wmtp.settings.errors import ConfigError, Problem
from wmtp.settings.loader import load_config, load_recipe, load_settings
from wmtp.settings.recipe import Recipe
from wmtp.settings.recipe_critic import CriticSettings, PretrainSettings, RewardSettings, ValueHeadSettings
from wmtp.settings.recipe_data import DataSettings, EvalDataSettings, MicroCodeSettings, TrainDataSettings
from wmtp.settings.recipe_eval import EvalSettings, EvalType
from wmtp.settings.recipe_model import LoraSettings, ModelSettings, MtpSettings, TokenizerSettings
from wmtp.settings.recipe_train import Algorithm, LossSettings, OptimSettings, Rho1Settings, TrainSettings
from wmtp.settings.redaction import redacted_dump
from wmtp.settings.reference import render_reference
from wmtp.settings.resolution import (
    DATASET_NAMES,
    ModelChoice,
    ModelRole,
    find_dataset,
    find_model,
    require_model,
)
from wmtp.settings.schema import json_schema

__all__ = [
    "DATASET_NAMES",
    "Algorithm",
    "Config",
    "ConfigError",
    "CriticSettings",
    "DataSettings",
    "DatasetPaths",
    "DeviceSettings",
    "EvalDataSettings",
    "EvalSettings",
    "EvalType",
    "LauncherResources",
    "LauncherSettings",
    "LoraSettings",
    "LossSettings",
    "MicroCodeSettings",
    "MlflowSettings",
    "ModelChoice",
    "ModelPaths",
    "ModelRole",
    "ModelSettings",
    "MtpSettings",
    "OptimSettings",
    "PathSettings",
    "PretrainSettings",
    "Problem",
    "Recipe",
    "RewardSettings",
    "Rho1Settings",
    "S3Settings",
    "TokenizerSettings",
    "TrainDataSettings",
    "TrainSettings",
    "ValueHeadSettings",
    "find_dataset",
    "find_model",
    "json_schema",
    "load_config",
    "load_recipe",
    "load_settings",
    "redacted_dump",
    "render_reference",
    "require_available",
    "require_model",
]
