"""Training, from settings to report: the main job of this project."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from torch import nn

from wmtp.components.loader.step_stores import open_run_store
from wmtp.components.optimizer import OptimizerContext
from wmtp.components.scorer import ScorerSetup
from wmtp.components.tokenizer import HfTokenizer
from wmtp.components.tokenizer.pairs import TokenizerPair
from wmtp.components.trainer import TrainerContext
from wmtp.components.trainer.callbacks import RunStopped, StopSignals
from wmtp.components.trainer.callbacks.checkpointing import restore_training_state
from wmtp.evaluation import Task
from wmtp.exceptions import TrainingInterruptedError
from wmtp.factory import ComponentFactory
from wmtp.modeling import LateParameters, MTPModel, choose_trainable
from wmtp.pipelines.benchmarks import evaluation_tasks
from wmtp.pipelines.builtin_models import prepare_builtin_model
from wmtp.pipelines.callbacks import RunSurroundings, build_callbacks, build_saver
from wmtp.pipelines.critic import (
    Critic,
    local_value_head,
    prepare_critic,
    register_value_head,
    untrained_critic,
)
from wmtp.pipelines.data import PreparedData, prepare_data
from wmtp.pipelines.dry_run import measure_longest_batch
from wmtp.pipelines.environment import (
    Environment,
    default_run_name,
    prepare_environment,
    seed_everything,
)
from wmtp.pipelines.evaluation import evaluate_model
from wmtp.pipelines.export import export_model, export_state, record_results
from wmtp.pipelines.export_source import RUN_TOKENIZER
from wmtp.pipelines.interruption import RunStage
from wmtp.pipelines.models import check_vocabulary, load_base, load_reference, load_tokenizer
from wmtp.pipelines.outputs import RunOptions, RunOutputs
from wmtp.pipelines.remote_output import RemoteOutput, copy_folder
from wmtp.pipelines.report import report_training, write_settings
from wmtp.pipelines.resume import RunStart, find_start, recheck_start
from wmtp.pipelines.rewards import load_program_scorer
from wmtp.settings import Config, Recipe, redacted_dump, require_available, require_model
from wmtp.storage import create_s3_manager
from wmtp.tracking import (
    CompositeTracker,
    RunStatus,
    create_tracker,
    experiment_name,
    tracking_address,
)

logger = logging.getLogger(__name__)


def run_training_pipeline(
    config: Config,
    recipe: Recipe,
    dry_run: bool = False,
    resume_checkpoint: str | None = None,
    *,
    options: RunOptions | None = None,
) -> RunOutputs:
    """Train, evaluate and report.

    Args:
        config: where it runs.
        recipe: what is run.
        dry_run: build everything, run one batch at the longest length, write nothing.
        resume_checkpoint: a run folder or one of its `step-N` folders to go on from.
        options: what only the command line may say.

    Raises:
        UserInputError: settings, data, models or checkpoints that cannot be used.
        TrainingDivergedError: loss or gradient became NaN or infinite.
        TrainingInterruptedError: a signal ended the run; its state is saved.
    """
    options = options or RunOptions()
    require_available(config)
    require_available(recipe)
    if dry_run:
        return _dry_run(config, recipe, options)
    stage = RunStage()
    with stage.explained(), StopSignals() as signals:
        return _train(config, recipe, resume_checkpoint, options, signals, stage)


def _train(
    config: Config,
    recipe: Recipe,
    resume_checkpoint: str | None,
    options: RunOptions,
    signals: StopSignals,
    stage: RunStage,
) -> RunOutputs:
    # 1. Where: device, seeds, the checkpoint to go on from, folders.
    began = time.perf_counter()
    environment = prepare_environment(config, recipe)
    start = find_start(config, recipe, environment, resume_checkpoint, options.run_name)
    paths = start.paths
    if start.checkpoint is not None:
        stage.resumed(start.checkpoint.uri, start.checkpoint.run_uri)

    # 2. What: base model, tokenizer, data, reference model.
    parts = _build_parts(config, recipe, environment, options, dry_run=False)

    # 3. The run's folder is this process's alone; tracking, from here on everything is recorded.
    store = open_run_store(config, paths.run_uri)
    remote = RemoteOutput(config, paths)
    with store.only_writer():
        start = recheck_start(config, recipe, environment, resume_checkpoint, start)
        checkpoint = start.checkpoint
        if checkpoint is not None:
            stage.resumed(checkpoint.uri, checkpoint.run_uri)
        if start.continued is not None:
            for path in (paths.metrics_file, paths.checkpoints / "critic"):
                remote.download(path, run_id=start.continued.mlflow_run_id)
        if start.origin is not None and recipe.train.algo == "critic-wmtp":
            copy_folder(config, f"{start.origin.run_uri}/critic", paths.checkpoints / "critic")
        tracker = _open_tracker(config, recipe, options, start)
        remote.mark(tracker.run_id)
        status: RunStatus = "failed"
        try:
            # 4. Stage 1 of the critic.
            seed_everything(recipe.train.seed)
            critic = _prepare_critic(config, recipe, environment, parts, options, start)
            remote.upload(paths.checkpoints / "critic")

            # 5. Optimizer, scorer, callbacks, trainer; the state of a resumed run.
            context = _build_trainer_context(config, recipe, environment, parts, critic)
            saver = build_saver(config, recipe, paths, store, start.continued)
            run = RunSurroundings(
                config=config,
                recipe=recipe,
                environment=environment,
                paths=paths,
                tracker=tracker,
                remote=remote,
                signals=signals,
            )
            callbacks = build_callbacks(run, context, parts.data, critic=critic, late=parts.late, saver=saver)
            described = export_state(config, recipe, parts, paths, is_new=start.is_new)
            callbacks.checkpoint.run_state["export"] = described
            remote.upload(paths.checkpoints / RUN_TOKENIZER)
            context.callbacks = callbacks.all
            seed_everything(recipe.train.seed)
            if checkpoint is not None:
                restore_training_state(context, checkpoint)
            trainer = ComponentFactory.create_trainer(recipe, config)
            trainer.setup(context)

            # 6. Train.
            with signals.deferred():
                result = trainer.run(context)
            if result.stop_reason is not None:
                status = "interrupted"
                raise TrainingInterruptedError(
                    f"{result.stop_reason} ended the run after step {result.step}; the state is in "
                    f"{callbacks.checkpoint.latest}",
                    remedy=f"go on with --resume {paths.run_uri}",
                )
            stage.trained(callbacks.checkpoint.latest or paths.run_uri, paths.run_uri)
            signals.check()
            train_seconds = time.perf_counter() - began

            # 7. The trained model as a plain Hugging Face checkpoint.
            metrics = {**callbacks.metrics.latest, **callbacks.critic_metrics()}
            export_model(config, recipe, parts, paths, metrics)
            if critic is not None:
                register_value_head(tracker, critic, paths)
            remote.upload(paths.export)

            # 8. Evaluate it.
            evaluation = evaluate_model(config, recipe, environment, parts, paths.report, options)
            tracker.log_metrics(evaluation.metrics, result.step)
            metrics.update(evaluation.metrics)
            record_results(paths, parts.model, metrics)
            remote.upload(paths.export)

            # 9. Report.
            timings = {"training": train_seconds, "evaluation": time.perf_counter() - began - train_seconds}
            report_run, report = report_training(
                config, recipe, paths, trainer, parts, evaluation, metrics, timings
            )
            tracker.log_artifact(paths.report)
            status = "finished"
        except RunStopped:
            status = "interrupted"
            raise
        finally:
            tracker.finish(status)
            remote.try_upload(paths.report)
    return RunOutputs(
        run_name=paths.name,
        metrics=metrics,
        step=result.step,
        checkpoint=callbacks.checkpoint.latest,
        export=paths.export,
        report=report,
        mlflow_run_id=tracker.run_id,
        critic=callbacks.critic_quality,
        report_run=report_run,
        evaluation=evaluation,
    )


@dataclass(slots=True)
class RunParts:
    """The loaded models and data of a run; evaluation tasks too, so that bad input shows before training."""

    model: MTPModel
    late: LateParameters | None
    tokenizer: HfTokenizer
    data: PreparedData
    tasks: dict[str, list[Task]]
    reference: MTPModel | None
    reference_tokens: TokenizerPair | None
    base_path: str


def _build_parts(
    config: Config, recipe: Recipe, environment: Environment, options: RunOptions, *, dry_run: bool
) -> RunParts:
    trust = options.trust_remote_code
    base_path = prepare_builtin_model(
        require_model(config, recipe, "base").path, config, dry_run=dry_run, options=options
    )
    loaded = load_base(config, recipe, environment, base_path, with_adapters=True, trust_remote_code=trust)
    late = choose_trainable(
        loaded.model, recipe.model.trainable, warmup_head_steps=recipe.model.warmup_head_steps
    )
    tokenizer = load_tokenizer(config, recipe, base_path, trust_remote_code=trust)
    check_vocabulary(tokenizer, loaded.model)
    reference, reference_tokens = None, None
    if recipe.train.algo == "rho1-wmtp":
        reference_path = prepare_builtin_model(
            require_model(config, recipe, "ref").path, config, dry_run=dry_run, options=options
        )
        reference, reference_tokens = load_reference(
            config, recipe, environment, reference_path, tokenizer, trust_remote_code=trust
        )
    data = prepare_data(config, recipe, tokenizer, loaded.metadata)
    if reference_tokens is not None:
        data.check_features(reference_tokens.require_shared)
    tasks = evaluation_tasks(config, recipe)
    return RunParts(loaded.model, late, tokenizer, data, tasks, reference, reference_tokens, base_path)


def _prepare_critic(
    config: Config,
    recipe: Recipe,
    environment: Environment,
    parts: RunParts,
    options: RunOptions,
    start: RunStart,
) -> Critic | None:
    if recipe.train.algo != "critic-wmtp":
        return None
    is_resumed = start.checkpoint is not None
    with local_value_head(config, None if is_resumed else recipe.critic.value_head) as value_head:
        return prepare_critic(
            recipe,
            environment,
            parts.model,
            parts.tokenizer,
            parts.data,
            folder=start.paths.checkpoints / "critic",
            value_head=value_head,
            load_scorer=lambda: load_program_scorer(
                config, recipe, environment, parts.tokenizer, trust_remote_code=options.trust_remote_code
            ),
            unsafe_execution=options.unsafe_execution,
            is_resumed=is_resumed,
        )


def _build_trainer_context(
    config: Config, recipe: Recipe, environment: Environment, parts: RunParts, critic: Critic | None
) -> TrainerContext:
    modules: dict[str, nn.Module] = {"model": parts.model}
    learning_rates = {}
    if critic is not None and recipe.critic.value_loss_coef > 0:
        modules["value_head"] = critic.value_head
        learning_rates["value_head"] = recipe.critic.pretrain.lr
    scorer = ComponentFactory.create_scorer(recipe)
    if scorer is not None:
        scorer.prepare(
            ScorerSetup(
                model=parts.model,
                reference=parts.reference,
                tokenizers=parts.reference_tokens,
                value_head=None if critic is None else critic.value_head,
                seed=recipe.train.seed,
            )
        )
    optimizer = ComponentFactory.create_optimizer(recipe, config).run(
        OptimizerContext(modules, recipe.train.max_steps, learning_rates, parts.late)
    )
    return TrainerContext(
        modules=modules,
        optimizer=optimizer,
        data=parts.data.training_data(),
        scorer=scorer,
        device=environment.device,
        precision=environment.precision,
    )


def _open_tracker(config: Config, recipe: Recipe, options: RunOptions, start: RunStart) -> CompositeTracker:
    mlflow, paths, continued = config.mlflow, start.paths, start.continued
    tags = options.run_tags()
    if start.origin is not None:
        tags["branch_of"] = start.origin.uri
    tracker = create_tracker(
        paths.report,
        experiment=experiment_name(recipe.train.algo, recipe.data.train.sources),
        tracking_uri=tracking_address(config),
        run_name=paths.name,
        run_id=None if continued is None else continued.mlflow_run_id,
        resume_step=None if continued is None else continued.step,
        registry_uri=mlflow.registry_uri,
        artifact_location=mlflow.artifact_location,
        tags=tags,
        open_store=lambda: create_s3_manager(config),
    )
    tracker.log_params({**redacted_dump(config), **redacted_dump(recipe)})
    # Now, and not with the report alone: a run that fails has no report.
    for file in write_settings(config, recipe, paths):
        tracker.log_artifact(file)
    return tracker


def _dry_run(config: Config, recipe: Recipe, options: RunOptions) -> RunOutputs:
    """Build everything, run one step at the longest length, write nothing."""
    environment = prepare_environment(config, recipe)
    parts = _build_parts(config, recipe, environment, options, dry_run=True)
    load_program_scorer(
        config, recipe, environment, parts.tokenizer, trust_remote_code=options.trust_remote_code
    )
    critic = untrained_critic(recipe, parts.model, environment)
    context = _build_trainer_context(config, recipe, environment, parts, critic)
    trainer = ComponentFactory.create_trainer(recipe, config)
    trainer.setup(context)
    facts = measure_longest_batch(trainer, context)
    return RunOutputs(run_name=options.run_name or default_run_name(recipe), metrics={}, dry_run=facts)
