"""Evaluation of a model in memory, after training, or of a checkpoint by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.components.evaluator import EvaluatorContext
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.trainer.base import autocast_factory
from wmtp.evaluation import Task
from wmtp.exceptions import SandboxUnavailableError, TrainingInterruptedError, UserInputError
from wmtp.execution import check_sandbox
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel
from wmtp.pipelines.benchmarks import DATA_TYPES, TASK_TYPES, evaluation_tasks
from wmtp.pipelines.checkpoints import load_located, locate_model
from wmtp.pipelines.data import PreparedData, prepare_validation
from wmtp.pipelines.environment import Environment, prepare_environment
from wmtp.pipelines.evaluation_session import (
    EvaluationSession,
    describe_evaluation,
    generation_fingerprint,
    open_session,
)
from wmtp.pipelines.migrate_state_dict import is_state_dict_file, load_located_state_dict
from wmtp.pipelines.models import check_vocabulary
from wmtp.pipelines.outputs import EvaluationOutputs, RunOptions
from wmtp.pipelines.remote_output import RemoteOutput
from wmtp.pipelines.report import report_evaluation, write_settings
from wmtp.settings import Config, Recipe, redacted_dump, require_available
from wmtp.settings.recipe_eval import EvalType
from wmtp.storage import create_s3_manager
from wmtp.tracking import (
    CompositeTracker,
    RunStatus,
    StageDisplay,
    create_tracker,
    experiment_name,
    tracking_address,
)

if TYPE_CHECKING:
    from wmtp.pipelines.training import RunParts

logger = logging.getLogger(__name__)


def run_evaluation_pipeline(
    config: Config,
    recipe: Recipe,
    checkpoint_path: str,
    eval_types: Sequence[EvalType] | None = None,
    dry_run: bool = False,
    *,
    options: RunOptions | None = None,
) -> EvaluationOutputs:
    """Evaluate a run folder, a step, an export, a `.pt` state dict, `runs:/<id>` or any model.

    An evaluation that was interrupted, by `kill -9` too, goes on where it was when it is started again.

    Args:
        config: where it runs.
        recipe: its `eval` section says what is measured.
        checkpoint_path: what to evaluate.
        eval_types: instead of `eval.types`.
        dry_run: load everything, generate and run nothing, write nothing.
        options: what only the command line may say.

    Raises:
        UserInputError: settings, data or checkpoint that cannot be used; no sandbox works.
        TrainingInterruptedError: Ctrl-C; what was done so far is kept.
    """
    options = options or RunOptions()
    require_available(config)
    if eval_types is not None:
        changed = recipe.eval.model_copy(update={"types": list(eval_types)})
        recipe = recipe.model_copy(update={"eval": changed})
    require_available(recipe)
    # 1. What: the checkpoint, its tokenizer, the data of every measurement; and whether programs can be run.
    environment = prepare_environment(config, recipe)
    parts = _load_parts(config, recipe, environment, checkpoint_path, options)
    _require_sandbox(recipe, options)
    if dry_run:
        return EvaluationOutputs({}, dry_run=_describe_work(recipe, parts))

    # 2. The folder, this process's alone; an interrupted evaluation of the same goes on in its own.
    identity = describe_evaluation(config, recipe, environment, parts.model, parts.tokenizer)
    with open_session(config, recipe, options.run_name, identity) as session:
        # 3. Tracking.
        paths = session.paths
        tracker = _open_tracker(config, recipe, session, checkpoint_path, options)
        session.begin(checkpoint_path, tracker.run_id)
        status: RunStatus = "failed"
        try:
            # 4. Measure; here whatever cannot be measured is an error.
            tracker.log_params({**redacted_dump(config), **redacted_dump(recipe)})
            write_settings(config, recipe, paths)
            outputs = evaluate_model(
                config,
                recipe,
                environment,
                parts,
                paths.report,
                options,
                is_required=True,
                fingerprint=identity.fingerprint,
            )
            tracker.log_metrics(outputs.metrics, 0)
            # 5. Report.
            report = report_evaluation(config, recipe, paths, checkpoint_path, outputs)
            session.finish()
            tracker.log_artifact(paths.report)
            status = "finished"
        except KeyboardInterrupt as error:
            status = "interrupted"
            raise TrainingInterruptedError(
                f"the evaluation was interrupted; what was done so far is in {paths.report}",
                remedy=f"go on with the same command and --run-name {paths.name}",
            ) from error
        finally:
            tracker.finish(status)
            RemoteOutput(config, paths).try_upload(paths.report)
    return replace(outputs, run_name=paths.name, report=report)


@dataclass(frozen=True, slots=True)
class EvaluatedParts:
    """What an evaluation reads: a model, its tokenizer, held-out data and tasks."""

    model: MTPModel
    tokenizer: HfTokenizer
    data: PreparedData
    tasks: dict[str, list[Task]]


def evaluate_model(
    config: Config,
    recipe: Recipe,
    environment: Environment,
    parts: EvaluatedParts | RunParts,
    report_folder: Path,
    options: RunOptions,
    *,
    is_required: bool = False,
    fingerprint: str = "",
) -> EvaluationOutputs:
    """Measure everything in `eval.types` on a model in memory.

    What cannot be measured (no sandbox, no data, nothing to ask) is skipped with reason and remedy, unless
    `is_required`. Generations and verdicts are recorded under `report_folder`, with the fingerprint of the
    model, which is made here where it is not given; those recorded there by an interrupted evaluation of the
    same model are used.
    """
    folder = report_folder / "evaluation"
    needs_tasks = bool(parts.tasks) and not TASK_TYPES.isdisjoint(recipe.eval.types)
    if needs_tasks and not fingerprint:
        fingerprint = generation_fingerprint(parts.model, parts.tokenizer, environment)
    results, skipped, metrics = [], [], {}
    with StageDisplay() as display:
        for evaluation_type in recipe.eval.types:
            if evaluation_type in TASK_TYPES and not parts.tasks and not is_required:
                continue
            context = EvaluatorContext(
                model=parts.model,
                tokenizer=parts.tokenizer,
                tasks=parts.tasks,
                batches=parts.data.validation_batches() if parts.data.validation else (),
                output_dir=folder,
                fingerprint=fingerprint,
                unsafe_execution=options.unsafe_execution,
                autocast=autocast_factory(environment.device, environment.precision),
                on_progress=display.update,
            )
            evaluator = ComponentFactory.create_evaluator(recipe, config, type=evaluation_type)
            try:
                _require_input(evaluation_type, parts)
                result = evaluator.run(context)
            except (SandboxUnavailableError, _NothingToMeasureError) as error:
                if is_required:
                    raise
                what = "pass@k" if isinstance(error, SandboxUnavailableError) else evaluation_type
                message = f"{what}: not run: {error.message}; {error.remedy}"
                logger.warning(message)
                skipped.append(message)
                continue
            results.append(result)
            metrics.update(result.metrics)
    return EvaluationOutputs(metrics, results, skipped, folder)


class _NothingToMeasureError(UserInputError):
    """A measurement without what it reads."""


def _require_input(evaluation_type: EvalType, parts: EvaluatedParts | RunParts) -> None:
    if evaluation_type in TASK_TYPES and not parts.tasks:
        raise _NothingToMeasureError(
            "eval.datasets is empty", remedy="name benchmarks with --datasets or in eval.datasets"
        )
    if evaluation_type in DATA_TYPES and not parts.data.validation:
        raise _NothingToMeasureError(
            "there is no held-out data", remedy="set data.eval.sources, or eval.datasets with completions"
        )


def _load_parts(
    config: Config, recipe: Recipe, environment: Environment, checkpoint_path: str, options: RunOptions
) -> EvaluatedParts:
    # Tasks first: a dataset that is not there is told before gigabytes are loaded.
    needs_tasks = not TASK_TYPES.isdisjoint(recipe.eval.types)
    tasks = evaluation_tasks(config, recipe) if needs_tasks else {}
    if is_state_dict_file(checkpoint_path):
        model, tokenizer = load_located_state_dict(config, recipe, environment, checkpoint_path, options)
    else:
        located = locate_model(config, checkpoint_path)
        model, tokenizer = load_located(config, recipe, environment, located, options)
    check_vocabulary(tokenizer, model)
    needs_data = not DATA_TYPES.isdisjoint(recipe.eval.types)
    data = prepare_validation(config, recipe, tokenizer, model.horizon, is_needed=needs_data)
    parts = EvaluatedParts(model, tokenizer, data, tasks)
    for evaluation_type in recipe.eval.types:
        _require_input(evaluation_type, parts)
    return parts


def _require_sandbox(recipe: Recipe, options: RunOptions) -> None:
    """Where programs are to be run and cannot be, say so before anything is written."""
    status = check_sandbox() if "meta-mtp" in recipe.eval.types else None
    if status is not None and not status.available and not options.unsafe_execution:
        raise SandboxUnavailableError(
            f"generated programs cannot be run: {status.reason}", remedy=status.remedy
        )


def _open_tracker(
    config: Config, recipe: Recipe, session: EvaluationSession, checkpoint_path: str, options: RunOptions
) -> CompositeTracker:
    return create_tracker(
        session.paths.report,
        experiment=experiment_name(recipe.train.algo, recipe.eval.datasets),
        tracking_uri=tracking_address(config),
        run_name=session.paths.name,
        run_id=session.mlflow_run_id,
        # Nothing that an interrupted evaluation had recorded is kept: it is measured again.
        resume_step=None if session.mlflow_run_id is None else -1,
        registry_uri=config.mlflow.registry_uri,
        artifact_location=config.mlflow.artifact_location,
        tags={"checkpoint": checkpoint_path, **options.run_tags()},
        open_store=lambda: create_s3_manager(config),
    )


def _describe_work(recipe: Recipe, parts: EvaluatedParts) -> dict[str, Any]:
    """What an evaluation would do, for a person to read."""
    facts: dict[str, Any] = {
        "types": ", ".join(recipe.eval.types),
        "heads": parts.model.horizon,
        "parameters": parts.model.num_parameters,
    }
    per_problem = sum(recipe.eval.num_samples if each > 0 else 1 for each in set(recipe.eval.temperatures))
    for name, tasks in parts.tasks.items():
        longest = max(len(parts.tokenizer.encode_prompt(task.prompt)) for task in tasks)
        facts[f"{name}: problems"] = len(tasks)
        facts[f"{name}: with tests"] = sum(task.has_tests for task in tasks)
        facts[f"{name}: programs"] = len(tasks) * per_problem
        facts[f"{name}: longest prompt (tokens)"] = longest
    if not DATA_TYPES.isdisjoint(recipe.eval.types):
        facts["held-out documents"] = len(parts.data.validation)
    facts["sandbox"] = check_sandbox().kind
    return facts
