"""`wmtp validate`: what a run would use, checked on a CPU, with nothing trained and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from wmtp.components.data.formats import Split
from wmtp.components.loader import MICRO_BASE, MICRO_LLAMA, MICRO_REFERENCE
from wmtp.components.loader.sources import open_source
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.tokenizer.pairs import compare_tokenizers
from wmtp.exceptions import UserInputError, WmtpError
from wmtp.execution import check_sandbox
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel, ValueHead, trainable_parameters
from wmtp.pipelines.benchmarks import evaluation_tasks
from wmtp.pipelines.memory import Helpers, estimate_memory
from wmtp.pipelines.meta_models import (
    ModelDescription,
    build_base,
    build_reference,
    build_reward_model,
    describe_causal_lm,
    describe_reward_model,
)
from wmtp.pipelines.models import load_own_tokenizer, load_tokenizer
from wmtp.pipelines.outputs import RunOptions
from wmtp.pipelines.rewards import load_reward_tokenizer, needs_reward_model
from wmtp.settings import (
    Config,
    ModelChoice,
    ModelRole,
    Recipe,
    find_dataset,
    find_model,
    require_available,
)
from wmtp.settings.resolution import explain_missing_model

_NUM_SAMPLE_ROWS = 8
_TITLES: dict[ModelRole, str] = {"base": "base model", "ref": "reference model", "rm": "reward model"}
# The trained built-in models have the shape and the tokenizer of the untrained one.
_SHAPE_OF = {MICRO_BASE: MICRO_LLAMA, MICRO_REFERENCE: MICRO_LLAMA}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the validation: what was looked at, and what was found."""

    subject: str
    detail: str
    is_ok: bool = True


@dataclass(frozen=True, slots=True)
class _Described:
    """The model of a role, or what is wrong with it; neither where the role is not filled."""

    choice: ModelChoice | None = None
    model: ModelDescription | None = None
    problem: WmtpError | None = None


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

    described = {role: _describe_model(config, recipe, role, options) for role in _TITLES}
    for role in _TITLES:
        look(lambda role=role: _check_model(described[role], role, recipe))  # type: ignore[misc]
    there = {role for role in _TITLES if _is_there(config, described[role])}
    look(lambda: _check_tokenizers(config, recipe, there, options))
    for source in dict.fromkeys((*recipe.data.train.sources, *recipe.data.eval.sources)):
        look(lambda source=source: _check_dataset(config, recipe, source, "train"))  # type: ignore[misc]
    look(lambda: _check_benchmarks(config, recipe))
    base, reference, reward = (described[role] for role in _TITLES)
    look(lambda: _check_lengths(base, reference, recipe))
    look(lambda: _check_shapes(config, recipe, base, reference, reward))
    findings.extend(_check_sandbox(recipe))
    if problems:
        listed = "\n".join(f"{number}. {problem}" for number, problem in enumerate(problems, 1))
        raise UserInputError(f"{len(problems)} problem(s) found:\n{listed}")
    return findings


def _describe_model(config: Config, recipe: Recipe, role: ModelRole, options: RunOptions) -> _Described:
    """Read the description of the model of a role; what is wrong with it is kept for the report."""
    choice = find_model(config, recipe, role)
    if choice is None:
        return _Described()
    describe = describe_reward_model if role == "rm" else describe_causal_lm
    try:
        return _Described(choice, describe(config, choice.path, trust_remote_code=options.trust_remote_code))
    except WmtpError as error:
        return _Described(choice, problem=error)


def _check_model(described: _Described, role: ModelRole, recipe: Recipe) -> list[Finding]:
    """Which model fills a role, by which key, and what it is."""
    choice, title = described.choice, _TITLES[role]
    if choice is None:
        if _is_used(role, recipe):
            rule, remedy = explain_missing_model(role)
            raise UserInputError(f"paths.models.{role} {rule}", remedy=remedy)
        return []
    where = f"{choice.path} (from {choice.key})"
    if described.problem is not None:
        if _is_used(role, recipe):
            raise UserInputError(
                f"{title} {where}: {described.problem.message}", remedy=described.problem.remedy
            )
        about = f"not used by this recipe, and cannot be described: {described.problem}"
        return [Finding(title, where), Finding(f"{title} kind", about, is_ok=False)]
    assert described.model is not None
    unused = "" if _is_used(role, recipe) else "not used by this recipe; "
    return [Finding(title, where), Finding(f"{title} kind", unused + described.model.describe())]


