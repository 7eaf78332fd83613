"""What must not change a trajectory: the split into micro-batches, packing, who computes the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest_trainer import Built, make_recipe, parameters, run, tiny_features, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from wmtp.objectives import IGNORE_INDEX

ALGORITHMS: dict[str, dict[str, dict[str, Any]]] = {
    "baseline": {"train": {"algo": "baseline-mtp"}},
    "rho1 weighted": {
        "train": {"algo": "rho1-wmtp"},
        "rho1": {"mode": "weighted", "percentile_top_p": 0.4},
    },
    "rho1 tokenskip": {"train": {"algo": "rho1-wmtp"}, "rho1": {"mode": "tokenskip"}},
    "rho1 frozen": {"train": {"algo": "rho1-wmtp"}, "rho1": {"current": "frozen"}},
    "critic value": {
        "train": {"algo": "critic-wmtp"},
        "critic": {"score": "value", "strength": "fixed", "lambda": 0.9},
    },
    "critic delta": {
        "train": {"algo": "critic-wmtp"},
        "critic": {"score": "delta", "strength": "fixed"},
    },
    "dft": {"train": {"algo": "mtp-weighted-ce", "scorer": "dft"}},
    "head decay": {"train": {"algo": "mtp-weighted-ce", "scorer": "head_decay"}},
    "running": {
        "train": {"algo": "mtp-weighted-ce", "scorer": "dft"},
        "loss": {"normalize_over": "running"},
    },
    "position scope": {"train": {"algo": "rho1-wmtp"}, "loss": {"weight_scope": "position"}},
    "head scope": {"train": {"algo": "rho1-wmtp"}, "loss": {"weight_scope": "head"}},
    "sequence": {
        "train": {"algo": "critic-wmtp"},
        "loss": {"normalize_over": "sequence"},
        "critic": {"strength": "fixed"},
    },
    "head sum": {"train": {"algo": "baseline-mtp"}, "loss": {"reduction": "head_sum"}},
    "token mean": {"train": {"algo": "baseline-mtp"}, "loss": {"reduction": "token", "scale": 0.5}},
    "linear": {"train": {"algo": "rho1-wmtp"}, "model": {"mtp": {"horizon": 3, "head": "linear"}}},
    "medusa, far offsets": {
        "train": {"algo": "rho1-wmtp"},
        "model": {"mtp": {"horizon": 3, "head": "medusa", "offsets": [1, 2, 5]}},
    },
    "sequential": {"train": {"algo": "rho1-wmtp"}, "model": {"mtp": {"horizon": 3, "head": "sequential"}}},
    "sequential, far offsets": {
        "train": {"algo": "critic-wmtp"},
        "critic": {"score": "value", "strength": "fixed"},
        "model": {"mtp": {"horizon": 3, "head": "sequential", "offsets": [1, 3, 4]}},
    },
    "teacher forcing": {
        "train": {"algo": "baseline-mtp"},
        "model": {"mtp": {"horizon": 3, "adapter": "teacher_forcing"}},
    },
}


def _with(base: dict[str, dict[str, Any]], **sections: dict[str, Any]) -> Any:
    merged = {name: dict(values) for name, values in base.items()}
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values}
    return make_recipe(**merged)


def loss_tolerance(name: str) -> float:
    """Everything is float64 but the value head, whose values are fp32 by contract."""
    return 1e-6 if ALGORITHMS[name]["train"]["algo"] == "critic-wmtp" else 1e-9


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_split_into_micro_batches_gives_the_same_trajectory(
    name: str, build: Callable[..., Built]
) -> None:
    # Four rows a step: as one micro-batch, as two of two and as four of one. Rows differ in length, so an
    # average of averages would show.
    runs = []
    for rows, accumulation in ((4, 1), (2, 2), (1, 4)):
        recipe = _with(
            ALGORITHMS[name],
            train={"gradient_accumulation_steps": accumulation},
            data={"train": {"batch_size": rows}},
        )
        runs.append(run(build(recipe)))
    whole = parameters(runs[0])
    for other in runs[1:]:
        assert other.losses == pytest.approx(runs[0].losses, rel=loss_tolerance(name))
        for key, value in parameters(other).items():
            torch.testing.assert_close(value, whole[key], rtol=0, atol=100 * loss_tolerance(name), msg=key)


def test_h1_uniform_is_plain_next_token_fine_tuning_in_loss_and_every_gradient(
    build: Callable[..., Built],
) -> None:
    recipe = make_recipe(model={"mtp": {"horizon": 1}})
    built = build(recipe)
    batch = built.context.data.batch(0)
    result = built.trainer.training_run.train_step([batch])
    plain = tiny_llama().to(torch.float64)
    labels_BS = batch["token_labels"]
    logits_BSV = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(
        logits_BSV[:, :-1].reshape(-1, logits_BSV.shape[-1]),
        labels_BS[:, 1:].reshape(-1),
        ignore_index=IGNORE_INDEX,
    )
    loss.backward()
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-6)
    trained = dict(built.context.model.causal_lm.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(trained[name].grad, parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    "name",
    [
        "baseline",
        "rho1 weighted",
        "critic value",
        "critic delta",
        "head scope",
        "medusa, far offsets",
        "sequential",
        "sequential, far offsets",
        "teacher forcing",
    ],
)
def test_packed_rows_train_like_separate_rows(name: str, build: Callable[..., Built]) -> None:
    # One step that sees every document, packed and not: the same weights, loss and gradients.
    features = tiny_features(6, with_rewards=True)
    gradients, losses = [], []
    for pack in (False, True):
        recipe = _with(
            ALGORITHMS[name],
            data={"train": {"batch_size": 6, "pack_sequences": pack, "max_length": 48}},
        )
        built = build(recipe, features=features)
        batch = built.context.data.batch(0)
        assert (batch["input_ids"].shape[0] < 6) == pack
        losses.append(float(built.trainer.training_run.train_step([batch]).loss))
        gradients.append({name: p.grad for name, p in built.context.model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=loss_tolerance(name))
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=0, atol=loss_tolerance(name), msg=key)


def test_offsets_decide_what_a_head_learns_and_which_weight_it_gets(build: Callable[..., Built]) -> None:
    built = build(_with(ALGORITHMS["medusa, far offsets"]))
    batch = built.context.data.batch(0)
    model, step = built.context.model, built.trainer.training_run.train_step
    weights = step.compute_head_weights([batch], [])
    assert weights is not None
    with torch.no_grad():
        log_probs = model(
            batch["input_ids"], batch["attention_mask"], document_ids=batch["document_ids"]
        ).logits()
        log_probs = log_probs.log_softmax(dim=-1)
        total, num_positions = 0.0, 0
        for b in range(batch["input_ids"].shape[0]):
            length = int(batch["attention_mask"][b].sum())
            for t in range(length):
                terms = []
                for h, offset in enumerate((1, 2, 5)):
                    at = t + offset
                    if at < length and batch["token_labels"][b, at] != IGNORE_INDEX:
                        weight = float(weights.token_weight_BS[0][b, at])
                        terms.append(-weight * float(log_probs[b, t, h, batch["input_ids"][b, at]]))
                if terms:
                    total += sum(terms) / len(terms)
                    num_positions += 1
    assert float(step([batch]).loss) == pytest.approx(total / num_positions, rel=1e-6)


class _Products(TorchDispatchMode):
    """Counts matrix products by the dtype they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm.out):
            self.dtypes.add(args[1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["baseline", "rho1 weighted"])
def test_in_bf16_every_matrix_product_runs_in_bf16_the_unembedding_too(
    name: str, build: Callable[..., Built]
) -> None:
    built = build(make_recipe(**ALGORITHMS[name]), dtype=torch.float32, precision=torch.bfloat16)
    with _Products() as products:
        built.trainer.training_run.train_step([built.context.data.batch(0)])
    assert products.dtypes == {torch.bfloat16}
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in built.context.model.parameters())


