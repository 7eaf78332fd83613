"""The models of a run: the base, its tokenizer, and the reference that some algorithms need."""

from __future__ import annotations

from typing import Literal

from wmtp.components.loader import LoadedModel, ModelLoaderContext
from wmtp.components.tokenizer import HfTokenizer
from wmtp.exceptions import UserInputError
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel
from wmtp.pipelines.environment import Environment
from wmtp.settings import Config, Recipe

Role = Literal["base", "ref", "rm"]


def model_path(role: Role, config: Config, recipe: Recipe) -> str:
    """Where the model of a role is: `model.<role>_id` where set, else `paths.models.<role>`.

    Raises:
        UserInputError: neither is set.
    """
    ids = {"base": recipe.model.base_id, "ref": recipe.model.ref_id, "rm": recipe.model.rm_id}
    paths: dict[str, str | None] = dict(config.paths.models)
    path = ids[role] or paths[role]
    if path is None:
        raise UserInputError(
            f"{recipe.train.algo} needs a {role} model, and none is named",
            remedy=f"set model.{role}_id in the recipe or paths.models.{role} in the config",
        )
    return path


def load_base(
    config: Config, recipe: Recipe, environment: Environment, path: str, *, trust_remote_code: bool
) -> LoadedModel:
    """The model to train, with `model.mtp.horizon` heads, on the run's device; fp32 parameters."""
    loader = ComponentFactory.create_model_loader(config, recipe)
    loaded = loader.run(
        ModelLoaderContext(path, horizon=recipe.model.mtp.horizon, trust_remote_code=trust_remote_code)
    )
    loaded.model.to(environment.device)
    return loaded


def load_tokenizer(config: Config, recipe: Recipe, base_path: str) -> HfTokenizer:
    """The tokenizer of the recipe, or the one beside the base model."""
    return ComponentFactory.create_tokenizer(
        recipe, config, path=recipe.model.tokenizer.path or base_path
    )


def load_reference(
    config: Config,
    recipe: Recipe,
    environment: Environment,
    path: str,
    tokenizer: HfTokenizer,
    *,
    trust_remote_code: bool,
) -> MTPModel:
    """The frozen reference model of `rho1-wmtp`, in the run's precision.

    Raises:
        UserInputError: its tokenizer gives other tokens than the base's, so losses cannot be compared.
    """
    reference_tokenizer = ComponentFactory.create_tokenizer(recipe, config, path=path)
    if reference_tokenizer.tokenizer.get_vocab() != tokenizer.tokenizer.get_vocab():
        raise UserInputError(
            "the base's and the reference's tokenizers differ, so their losses are about different tokens: "
            f"{tokenizer.tokenizer.name_or_path!r} ({len(tokenizer.tokenizer)} tokens) and "
            f"{reference_tokenizer.tokenizer.name_or_path!r} ({len(reference_tokenizer.tokenizer)} tokens)",
            remedy="choose a reference of the same family (model.ref_id)",
        )
    loader = ComponentFactory.create_model_loader(config, recipe)
    context = ModelLoaderContext(
        path, horizon=1, dtype=environment.precision, trust_remote_code=trust_remote_code
    )
    reference = loader.run(context).model.to(environment.device)
    return reference.requires_grad_(False).eval()