def _is_used(role: ModelRole, recipe: Recipe) -> bool:
    if role == "ref":
        return recipe.train.algo == "rho1-wmtp" and recipe.rho1.reference == "online"
    if role == "rm":
        return recipe.train.algo == "critic-wmtp" and recipe.critic.reward.source == "reward_model"
    return True


def _check_lengths(base: _Described, reference: _Described, recipe: Recipe) -> list[Finding]:
    """Rows fit into the models' contexts, and vocabularies are told apart.

    A row holds its targets too, so the offsets of the heads need no positions beyond it.
    """
    length = recipe.data.train.max_length
    used = [(base, "base")] + ([(reference, "ref")] if _is_used("ref", recipe) else [])
    findings, problems = [], []
    for described, role in used:
        if described.model is None:
            continue
        limit = described.model.context_length
        title = _TITLES[role]  # type: ignore[index]  # keys of that table
        if limit is not None and length > limit:
            problems.append(f"the {title} was made for {limit}")
        findings.append(Finding(f"{title} context", f"{limit or 'any number of'} tokens, rows have {length}"))
    if problems:
        raise UserInputError(
            f"data.train.max_length is {length} tokens, but {' and '.join(problems)}",
            remedy="lower data.train.max_length, or use models with a longer context",
        )
    if base.model is not None and reference.model is not None and _is_used("ref", recipe):
        ours, theirs = base.model.vocab_size, reference.model.vocab_size
        same = "as many as the base" if ours == theirs else f"the base has {ours:,}"
        findings.append(Finding("reference vocabulary", f"{theirs:,}, {same}"))
    return findings


def _check_shapes(
    config: Config, recipe: Recipe, base: _Described, reference: _Described, reward: _Described
) -> list[Finding]:
    """Heads, parameters and memory, of models on the meta device."""
    if base.model is None:
        return []
    model, warned = build_base(base.model, recipe)
    asked, found = recipe.model.mtp.horizon, len(base.model.heads.offsets)
    heads = f"{model.horizon} of the form {model.head_form}, offsets {list(model.offsets)}"
    heads += f"; the checkpoint has {found}, model.mtp.horizon asks for {asked}"
    learned = trainable_parameters(model)
    names = frozenset() if model.lora is None else model.lora.parameter_names
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)
    with_adapters = f", and {adapters:,} in adapters" if adapters else ""
    findings = [
        Finding("heads", heads),
        *(Finding("heads", message, is_ok=False) for message in warned),
        Finding(
            "parameters", f"{model.num_parameters - adapters:,} with {_heads(model.horizon)}{with_adapters}"
        ),
        Finding(
            "trained",
            f"{learned:,} parameters, {model.num_parameters - learned:,} frozen "
            f"(model.trainable: {recipe.model.trainable}{', LoRA' if adapters else ''})",
        ),
    ]
    helpers, about_helpers = _build_helpers(recipe, model, reference, reward)
    findings += about_helpers
    needs_reference = _is_used("ref", recipe) and reference.model is None
    needs_reward = _is_used("rm", recipe) and reward.model is None
    if needs_reference or needs_reward:
        return findings
    estimate = estimate_memory(config, recipe, model, helpers)
    return [*findings, Finding("memory estimate", estimate.describe())]


def _build_helpers(
    recipe: Recipe, model: MTPModel, reference: _Described, reward: _Described
) -> tuple[Helpers, list[Finding]]:
    findings, parts = [], Helpers()
    if reference.model is not None and _is_used("ref", recipe):
        parts = replace(parts, reference=build_reference(reference.model))
        findings.append(Finding("reference parameters", f"{_count(parts.reference):,} frozen"))
    if reward.model is not None:
        reward_model = build_reward_model(reward.model)
        findings.append(Finding("reward model parameters", f"{_count(reward_model):,} frozen"))
        if _is_used("rm", recipe):
            parts = replace(parts, reward_model=reward_model)
    if recipe.train.algo == "critic-wmtp":
        parts = replace(parts, value_head=ValueHead.from_model(model, form=recipe.critic.head.form))
        findings.append(Finding("value head parameters", f"{_count(parts.value_head):,}"))
    return parts, findings


