"""The models of a run: the base, its tokenizer, and the reference that some algorithms need."""

from __future__ import annotations

import logging

from wmtp.components.loader import LoadedModel, ModelLoaderContext
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.tokenizer.pairs import TokenizerPair, compare_tokenizers, require_rows
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel
from wmtp.modeling.lora import add_lora
from wmtp.pipelines.environment import Environment
from wmtp.settings import Config, Recipe

logger = logging.getLogger(__name__)


def load_base(
    config: Config,
    recipe: Recipe,
    environment: Environment,
    path: str,
    *,
    with_adapters: bool = False,
    keeps_heads: bool = False,
    trust_remote_code: bool,
) -> LoadedModel:
    """The model to train, with the heads of `model.mtp`, on the run's device; fp32 parameters.

    `with_adapters` puts the LoRA adapters of `model.lora` on its trunk. `keeps_heads` takes form and offsets
    of the heads from a checkpoint that has heads, whatever the recipe would give new ones.
    """
    loader = ComponentFactory.create_model_loader(config, recipe)
    mtp = recipe.model.mtp
    loaded = loader.run(
        ModelLoaderContext(
            path,
            horizon=mtp.horizon,
            head=None if keeps_heads else mtp.head,
            adapter=mtp.adapter,
            offsets=None if keeps_heads else mtp.offsets,
            trust_remote_code=trust_remote_code,
        )
    )
    lora = recipe.model.lora
    if with_adapters and lora is not None:
        # Before the model moves: a trunk in four bits need never be on the device in full.
        add_lora(
            loaded.model,
            **lora.model_dump(),
            compute_dtype=environment.precision,
            device=environment.device,
            seed=recipe.train.seed,
        )
    loaded.model.to(environment.device)
    return loaded


def load_tokenizer(config: Config, recipe: Recipe, base_path: str, *, trust_remote_code: bool) -> HfTokenizer:
    """The tokenizer of the recipe, or the one beside the base model."""
    path = recipe.model.tokenizer.path or base_path
    return ComponentFactory.create_tokenizer(recipe, config, path=path, trust_remote_code=trust_remote_code)


def load_own_tokenizer(config: Config, recipe: Recipe, path: str, *, trust_remote_code: bool) -> HfTokenizer:
    """The tokenizer beside a further model, whatever kind the base's is."""
    return ComponentFactory.create_tokenizer(
        recipe, config, path=path, type="hf", trust_remote_code=trust_remote_code
    )


def load_reference(
    config: Config,
    recipe: Recipe,
    environment: Environment,
    path: str,
    tokenizer: HfTokenizer,
    *,
    trust_remote_code: bool,
) -> tuple[MTPModel, TokenizerPair]:
    """The frozen reference model of `rho1-wmtp`, in the run's precision, and how it reads the base's text.

    Raises:
        UserInputError: its tokenizer is another one, and texts cannot be aligned between the two.
    """
    reference_tokenizer = load_own_tokenizer(config, recipe, path, trust_remote_code=trust_remote_code)
    loader = ComponentFactory.create_model_loader(config, recipe)
    context = ModelLoaderContext(
        path, horizon=1, dtype=environment.precision, trust_remote_code=trust_remote_code
    )
    reference = loader.run(context).model.to(environment.device)
    pair = compare_tokenizers(tokenizer, reference_tokenizer, num_rows=_num_rows(reference))
    if pair.relation != "same":
        logger.warning("the reference's tokenizer is %s", pair.describe())
    return reference.requires_grad_(False).eval(), pair


def check_vocabulary(tokenizer: HfTokenizer, model: MTPModel) -> None:
    """Check that the model knows every token of the tokenizer.

    Raises:
        UserInputError: with the first token that has no row in the embedding.
    """
    require_rows(tokenizer, _num_rows(model))


def _num_rows(model: MTPModel) -> int:
    return int(model.unembedding_VD.shape[0])
