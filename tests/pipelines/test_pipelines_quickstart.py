"""The quickstart as a user runs it: what it must reach, and that a blind critic does no harm. Minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wmtp.pipelines import QuickstartOutputs, RunOptions, run_quickstart, run_training_pipeline
from wmtp.pipelines.builtin_models import shipped_settings
from wmtp.settings import load_config, load_recipe
from wmtp.tracking import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def quickstart(output: Path) -> QuickstartOutputs:
    return run_quickstart(output)


def test_every_algorithm_solves_held_out_tasks_by_executed_programs(quickstart: QuickstartOutputs) -> None:
    for name, run in quickstart.runs.items():
        assert run.metrics["microcode_pass_at_1_ci_low"] > 0.2, name
        (result,) = [each for each in run.evaluation.results if each.type == "meta-mtp"]
        generations = result.datasets["microcode"].generations.read_text().splitlines()
        rows = [json.loads(line) for line in generations]
        assert len(rows) == 150
        assert {row["isolation"] for row in rows} == {"bubblewrap"}
        passed = sum(row["passed"] for row in rows) / len(rows)
        assert passed == pytest.approx(run.metrics["microcode_pass_at_1"])


def test_both_weighted_algorithms_beat_the_baseline_beyond_their_intervals(
    quickstart: QuickstartOutputs,
) -> None:
    baseline = quickstart.runs["baseline"].metrics["microcode_pass_at_1_ci_high"]
    for name in ("critic", "rho1"):
        assert quickstart.runs[name].metrics["microcode_pass_at_1_ci_low"] > baseline, name


def test_the_value_head_tells_right_from_wrong_programs(quickstart: QuickstartOutputs, output: Path) -> None:
    (history,) = (output / "reports").glob("quickstart-*-critic/metrics.jsonl")
    measured = [row["critic/auc"] for row in read_metrics(history) if "critic/auc" in row]
    assert len(measured) >= 3
    assert min(measured) > 0.8


def test_the_report_compares_the_three(quickstart: QuickstartOutputs) -> None:
    page = quickstart.report.read_text(encoding="utf-8")
    for name in ("baseline", "critic", "rho1"):
        assert name in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("form", ["transformer", "mlp"])
def test_a_blind_critic_trains_like_the_baseline(
    form: str, quickstart: QuickstartOutputs, output: Path
) -> None:
    # Random values: one step of stage 1 at a rate that leaves the head as it was initialised.
    config = load_config(shipped_settings("config.example.yaml"), overrides=[f"paths.output={output}"])
    recipe = load_recipe(
        shipped_settings("recipe.critic.yaml"),
        overrides=[
            f"critic.head.form={form}",
            "critic.pretrain.max_steps=1",
            "critic.pretrain.lr=1e-9",
            "critic.value_loss_coef=0",
        ],
    )
    blind = run_training_pipeline(config, recipe, options=RunOptions(run_name=f"blind-{form}"))
    baseline = quickstart.runs["baseline"]
    history = read_metrics(output / f"reports/blind-{form}/metrics.jsonl")
    strengths = [row["critic/strength"] for row in history if "critic/strength" in row]
    assert max(strengths) < 0.3
    losses = [row["train/ce_mean"] for row in history if "train/ce_mean" in row]
    reference = [row["train/ce_mean"] for row in baseline.report_run.history if "train/ce_mean" in row]
    assert losses == pytest.approx(reference, rel=0.05)
    difference = blind.metrics["microcode_pass_at_1"] - baseline.metrics["microcode_pass_at_1"]
    assert abs(difference) < 0.15
