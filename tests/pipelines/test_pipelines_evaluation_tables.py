"""Tables of a report from evaluators' metrics, whatever the evaluator is."""

from __future__ import annotations

from wmtp.components.evaluator import EvaluationResult
from wmtp.pipelines.report_details import result_tables


def test_metrics_per_head_become_columns_and_few_others_the_caption() -> None:
    metrics = {"val/loss": 2.5, "val/ce_head_0": 1.0, "perplexity_head_0": 2.718, "val/ce_head_1": 3.0}
    (table,) = result_tables([EvaluationResult(type="perplexity", metrics=metrics)])
    assert table.title == "Perplexity per head"
    assert table.header == ["", "Cross entropy", "Perplexity"]
    assert table.rows == [["Head 1", "1", "2.718"], ["Head 2", "3", ""]]
    assert table.caption.endswith("Over all heads: loss 2.5.")
    assert set(table.metrics) == set(metrics)


def test_an_evaluator_with_many_numbers_gets_a_table_of_them_and_one_per_head() -> None:
    metrics = {
        "speculation_tokens_per_forward": 3.2,
        "speculation_speedup": 2.5,
        "speculation_seconds": 10.0,
        "speculation_acceptance_head_1": 0.9,
        "speculation_acceptance_head_2": 0.8,
    }
    totals, heads = result_tables([EvaluationResult(type="self-speculation", metrics=metrics)])
    assert (totals.title, heads.title) == ("Self-speculation", "Self-speculation: per head")
    assert ["Speculation tokens per forward", "3.2"] in totals.rows
    assert heads.rows == [["Head 2", "90%"], ["Head 3", "80%"]]


def test_shares_have_their_intervals_and_pass_at_k_has_its_own_place() -> None:
    metrics = {"a_exact_match": 0.5, "a_exact_match_ci_low": 0.25, "a_exact_match_ci_high": 0.75}
    results = [EvaluationResult(type="meta-mtp", metrics={"x_pass_at_1": 1.0})]
    (table,) = result_tables([*results, EvaluationResult(type="exact-match", metrics=metrics)])
    assert table.rows == [["A exact match", "50%", "25% to 75%"]]
    (unknown,) = result_tables([EvaluationResult(type="third-party", metrics={"speed": 3.0})])
    assert (unknown.title, unknown.rows) == ("third-party", [["Speed", "3"]])
