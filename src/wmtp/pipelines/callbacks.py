"""What happens around the steps of a run, in order."""

from __future__ import annotations

from dataclasses import dataclass

from wmtp.components.evaluator import measure_validation
from wmtp.components.loader import LoadedCheckpoint
from wmtp.components.loader.step_stores import open_fallback_store
from wmtp.components.pretrainer import CriticQuality
from wmtp.components.scorer import CriticScorer, Scorer
from wmtp.components.trainer import TrainerContext
from wmtp.components.trainer.base import autocast_factory
from wmtp.components.trainer.callbacks import (
    SAVE_FILE_NAME,
    Callback,
    CheckpointCallback,
    CriticCallback,
    FiniteCallback,
    MetricsCallback,
    PhaseCallback,
    ProgressCallback,
    RequestCallback,
    StopSignals,
    ValidationCallback,
)
from wmtp.components.trainer.callbacks.metrics import measure_peak_flops
from wmtp.distributed.checkpoint import Retention
from wmtp.distributed.checkpoint_reading import CheckpointInfo
from wmtp.distributed.checkpoint_saver import CheckpointSaver
from wmtp.distributed.checkpoint_store import LATEST_NAME, StepStore
from wmtp.exceptions import StorageError
from wmtp.modeling import LateParameters, flops_per_token
from wmtp.pipelines.critic import Critic, critic_measurement
from wmtp.pipelines.data import PreparedData
from wmtp.pipelines.environment import Environment, RunPaths
from wmtp.pipelines.remote_output import RemoteOutput
from wmtp.pipelines.resume import describe_conditions
from wmtp.settings import Config, Recipe
from wmtp.storage import S3Manager
from wmtp.tracking import CompositeTracker, Tracker

_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True)
class RunCallbacks:
    """The callbacks of a run; those that are asked later by name."""

    all: list[Callback]
    metrics: MetricsCallback
    checkpoint: CheckpointCallback
    critic: CriticCallback | None

    @property
    def critic_quality(self) -> CriticQuality | None:
        """How good the value head was when it was last measured."""
        return None if self.critic is None else self.critic.latest

    def critic_metrics(self) -> dict[str, float]:
        """The last measurement of the critic as metrics."""
        return {} if self.critic is None else self.critic.latest_metrics()


def build_saver(
    config: Config, recipe: Recipe, paths: RunPaths, store: StepStore, resumed: LoadedCheckpoint | None
) -> CheckpointSaver:
    """What takes the checkpoints of a run."""
    train = recipe.train
    saver = CheckpointSaver(
        store,
        Retention(train.keep_last, train.keep_best, train.best_mode, train.permanent_every_steps),
        is_async=train.async_checkpoints,
        fallback=open_fallback_store(config, paths.run_uri),
        is_reachable=lambda: _is_reachable(config, store.uri(LATEST_NAME)),
    )
    saver.latest = None if resumed is None else resumed.checkpoint.info
    return saver


def _is_reachable(config: Config, uri: str) -> bool:
    """Whether S3, which was away, answers within seconds; training waits for it."""
    # A client of its own, which takes credentials anew where these come from the environment.
    manager = S3Manager(config.s3.model_copy(update={"deadline_s": _ANSWER_S}))
    try:
        manager.stat(uri)
    except StorageError:
        return False
    return True


def _record_checkpoint(tracker: CompositeTracker, info: CheckpointInfo) -> None:
    """Tell tracking of a committed checkpoint."""
    scores = {} if info.score is None else {"score": info.score}
    tracker.log_checkpoint(info.step, uri=info.uri, metrics=scores, manifest_sha256=info.manifest_sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSurroundings:
    """What a run has around it while it trains.

    Attributes:
        config: where it runs.
        recipe: what is run.
        environment: device and precision.
        paths: its folders.
        tracker: takes its metrics.
        remote: takes its files where its output is on S3.
        signals: that end it.
    """

    config: Config
    recipe: Recipe
    environment: Environment
    paths: RunPaths
    tracker: CompositeTracker
    remote: RemoteOutput
    signals: StopSignals


def build_callbacks(
    run: RunSurroundings,
    context: TrainerContext,
    data: PreparedData,
    *,
    critic: Critic | None,
    late: LateParameters | None,
    saver: CheckpointSaver,
) -> RunCallbacks:
    """All callbacks of a training run. The order matters: a bad step is noticed before it is saved.

    Args:
        run: what it has around it.
        context: model and optimizer.
        data: held-out batches, to measure on.
        critic: the value model of `critic-wmtp`; None for other algorithms.
        late: parameters that are trained later; None where all are trained from the start.
        saver: takes the checkpoints.
    """
    recipe, environment, paths, tracker = run.recipe, run.environment, run.paths, run.tracker
    train, model = recipe.train, context.model
    metrics = MetricsCallback(
        tracker,
        train.log_every_steps,
        flops_per_token=flops_per_token(model, recipe.data.train.max_length),
        peak_flops=measure_peak_flops(environment.device, environment.precision),
    )
    callbacks: list[Callback] = [
        FiniteCallback(train, paths.report, tracker),
        metrics,
        ProgressCallback(metrics, paths.name),
    ]
    if late is not None:
        callbacks.insert(0, PhaseCallback(late))
    critic_callback = _critic_callback(recipe, environment, tracker, data, critic, context)
    if critic_callback is not None:
        callbacks.append(critic_callback)
    validation: ValidationCallback | None = None
    if train.eval_every_steps is not None and data.validation:
        autocast = autocast_factory(environment.device, environment.precision)
        validation = ValidationCallback(
            lambda: measure_validation(model, data.validation_batches(), autocast=autocast),
            tracker,
            train.eval_every_steps,
        )
        callbacks.append(validation)
    checkpoint = CheckpointCallback(
        saver,
        every_steps=train.save_every_steps,
        run_state={"mlflow_run_id": tracker.run_id, **describe_conditions(run.config, recipe, environment)},
        score=lambda step: None if validation is None else validation.measured(step, train.best_metric),
        # First, so that no checkpoint is where the metrics of its steps are not.
        on_saving=lambda: run.remote.upload(paths.metrics_file),
        on_saved=lambda info: _record_checkpoint(tracker, info),
    )
    # With checkpoints on S3 a file cannot be touched beside them.
    local = paths.checkpoints if paths.remote is None else paths.report
    requests = RequestCallback(run.signals, local / SAVE_FILE_NAME)
    return RunCallbacks([*callbacks, requests, checkpoint], metrics, checkpoint, critic_callback)


def _critic_callback(
    recipe: Recipe,
    environment: Environment,
    tracker: Tracker,
    data: PreparedData,
    critic: Critic | None,
    context: TrainerContext,
) -> CriticCallback | None:
    scorer: Scorer | None = context.scorer
    if critic is None or not isinstance(scorer, CriticScorer):
        return None
    return CriticCallback(
        scorer,
        critic_measurement(critic, context.model, data, environment),
        tracker,
        every_steps=recipe.critic.recalibrate_every_steps,
        is_calibrated=recipe.critic.strength == "calibrated",
    )