def _heads(number: int) -> str:
    return "1 head" if number == 1 else f"{number} heads"


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def _is_there(config: Config, described: _Described) -> bool:
    """Whether the files of a model can be had; where not, that is the problem, and not its tokenizer."""
    if described.choice is None or described.problem is None:
        return described.choice is not None
    try:
        open_source(config, described.choice.path)
    except WmtpError:
        return False
    return True


def _check_tokenizers(
    config: Config, recipe: Recipe, there: set[ModelRole], options: RunOptions
) -> list[Finding]:
    base = None
    if "base" in there or recipe.model.tokenizer.path is not None:
        base = _tokenizer_of(config, recipe, "base", options)
    if base is None:
        return []
    findings = [Finding("tokenizer", f"{len(base.tokenizer)} tokens")]
    if recipe.train.algo == "rho1-wmtp" and "ref" in there:
        reference = _tokenizer_of(config, recipe, "ref", options)
        if reference is not None:
            pair = compare_tokenizers(base, reference)
            findings.append(Finding("reference tokenizer", pair.describe()))
    choice = find_model(config, recipe, "rm")
    if needs_reward_model(recipe) and choice is not None and "rm" in there:
        rewarding = load_reward_tokenizer(
            config, recipe, choice.path, trust_remote_code=options.trust_remote_code
        )
        findings.append(Finding("reward tokenizer", compare_tokenizers(base, rewarding).describe()))
    return findings


def _tokenizer_of(config: Config, recipe: Recipe, role: ModelRole, options: RunOptions) -> HfTokenizer | None:
    choice = find_model(config, recipe, role)
    if choice is None:
        return None
    trust = options.trust_remote_code
    path = _SHAPE_OF.get(choice.path, choice.path)
    if role == "base":
        return load_tokenizer(config, recipe, path, trust_remote_code=trust)
    return load_own_tokenizer(config, recipe, path, trust_remote_code=trust)


def _check_dataset(config: Config, recipe: Recipe, source: str, split: Split) -> list[Finding]:
    loader = ComponentFactory.create_data_loader(recipe, config)
    path = find_dataset(config, source)
    rows = loader.load(path, split=split, limit=_NUM_SAMPLE_ROWS)
    kinds = "with tests" if rows[0].task is not None else "without tests"
    where = "" if path == source else f"{path}: "
    return [Finding(f"dataset {source} ({split})", f"{where}rows can be read, {kinds}")]


def _check_benchmarks(config: Config, recipe: Recipe) -> list[Finding]:
    """Read the first problems of every dataset, and check that they serve what is to be measured."""
    few = recipe.model_copy(
        update={"eval": recipe.eval.model_copy(update={"max_problems": _NUM_SAMPLE_ROWS})}
    )
    found = evaluation_tasks(config, few)
    findings = []
    for source, tasks in zip(recipe.eval.datasets, found.values(), strict=True):
        path = find_dataset(config, source)
        kinds = "with tests" if any(task.has_tests for task in tasks) else "without tests"
        where = "" if path == source else f"{path}: "
        findings.append(Finding(f"dataset {source} (test)", f"{where}rows can be read, {kinds}"))
    return findings


def _check_sandbox(recipe: Recipe) -> list[Finding]:
    is_critic, source = recipe.train.algo == "critic-wmtp", recipe.critic.reward.source
    needs_execution = bool(recipe.eval.datasets) or (is_critic and source == "execution")
    if not needs_execution:
        return []
    status = check_sandbox()
    if status.available:
        return [Finding("sandbox", f"programs run in {status.kind}")]
    return [Finding("sandbox", f"none works: {status.reason}; {status.remedy}", is_ok=False)]
