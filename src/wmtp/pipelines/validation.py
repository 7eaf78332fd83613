"""`wmtp validate`: what a run would use, checked on a CPU, with nothing trained and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wmtp.components.data.formats import Split
from wmtp.components.loader import MICRO_BASE, MICRO_LLAMA, MICRO_REFERENCE
from wmtp.components.tokenizer import HfTokenizer
from wmtp.exceptions import UserInputError, WmtpError
from wmtp.execution import check_sandbox
from wmtp.factory import ComponentFactory
from wmtp.pipelines.memory import estimate_memory
from wmtp.pipelines.models import load_tokenizer, same_vocabulary
from wmtp.pipelines.outputs import RunOptions
from wmtp.settings import Config, ModelRole, Recipe, find_dataset, find_model, require_available

_NUM_SAMPLE_ROWS = 8
_ROLES: tuple[tuple[ModelRole, str], ...] = (
    ("base", "base model"),
    ("ref", "reference model"),
    ("rm", "reward model"),
)
# The trained built-in models have the shape and the tokenizer of the untrained one.
_SHAPE_OF = {MICRO_BASE: MICRO_LLAMA, MICRO_REFERENCE: MICRO_LLAMA}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the validation: what was looked at, and what was found."""

    subject: str
    detail: str
    is_ok: bool = True


def validate_settings(config: Config, recipe: Recipe, options: RunOptions) -> list[Finding]:
    """Check models, tokenizers, data, memory and sandbox, and report all problems at once.

    Raises:
        UserInputError: something cannot be used; the message lists everything that cannot.
    """
    require_available(config)
    require_available(recipe)
    findings: list[Finding] = []
    problems: list[WmtpError] = []

    def look(check: Callable[[], list[Finding]]) -> None:
        try:
            findings.extend(check())
        except WmtpError as error:
            problems.append(error)

    look(lambda: _check_models(config, recipe))
    look(lambda: _check_tokenizers(config, recipe, options))
    for source in dict.fromkeys((*recipe.data.train.sources, *recipe.data.eval.sources)):
        look(lambda source=source: _check_dataset(config, recipe, source, "train"))  # type: ignore[misc]
    for source in recipe.eval.datasets:
        look(lambda source=source: _check_dataset(config, recipe, source, "test"))  # type: ignore[misc]
    look(lambda: _check_memory(config, recipe, options))
    findings.extend(_check_sandbox(recipe))
    if problems:
        listed = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1))
        raise UserInputError(f"{len(problems)} problem(s) found:\n{listed}")
    return findings


def _check_models(config: Config, recipe: Recipe) -> list[Finding]:
    findings = []
    for role, title in _ROLES:
        choice = find_model(config, recipe, role)
        if choice is not None:
            findings.append(Finding(title, f"{choice.path} (from {choice.key})"))
    return findings


def _check_tokenizers(config: Config, recipe: Recipe, options: RunOptions) -> list[Finding]:
    base = _tokenizer_of(config, recipe, "base", options)
    if base is None:
        return []
    findings = [Finding("tokenizer", f"{len(base.tokenizer)} tokens")]
    if recipe.train.algo == "rho1-wmtp":
        reference = _tokenizer_of(config, recipe, "ref", options)
        if reference is not None:
            same_vocabulary(base, reference)
            findings.append(Finding("reference tokenizer", "the same as the base's"))
    return findings


def _tokenizer_of(config: Config, recipe: Recipe, role: ModelRole, options: RunOptions) -> HfTokenizer | None:
    choice = find_model(config, recipe, role)
    if choice is None:
        return None
    trust = options.trust_remote_code
    path = _SHAPE_OF.get(choice.path, choice.path)
    if role == "base":
        return load_tokenizer(config, recipe, path, trust_remote_code=trust)
    return ComponentFactory.create_tokenizer(recipe, config, path=path, trust_remote_code=trust)


def _check_dataset(config: Config, recipe: Recipe, source: str, split: Split) -> list[Finding]:
    loader = ComponentFactory.create_data_loader(recipe, config)
    path = find_dataset(config, source)
    rows = loader.load(path, split=split, limit=_NUM_SAMPLE_ROWS)
    kinds = "with tests" if rows[0].task is not None else "without tests"
    return [Finding(f"dataset {source} ({split})", f"{path}: rows can be read, {kinds}")]


def _check_memory(config: Config, recipe: Recipe, options: RunOptions) -> list[Finding]:
    choice = find_model(config, recipe, "base")
    if choice is None:
        return []
    estimate = estimate_memory(config, recipe, _SHAPE_OF.get(choice.path, choice.path), options)
    return [
        Finding("parameters", f"{estimate.num_parameters:,} with {recipe.model.mtp.horizon} heads"),
        Finding("memory estimate", estimate.describe()),
    ]


def _check_sandbox(recipe: Recipe) -> list[Finding]:
    needs_execution = bool(recipe.eval.datasets) or recipe.train.algo == "critic-wmtp"
    if not needs_execution:
        return []
    status = check_sandbox()
    if status.available:
        return [Finding("sandbox", f"programs run in {status.kind}")]
    return [Finding("sandbox", f"none works: {status.reason}; {status.remedy}", is_ok=False)]
