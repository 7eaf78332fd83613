"""The models of a run: the base, its tokenizer, and the reference that some algorithms need."""

from __future__ import annotations

from wmtp.components.loader import LoadedModel, ModelLoaderContext
from wmtp.components.tokenizer import HfTokenizer
from wmtp.exceptions import UserInputError
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel
from wmtp.modeling.lora import add_lora
from wmtp.pipelines.environment import Environment
from wmtp.settings import Config, Recipe


def load_base(
    config: Config,
    recipe: Recipe,
    environment: Environment,
    path: str,
    *,
    with_adapters: bool = False,
    trust_remote_code: bool,
) -> LoadedModel:
    """The model to train, with the heads of `model.mtp`, on the run's device; fp32 parameters.

    `with_adapters` puts the LoRA adapters of `model.lora` on its trunk.
    """
    loader = ComponentFactory.create_model_loader(config, recipe)
    mtp = recipe.model.mtp
    loaded = loader.run(
        ModelLoaderContext(
            path,
            horizon=mtp.horizon,
            head=mtp.head,
            adapter=mtp.adapter,
            offsets=mtp.offsets,
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
    reference_tokenizer = ComponentFactory.create_tokenizer(
        recipe, config, path=path, trust_remote_code=trust_remote_code
    )
    same_vocabulary(tokenizer, reference_tokenizer)
    loader = ComponentFactory.create_model_loader(config, recipe)
    context = ModelLoaderContext(
        path, horizon=1, dtype=environment.precision, trust_remote_code=trust_remote_code
    )
    reference = loader.run(context).model.to(environment.device)
    return reference.requires_grad_(False).eval()


def same_vocabulary(base: HfTokenizer, reference: HfTokenizer) -> None:
    """Check that two tokenizers give the same tokens, so that losses on them can be compared.

    Raises:
        UserInputError: they differ; the message names both.
    """
    if base.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise UserInputError(
            "the base's and the reference's tokenizers differ, so their losses are about different tokens: "
            f"{base.tokenizer.name_or_path!r} ({len(base.tokenizer)} tokens) and "
            f"{reference.tokenizer.name_or_path!r} ({len(reference.tokenizer)} tokens)",
            remedy="choose a reference of the same family (model.ref_id)",
        )
