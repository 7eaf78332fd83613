"""From what a run left to the data of its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from torch import Tensor

from wmtp.components.data import to_device
from wmtp.components.data.examples import Batch
from wmtp.components.evaluator import EvaluationResult
from wmtp.components.trainer import BaseWmtpTrainer
from wmtp.evaluation.records import Record, read_records
from wmtp.modeling import evaluating
from wmtp.objectives import IGNORE_INDEX, shift_labels, token_cross_entropy
from wmtp.pipelines.environment import RunPaths
from wmtp.pipelines.outputs import EvaluationOutputs
from wmtp.pipelines.report_details import benchmark_details, benchmark_scores, result_tables
from wmtp.reporting import ProgramSample, ReportRun, Score, TokenView, write_report
from wmtp.settings import Config, Recipe, redacted_dump
from wmtp.tracking import read_metrics

if TYPE_CHECKING:
    from wmtp.pipelines.training import RunParts

_NUM_VIEWS = 2
# Weights are relative to the batch they are normalised over, so the shown texts are weighed among others.
_NUM_VIEW_EXAMPLES = 32
_NUM_SAMPLES = 6


def report_training(
    config: Config,
    recipe: Recipe,
    paths: RunPaths,
    trainer: BaseWmtpTrainer,
    parts: RunParts,
    evaluation: EvaluationOutputs,
    metrics: dict[str, float],
    timings: dict[str, float],
) -> tuple[ReportRun, Path]:
    """Write the report of a training run to `reports/<run>/`."""
    run = ReportRun(
        name=paths.name,
        algo=recipe.train.algo,
        scores=_scores(evaluation.results),
        metrics=metrics,
        history=read_metrics(paths.metrics_file),
        token_views=token_views(trainer, parts),
        samples=_samples(evaluation.results),
        settings_yaml=_settings_yaml(config, recipe),
        timings=timings,
        notes=_notes(evaluation),
        benchmarks=benchmark_details(evaluation.results, paths.report),
        tables=result_tables(evaluation.results),
    )
    return run, write_report(paths.report, title=f"WMTP run {paths.name}", runs=[run]).html


def report_evaluation(
    config: Config, recipe: Recipe, paths: RunPaths, checkpoint: str, evaluation: EvaluationOutputs
) -> Path:
    """Write the report of an evaluation to `reports/<run>/`."""
    run = ReportRun(
        name=paths.name,
        algo=recipe.train.algo,
        scores=_scores(evaluation.results),
        metrics=evaluation.metrics,
        samples=_samples(evaluation.results),
        settings_yaml=_settings_yaml(config, recipe),
        notes=[f"Evaluated: {checkpoint}", *_notes(evaluation)],
        benchmarks=benchmark_details(evaluation.results, paths.report),
        tables=result_tables(evaluation.results),
    )
    return write_report(paths.report, title=f"WMTP evaluation {paths.name}", runs=[run]).html


def write_settings(config: Config, recipe: Recipe, paths: RunPaths) -> list[Path]:
    """Keep the settings in force beside the metrics, secrets hidden: `config.yaml` and `recipe.yaml`."""
    paths.report.mkdir(parents=True, exist_ok=True)
    files = []
    for name, settings in (("config", config), ("recipe", recipe)):
        text = yaml.safe_dump(redacted_dump(settings), sort_keys=False, allow_unicode=True)
        files.append(paths.report / f"{name}.yaml")
        files[-1].write_text(text, encoding="utf-8")
    return files


def token_views(trainer: BaseWmtpTrainer, parts: RunParts) -> list[TokenView]:
    """The longest of some training examples, with the weight the finished run gives each of their tokens.

    The examples are the same for all algorithms on the same data. None where all weights are uniform.
    """
    context = trainer.training_run.context
    features = parts.data.features[:_NUM_VIEW_EXAMPLES]
    batch = to_device(parts.data.collator(list(features)), context.device)
    with evaluating(context.model):
        output = trainer.training_run.train_step.forward(batch)
        weights = trainer.compute_head_weights([batch], [output])
        if weights is None:
            return []
        ce_BSH = _losses_by_token(trainer, batch, output.hidden_BSHD)
    lengths = batch["attention_mask"].sum(dim=1)
    is_target_BS = batch["token_labels"] != IGNORE_INDEX
    # Nothing predicts a document's first token.
    is_target_BS[:, 0] = False
    views = []
    for row in lengths.argsort(descending=True, stable=True)[:_NUM_VIEWS].tolist():
        end = int(lengths[row])
        row_weights = weights.token_weight_BS[0][row, :end].tolist()
        is_target = is_target_BS[row, :end].tolist()
        ids = batch["input_ids"][row, :end].tolist()
        views.append(
            TokenView(
                title=f"Training example {features[row].get('row_id', row)}",
                tokens=[str(parts.tokenizer.tokenizer.decode([token_id])) for token_id in ids],
                weights=[
                    weight if target else None for weight, target in zip(row_weights, is_target, strict=True)
                ],
                ce=[[None if value < 0 else value for value in token] for token in ce_BSH[row][:end]],
            )
        )
    return views


def _losses_by_token(trainer: BaseWmtpTrainer, batch: Batch, hidden_BSHD: Tensor) -> list[list[list[float]]]:
    """Cross entropy of each head on each token, [B][S][H] by token; -1 where a head has none."""
    model = trainer.training_run.context.model
    labels_BSH = shift_labels(
        batch["token_labels"], model.horizon, document_ids_BS=batch["document_ids"], offsets=model.offsets
    )
    by_token_BSH = labels_BSH.new_full(labels_BSH.shape, -1).float()
    for head, offset in enumerate(model.offsets):
        labels_BS = labels_BSH[:, :, head]
        ce_BS = token_cross_entropy(
            hidden_BSHD[:, :, head],
            model.unembedding_VD,
            labels_BS,
            logit_scale=model.logit_scale,
            logit_softcap=model.logit_softcap,
            bias_V=model.unembedding_bias_V,
        )
        known_BS = ce_BS.masked_fill(labels_BS == IGNORE_INDEX, -1.0)
        by_token_BSH[:, offset:, head] = known_BS[:, : known_BS.shape[1] - offset]
    losses: list[list[list[float]]] = by_token_BSH.tolist()
    return losses


def _scores(results: list[EvaluationResult]) -> list[Score]:
    """pass@k at the first temperature, the one that was chosen beforehand."""
    return [
        score
        for result in results
        for dataset in result.datasets.values()
        for score in benchmark_scores(dataset)[0].scores.values()
    ]


def _samples(results: list[EvaluationResult]) -> list[ProgramSample]:
    """Some generated programs, passed and not, of different tasks, as they were saved."""
    samples = []
    for result in results:
        for dataset in result.datasets.values():
            if dataset.generations is None:
                continue
            firsts: dict[bool, dict[str, Record]] = {True: {}, False: {}}
            for row in read_records(dataset.generations):
                firsts[row["passed"]].setdefault(row["task_id"], row)
            passed = [*firsts[True].values()][: _NUM_SAMPLES // 2]
            other = [*firsts[False].values()][: _NUM_SAMPLES - len(passed)]
            samples += [
                ProgramSample(
                    prompt=row["prompt"],
                    completion=row["completion"],
                    status=row["status"],
                    title=row["task_id"],
                    detail=row["message"],
                )
                for row in passed + other
            ]
    return samples


def _notes(evaluation: EvaluationOutputs) -> list[str]:
    return [*evaluation.skipped, *(note for result in evaluation.results for note in result.notes)]


def _settings_yaml(config: Config, recipe: Recipe) -> str:
    return yaml.safe_dump(
        {**redacted_dump(config), **redacted_dump(recipe)}, sort_keys=False, allow_unicode=True
    )
