"""From what a user points at to a model: run folders, steps, exports, model ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wmtp.components.loader.step_stores import find_checkpoint, run_of
from wmtp.components.loader.training_state import holds_adapters_only
from wmtp.components.tokenizer import HfTokenizer
from wmtp.distributed.checkpoint_store import STEP_NAME
from wmtp.distributed.publishing import MANIFEST_NAME
from wmtp.exceptions import CheckpointError
from wmtp.modeling import MTPModel
from wmtp.modeling.formats.kinds import PARAMS_FILE
from wmtp.modeling.formats.sources import CONFIG_FILE
from wmtp.modeling.lora import check_same_base
from wmtp.modeling.trainable import checkpoint_tensors
from wmtp.pipelines.builtin_models import prepare_builtin_model
from wmtp.pipelines.environment import Environment
from wmtp.pipelines.models import load_base, load_tokenizer
from wmtp.pipelines.outputs import RunOptions
from wmtp.settings import Config, Recipe, require_model
from wmtp.storage import PathResolver, create_s3_manager

_REMEDY = (
    "give a run folder (runs/models/<run>), a step-N folder, runs:/<MLflow id>, an export, "
    "a model folder or a model id"
)


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """Where a model is.

    Attributes:
        path: a model folder or id, or a `step-N` or run folder.
        is_training_state: whether it is training checkpoints, which have no tokenizer.
    """

    path: str
    is_training_state: bool


def locate_model(config: Config, path: str) -> LocatedModel:
    """Find what `path` names: an export in it, a model folder or id, training checkpoints, or an MLflow run.

    Raises:
        CheckpointError: a local path that does not exist or holds neither; an MLflow run without checkpoints.
        StorageError: S3 does not give it.
    """
    resolver = PathResolver()
    kind, resolved = resolver.resolve(path)
    if kind == "runs":
        return locate_model(config, run_of(config, path))
    if kind == "s3":
        folder = create_s3_manager(config).folder(resolved)
        # Its manifest comes last: without it the model is only on its way there.
        if "final" in folder.subfolders() and MANIFEST_NAME in folder.subfolder("final").names():
            return LocatedModel(f"{folder}/final", is_training_state=False)
        is_step = STEP_NAME.match(resolved.rstrip("/").rpartition("/")[2]) is not None
        holds_steps = any(map(STEP_NAME.match, folder.subfolders()))
        return LocatedModel(resolved, is_training_state=is_step or holds_steps)
    if kind != "local":
        return LocatedModel(resolved, is_training_state=False)
    return _locate_local(path, Path(resolved))


def _locate_local(path: str, folder: Path) -> LocatedModel:
    if (folder / "final" / CONFIG_FILE).is_file():
        return LocatedModel(str(folder / "final"), is_training_state=False)
    # Before models in general: a step holds a file of weights too.
    is_described = any((folder / name).is_file() for name in (CONFIG_FILE, PARAMS_FILE))
    if not is_described and (folder.name.startswith("step-") or any(folder.glob("step-*"))):
        return LocatedModel(str(folder), is_training_state=True)
    if PathResolver().is_model_path(folder):
        return LocatedModel(str(folder), is_training_state=False)
    if not folder.exists():
        raise CheckpointError(f"{path} does not exist", remedy=_REMEDY)
    if not folder.is_dir():
        raise CheckpointError(f"{path} is a file and no checkpoint", remedy=_REMEDY)
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8])
    raise CheckpointError(f"{path} is no checkpoint: it holds {found or 'nothing'}", remedy=_REMEDY)


def load_located(
    config: Config, recipe: Recipe, environment: Environment, located: LocatedModel, options: RunOptions
) -> tuple[MTPModel, HfTokenizer]:
    """Load the model with the first `model.mtp.horizon` heads it has, and its tokenizer.

    A training checkpoint is a model in itself; its tokenizer is the one of the recipe or of the recipe's
    base, and so are the frozen tensors of one that holds LoRA adapters.
    """
    trust = options.trust_remote_code
    if not located.is_training_state:
        path = prepare_builtin_model(located.path, config, dry_run=False, options=options)
        loaded = load_base(config, recipe, environment, path, keeps_heads=True, trust_remote_code=trust)
        return loaded.model, load_tokenizer(config, recipe, path, trust_remote_code=trust)
    base_path = prepare_builtin_model(
        require_model(config, recipe, "base").path, config, dry_run=False, options=options
    )
    tokenizer = load_tokenizer(config, recipe, base_path, trust_remote_code=trust)
    step = find_checkpoint(config, located.path)
    if not holds_adapters_only(step.state):
        loaded = load_base(
            config, recipe, environment, step.info.uri, keeps_heads=True, trust_remote_code=trust
        )
        return loaded.model, tokenizer
    loaded = load_base(config, recipe, environment, base_path, with_adapters=True, trust_remote_code=trust)
    check_same_base(loaded.model, step.state["base"])
    step.load_into({"model": checkpoint_tensors(loaded.model)})
    return loaded.model, tokenizer
