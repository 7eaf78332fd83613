"""Which token's weight lands on which head, and what the selection does at its edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest_trainer import Built, make_recipe, tiny_features

from wmtp.exceptions import UserInputError


def _naive_excess(built: Built, batch: dict[str, Any]) -> torch.Tensor:
    """CE_current - CE_reference of each token, by the plain logits of both models, in float64."""
    model, scorer = built.context.model, built.context.scorer
    losses = []
    for causal_lm in (model.causal_lm, scorer._reference.causal_lm):
        logits_BSV = causal_lm(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.double()
        log_probs_BSV = F.log_softmax(logits_BSV, dim=-1)
        ce_BS = torch.zeros(batch["input_ids"].shape, dtype=torch.float64)
        for b in range(ce_BS.shape[0]):
            for t in range(1, ce_BS.shape[1]):
                ce_BS[b, t] = -log_probs_BSV[b, t - 1, batch["input_ids"][b, t]]
        losses.append(ce_BS)
    return (losses[0] - losses[1]).detach()


@pytest.mark.parametrize("scope", ["target", "position"])
def test_head_h_at_t_carries_the_excess_of_the_token_it_predicts(
    scope: str, build: Callable[..., Built]
) -> None:
    recipe = make_recipe(
        train={"algo": "rho1-wmtp"},
        loss={"weight_scope": scope},
        rho1={"mode": "tokenskip", "ratio": 0.5},
    )
    built = build(recipe)
    batch = built.context.data.batch(0)
    weights = built.trainer.compute_head_weights([batch])
    weight_BSH, labels_BSH = weights.weight_BSH[0], batch["labels"]
    excess_BS = _naive_excess(built, batch)
    # The units that are ranked: tokens that head 0 has to predict, or positions with any target.
    units = []
    for b in range(labels_BSH.shape[0]):
        for t in range(labels_BSH.shape[1] - 1):
            has_target = labels_BSH[b, t] != -100
            if has_target[0] if scope == "target" else has_target.any():
                units.append((float(excess_BS[b, t + 1]), b, t))
    count = round(0.5 * len(units))
    selected = {(b, t) for _, b, t in sorted(units, reverse=True)[:count]}
    for b in range(labels_BSH.shape[0]):
        for t in range(labels_BSH.shape[1]):
            for h in range(labels_BSH.shape[2]):
                if labels_BSH[b, t, h] == -100:
                    continue
                unit = (b, t + h) if scope == "target" else (b, t)
                expected = len(units) / count if unit in selected else 0.0
                assert float(weight_BSH[b, t, h]) == pytest.approx(expected, rel=1e-6), (b, t, h)


def test_the_reference_of_packed_documents_never_sees_its_neighbours(build: Callable[..., Built]) -> None:
    features = tiny_features(6)
    scores = []
    for pack in (False, True):
        recipe = make_recipe(
            train={"algo": "rho1-wmtp"},
            data={"train": {"batch_size": 6, "pack_sequences": pack, "max_length": 48, "shuffle": False}},
        )
        built = build(recipe, features=features)
        batch = built.context.data.batch(0)
        weights = built.trainer.compute_head_weights([batch])
        by_row = {}
        for row, names in enumerate(batch["row_ids"]):
            for document, name in enumerate(names):
                mask = batch["document_ids"][row] == document
                by_row[name] = weights.token_weight_BS[0][row][mask]
        scores.append(by_row)
    assert scores[0].keys() == scores[1].keys()
    for name, value in scores[0].items():
        torch.testing.assert_close(value, scores[1][name], rtol=1e-6, atol=1e-7, msg=name)


def test_weights_have_mean_one_over_the_step_and_are_logged(build: Callable[..., Built]) -> None:
    recipe = make_recipe(train={"algo": "rho1-wmtp"})
    built = build(recipe)
    batches = [built.context.data.batch(index) for index in range(2)]
    weights = built.trainer.compute_head_weights(batches)
    tokens = torch.cat(
        [
            w[:, 1:][b["labels"][:, :-1, 0] != -100]
            for w, b in zip(weights.token_weight_BS, batches, strict=True)
        ]
    )
    assert float(tokens.mean()) == pytest.approx(1.0, abs=1e-5)
    assert float(weights.metrics["train/weight_mean"]) == pytest.approx(1.0, abs=1e-5)
    assert 0 < float(weights.metrics["rho1/selected_ratio"]) <= 0.2
    assert float(weights.metrics["train/weight_max"]) <= 3.0 + 1e-6


def test_head_decay_weighs_heads_outside_mean_and_clip(build: Callable[..., Built]) -> None:
    recipe = make_recipe(train={"algo": "mtp-weighted-ce", "scorer": "head_decay"})
    built = build(recipe)
    batch = built.context.data.batch(0)
    weight_BSH = built.trainer.compute_head_weights([batch]).weight_BSH[0]
    has_target = batch["labels"] != -100
    for head in range(3):
        own = weight_BSH[..., head][has_target[..., head]]
        torch.testing.assert_close(own, torch.full_like(own, 0.6**head))


def test_column_weights_are_rescaled_to_mean_one_and_not_clipped(build: Callable[..., Built]) -> None:
    features = [{**feature, "weights": [1.0] * len(feature["input_ids"])} for feature in tiny_features(4)]
    features[0]["weights"] = [100.0] * len(features[0]["input_ids"])
    recipe = make_recipe(
        train={"algo": "mtp-weighted-ce", "scorer": "column"}, data={"train": {"shuffle": False}}
    )
    built = build(recipe, features=features)
    batch = built.context.data.batch(0)
    weights = built.trainer.compute_head_weights([batch])
    valid = batch["labels"][:, :-1, 0] != -100
    token = weights.token_weight_BS[0][:, 1:]
    assert float(token[valid].mean()) == pytest.approx(1.0, rel=1e-6)
    assert float(token[0][valid[0]].min() / token[1][valid[1]].max()) == pytest.approx(100.0, rel=1e-5)


def test_column_scorer_without_a_column_names_the_remedy(build: Callable[..., Built]) -> None:
    built = build(make_recipe(train={"algo": "mtp-weighted-ce", "scorer": "column"}))
    with pytest.raises(UserInputError, match="no weights"):
        built.trainer.compute_head_weights([built.context.data.batch(0)])
