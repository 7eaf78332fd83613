"""What is frozen stays bit for bit and costs nothing; what joins later joins as if it were new."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from modeling_families import build_causal_lm, perturb, random_tokens
from torch import Tensor, nn

from wmtp.components.optimizer import AdamWOptimizer, OptimizerContext
from wmtp.distributed.checkpoint import save_checkpoint
from wmtp.distributed.checkpoint_optimizer import flatten_optimizer_state, restore_optimizer_state
from wmtp.distributed.checkpoint_reading import Checkpoint
from wmtp.distributed.checkpoint_store import LocalStore
from wmtp.exceptions import CheckpointError, UserInputError
from wmtp.modeling import LateParameters, MTPModel, choose_trainable, trainable_parameters
from wmtp.modeling.lora import add_lora
from wmtp.modeling.trainable import checkpoint_tensors
from wmtp.objectives import shift_labels, weighted_mtp_cross_entropy
from wmtp.settings import OptimSettings

FORMS = ("transformer", "linear", "medusa", "sequential")
OPTIM = OptimSettings(lr=0.01, weight_decay=0.3, scheduler="constant", warmup_steps=2)


def build(form: str = "transformer", *, horizon: int = 3, tied: bool = False) -> MTPModel:
    torch.manual_seed(1)
    causal_lm = build_causal_lm("llama", tie_word_embeddings=tied)
    model = MTPModel.from_causal_lm(causal_lm, horizon=horizon, head=form)  # type: ignore[arg-type]
    perturb(model.extra_heads)
    return model.train()


def loss_of(model: MTPModel, hidden_BSHD: Tensor, tokens: Tensor) -> Tensor:
    labels_BSH = shift_labels(tokens, model.horizon)
    return weighted_mtp_cross_entropy(hidden_BSHD, model.unembedding_VD, labels_BSH).loss


def train(
    model: MTPModel, steps: int, late: LateParameters | None = None, first: int = 0
) -> tuple[list[float], AdamWOptimizer]:
    bundle = AdamWOptimizer(OPTIM).run(OptimizerContext({"model": model}, 8, {}, late))
    return run_steps(model, bundle, range(first, steps), late), bundle  # type: ignore[return-value]


def run_steps(model: MTPModel, bundle: object, steps: range, late: LateParameters | None) -> list[float]:
    losses = []
    for step in steps:
        if late is not None:
            late.set_learning(step)
        tokens = random_tokens(seed=step)
        loss = loss_of(model, model(tokens).hidden_BSHD, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        bundle.optimizer.step()  # type: ignore[attr-defined]
        bundle.scheduler.step()  # type: ignore[attr-defined]
        bundle.optimizer.zero_grad(set_to_none=True)  # type: ignore[attr-defined]
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_heads_only_leaves_everything_else_bit_for_bit_as_it_was(form: str, tied: bool) -> None:
    model = build(form, tied=tied)
    choose_trainable(model, "heads_only")
    before = copy.deepcopy(model.state_dict())
    tokens = random_tokens()
    logits = model(tokens).logits()
    train(model, 3)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]) == (not name.startswith("extra_heads.")), name
    after = model(tokens).logits()
    assert torch.equal(after[:, :, 0], logits[:, :, 0])
    assert not torch.equal(after[:, :, 1:], logits[:, :, 1:])


@pytest.mark.parametrize("form", FORMS)
def test_heads_only_equals_training_on_a_trunk_detached_by_hand(form: str) -> None:
    model = build(form).double()
    twin = copy.deepcopy(model)
    choose_trainable(model, "heads_only")
    losses, _ = train(model, 4)

    heads = list(twin.extra_heads.parameters())
    decayed, plain = [p for p in heads if p.ndim >= 2], [p for p in heads if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.eps, foreach=False)
    for step, expected in enumerate(losses):
        tokens = random_tokens(seed=step)
        loss = loss_of(twin, twin(tokens).hidden_BSHD, tokens)
        gradients = torch.autograd.grad(loss, heads)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        for parameter, gradient in zip(heads, gradients, strict=True):
            parameter.grad = gradient * min(1.0, 1.0 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr * min(1.0, (step + 1) / 2)
        optimizer.step()
        assert expected == pytest.approx(loss.item(), rel=1e-12)
    for parameter, other in zip(heads, model.extra_heads.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-9, atol=1e-9)


def saved_bytes(model: MTPModel) -> int:
    """What autograd keeps of a forward beside parameters."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Kept alive until the hooks are left, so that no address is counted twice for two tensors.
        output = model(random_tokens())
    return sum(sizes.values()) if output.hidden_BSHD.requires_grad else 0


def test_heads_only_keeps_no_graph_of_trunk_and_head_0() -> None:
    model = build("transformer", horizon=2)
    everything = saved_bytes(model)
    choose_trainable(model, "heads_only")
    assert model(random_tokens()).trunk_BSD.grad_fn is None
    # Three decoder layers before, one now: trunk and head 0 have gone.
    assert len(model.decoder_layers) >= 2
    assert saved_bytes(model) < 0.6 * everything


