"""Evaluation of a model in memory, after training, or of a checkpoint by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp.components.evaluator import EvaluatorContext
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.trainer.base import autocast_factory
from wmtp.evaluation import Task
from wmtp.exceptions import SandboxUnavailableError, UserInputError
from wmtp.factory import ComponentFactory
from wmtp.modeling import MTPModel
from wmtp.pipelines.checkpoints import load_located, locate_model
from wmtp.pipelines.data import PreparedData, evaluation_tasks, prepare_validation
from wmtp.pipelines.environment import Environment, default_run_name, prepare_environment, run_paths
from wmtp.pipelines.models import check_vocabulary
from wmtp.pipelines.outputs import EvaluationOutputs, RunOptions
from wmtp.pipelines.remote_output import RemoteOutput
from wmtp.pipelines.report import report_evaluation, write_settings
from wmtp.pipelines.resume import refuse_existing_report
from wmtp.settings import Config, Recipe, redacted_dump, require_available
from wmtp.settings.recipe_eval import EvalType
from wmtp.storage import create_s3_manager
from wmtp.tracking import RunStatus, create_tracker, experiment_name, tracking_address

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
    """Evaluate a run folder, a `step-N` folder, an export or any model that can be loaded.

    Args:
        config: where it runs.
        recipe: its `eval` section says what is measured.
        checkpoint_path: what to evaluate.
        eval_types: instead of `eval.types`.
        dry_run: load everything, generate and run nothing, write nothing.
        options: what only the command line may say.

    Raises:
        UserInputError: settings, data or checkpoint that cannot be used; no sandbox works.
    """
    options = options or RunOptions()
    require_available(config)
    require_available(recipe)
    if eval_types is not None:
        recipe = recipe.model_copy(
            update={"eval": recipe.eval.model_copy(update={"types": list(eval_types)})}
        )
    # 1. What: the checkpoint, its tokenizer, the data of every measurement.
    environment = prepare_environment(config, recipe)
    located = locate_model(config, checkpoint_path)
    model, tokenizer = load_located(config, recipe, environment, located, options)
    check_vocabulary(tokenizer, model)
    data = prepare_validation(config, recipe, tokenizer, model.horizon)
    tasks = evaluation_tasks(config, recipe)
    parts = EvaluatedParts(model, tokenizer, data, tasks)
    if not tasks and "meta-mtp" in recipe.eval.types:
        raise UserInputError(
            "eval.datasets is empty", remedy="name benchmarks with --datasets or in eval.datasets"
        )
    if dry_run:
        return EvaluationOutputs({f"{name}_problems": float(len(rows)) for name, rows in tasks.items()})

    # 2. Tracking.
    name = options.run_name or f"eval-{default_run_name(recipe)}"
    paths = run_paths(config, name)
    refuse_existing_report(config, paths)
    tracker = create_tracker(
        paths.report,
        experiment=experiment_name(recipe.train.algo, recipe.eval.datasets),
        tracking_uri=tracking_address(config),
        run_name=name,
        registry_uri=config.mlflow.registry_uri,
        artifact_location=config.mlflow.artifact_location,
        tags={"checkpoint": checkpoint_path, **options.run_tags()},
        open_store=lambda: create_s3_manager(config),
    )
    status: RunStatus = "failed"
    try:
        # 3. Measure; here a missing sandbox is an error.
        tracker.log_params({**redacted_dump(config), **redacted_dump(recipe)})
        write_settings(config, recipe, paths)
        outputs = evaluate_model(config, recipe, environment, parts, paths.report, options, is_required=True)
        tracker.log_metrics(outputs.metrics, 0)
        # 4. Report.
        report_evaluation(config, recipe, paths, checkpoint_path, outputs)
        tracker.log_artifact(paths.report)
        status = "finished"
    finally:
        tracker.finish(status)
        RemoteOutput(config, paths).try_upload(paths.report)
    return outputs


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
) -> EvaluationOutputs:
    """Measure everything in `eval.types` on a model in memory.

    Where no sandbox works, pass@k is skipped with reason and remedy, unless `is_required`.
    """
    folder = report_folder / "evaluation"
    results, skipped, metrics = [], [], {}
    for evaluation_type in recipe.eval.types:
        if evaluation_type == "meta-mtp" and not parts.tasks:
            continue
        if evaluation_type != "meta-mtp" and not parts.data.validation:
            skipped.append(f"{evaluation_type}: not run: there is no held-out data (set data.eval.sources)")
            continue
        context = EvaluatorContext(
            model=parts.model,
            tokenizer=parts.tokenizer,
            tasks=parts.tasks,
            batches=parts.data.validation_batches(),
            output_dir=folder,
            unsafe_execution=options.unsafe_execution,
            autocast=autocast_factory(environment.device, environment.precision),
        )
        evaluator = ComponentFactory.create_evaluator(recipe, config, type=evaluation_type)
        try:
            result = evaluator.run(context)
        except SandboxUnavailableError as error:
            if is_required:
                raise
            message = f"pass@k: not run: {error.message}; {error.remedy}"
            logger.warning(message)
            skipped.append(message)
            continue
        results.append(result)
        metrics.update(result.metrics)
    return EvaluationOutputs(metrics, results, skipped, folder)