@pytest.mark.parametrize("name", ["rho1 weighted", "critic value"])
def test_lambda_zero_is_the_baseline_bit_for_bit(name: str, build: Callable[..., Built]) -> None:
    baseline = run(build(make_recipe()))
    sections = {**ALGORITHMS[name], "loss": {"lambda": 0.0}}
    blended = run(build(make_recipe(**sections), features=tiny_features(with_rewards=True)))
    assert blended.losses == baseline.losses


@pytest.mark.parametrize("coefficient", [0.0, 0.1, 10.0])
def test_a_critic_of_strength_zero_trains_like_the_baseline_whatever_its_value_loss(
    coefficient: float, build: Callable[..., Built]
) -> None:
    features = tiny_features(with_rewards=True)
    baseline = run(build(make_recipe(), features=features))
    recipe = make_recipe(train={"algo": "critic-wmtp"}, critic={"value_loss_coef": coefficient})
    built = build(recipe, features=features)
    built.context.scorer.strength = 0.0
    run(built)
    assert built.losses == baseline.losses
    model = {key: value for key, value in parameters(built).items() if key.startswith("model.")}
    for key, value in parameters(baseline).items():
        assert torch.equal(value, model[key]), key


def test_value_loss_reaches_the_trunk_only_when_asked(build: Callable[..., Built]) -> None:
    features = tiny_features(with_rewards=True)
    gradients = {}
    for into_trunk in (False, True):
        recipe = make_recipe(
            train={"algo": "critic-wmtp"},
            critic={"value_loss_into_trunk": into_trunk},
            loss={"scale": 1e-30},
        )
        built = build(recipe, features=features)
        built.trainer.training_run.train_step([built.context.data.batch(0)])
        gradients[into_trunk] = sum(
            float(p.grad.abs().sum()) for p in built.context.model.parameters() if p.grad is not None
        )
    assert gradients[False] < 1e-20
    assert gradients[True] > 1e-6


def test_clipping_the_value_head_does_not_scale_the_models_update(build: Callable[..., Built]) -> None:
    # A huge value loss must not shrink the model's gradient through a shared norm.
    features = tiny_features(with_rewards=True)
    updates = []
    for coefficient in (1e-6, 1e6):
        recipe = make_recipe(
            train={"algo": "critic-wmtp", "max_steps": 1},
            critic={"value_loss_coef": coefficient},
            optim={"grad_clip": 0.1},
        )
        built = run(build(recipe, features=features))
        updates.append({k: v for k, v in parameters(built).items() if k.startswith("model.")})
    for key, value in updates[0].items():
        assert torch.equal(value, updates[1][key]), key