@pytest.mark.parametrize("tied", [False, True])
def test_late_parameters_have_no_moments_and_no_decay_before_they_join(tied: bool) -> None:
    model = build(tied=tied)
    late = choose_trainable(model, "heads_then_all", warmup_head_steps=3)
    assert late is not None
    before = [parameter.detach().clone() for parameter in late.parameters]
    assert len(late.parameters) + len(list(model.extra_heads.parameters())) == len(list(model.parameters()))
    _, bundle = train(model, 3, late)
    state = bundle.optimizer.state  # type: ignore[attr-defined]
    assert all(torch.equal(old, new) for old, new in zip(before, late.parameters, strict=True))
    assert not any(parameter in state for parameter in late.parameters)
    run_steps(model, bundle, range(3, 4), late)
    assert all(int(state[parameter]["step"]) == 1 for parameter in late.parameters)
    assert all(int(state[parameter]["step"]) == 4 for parameter in model.extra_heads.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, late.parameters, strict=True))


def test_the_heads_phase_equals_heads_only() -> None:
    one, other = build(), build()
    late = choose_trainable(one, "heads_then_all", warmup_head_steps=3)
    choose_trainable(other, "heads_only")
    assert train(one, 3, late)[0] == train(other, 3)[0]
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_late_parameters_are_warmed_up_when_they_join_and_follow_the_schedule_after_that() -> None:
    model = build()
    late = choose_trainable(model, "heads_then_all", warmup_head_steps=3)
    settings = OptimSettings(lr=1.0, scheduler="linear", warmup_steps=2, min_lr_ratio=0.0)
    bundle = AdamWOptimizer(settings).run(OptimizerContext({"model": model}, 7, {}, late))
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(7):
        for is_late in rates:
            group = next(g for g in bundle.optimizer.param_groups if g["late"] == is_late)
            rates[is_late].append(group["lr"])
        bundle.optimizer.step()
        bundle.scheduler.step()
    assert rates[False] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert rates[True] == pytest.approx([0.0, 0.0, 0.0, 0.375, 0.5, 0.25, 0.0])
    decays = {(group["late"], group["weight_decay"]) for group in bundle.optimizer.param_groups}
    assert decays == {(False, 0.1), (False, 0.0), (True, 0.1), (True, 0.0)}


@pytest.mark.parametrize("saved_at", [1, 2, 3])
def test_optimizer_state_without_moments_of_late_parameters_comes_back(tmp_path: Path, saved_at: int) -> None:
    whole = build()
    late = choose_trainable(whole, "heads_then_all", warmup_head_steps=2)
    losses, bundle = train(whole, saved_at, late)
    named = [(name, parameter) for name, parameter in whole.named_parameters()]
    tensors, state = flatten_optimizer_state(bundle.optimizer, named)  # type: ignore[attr-defined]
    groups = {"model": checkpoint_tensors(whole)}
    saved = save_checkpoint(LocalStore(tmp_path), saved_at, tensors=groups, state={})
    schedule = copy.deepcopy(bundle.scheduler.state_dict())  # type: ignore[attr-defined]
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    losses = run_steps(whole, bundle, range(saved_at, 5), late)

    resumed = build()
    late = choose_trainable(resumed, "heads_then_all", warmup_head_steps=2)
    again = AdamWOptimizer(OPTIM).run(OptimizerContext({"model": resumed}, 8, {}, late))
    Checkpoint(LocalStore(tmp_path), saved.name).load_into({"model": checkpoint_tensors(resumed)})
    restore_optimizer_state(again.optimizer, list(resumed.named_parameters()), tensors, state)
    again.scheduler.load_state_dict(schedule)
    assert run_steps(resumed, again, range(saved_at, 5), late) == losses
    assert all(a.equal(b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_all_trains_everything_and_nothing_joins_later() -> None:
    model = build()
    model.causal_lm.requires_grad_(False)
    assert choose_trainable(model, "all") is None
    assert trainable_parameters(model) == model.num_parameters


@pytest.mark.parametrize("trainable", ["heads_only", "heads_then_all"])
@pytest.mark.parametrize("adapter", ["heads", "teacher_forcing"])
def test_heads_that_cannot_learn_alone_are_refused(trainable: str, adapter: str) -> None:
    horizon = 1 if adapter == "heads" else 3
    model = MTPModel.from_causal_lm(build_causal_lm("llama"), horizon=horizon, adapter=adapter)  # type: ignore[arg-type]
    with pytest.raises(UserInputError, match=f"horizon {horizon}") as caught:
        choose_trainable(model, trainable, warmup_head_steps=1)  # type: ignore[arg-type]
    assert "model.trainable: all" in str(caught.value)


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("trainable", ["all", "heads_only", "heads_then_all"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_count_of_what_learns_needs_no_weights(trainable: str, with_lora: bool, tied: bool) -> None:
    def count(model: MTPModel) -> int:
        if with_lora:
            add_lora(model, rank=2)
        choose_trainable(model, trainable, warmup_head_steps=1)  # type: ignore[arg-type]
        return trainable_parameters(model)

    real = build(tied=tied)
    with torch.device("meta"):
        shapes = build(tied=tied)
    assert shapes.device.type == "meta"
    assert count(shapes) == count(real) == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert not with_lora or all(parameter.is_meta for parameter in shapes.parameters())


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = build()
    tensors = checkpoint_tensors(model)
    name = "causal_lm.model.norm.weight"
    store = LocalStore(tmp_path)
    for wrong, named in (
        ({key: value for key, value in tensors.items() if key != name}, name),
        ({**tensors, "unknown": torch.zeros(1)}, "unknown"),
        ({**tensors, name: torch.zeros(3)}, name),
    ):
        saved = save_checkpoint(store, 1, tensors={"model": wrong}, state={})
        with pytest.raises(CheckpointError, match=named):
            Checkpoint(store, saved.name).load_into({"model": tensors})
