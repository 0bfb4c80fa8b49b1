from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scvi.module.base import LossOutput
from torch import nn
from torch.utils.data import DataLoader

from epivi._errors import ConfigError, TrainingError
from epivi._keys import BATCH_ROWS
from epivi.train.plan import IS_PARTLY_FROZEN, NotFiniteLossError, TrainingPlan, _mix, _seeded
from epivi.train.schedules import Annealing, LearningRate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Toy(nn.Module):
    """Squared distance of a weight to the values of the batch; notes what it was asked for."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.calls = []

    def forward(self, batch, *, inference_kwargs, loss_kwargs):
        noise = torch.randn(3)
        self.calls.append((self.training, inference_kwargs["deterministic"], loss_kwargs["kl_weight"], noise))
        distance_b = (batch["x"] - self.weight).square().sum(1)
        output = LossOutput(
            loss=distance_b.mean(),
            reconstruction_loss=distance_b,
            kl_local=torch.full_like(distance_b, 0.5),
            extra_metrics={"first": batch["x"][:, 0].mean()},
            n_obs_minibatch=distance_b.shape[0],
        )
        return None, None, output


def batches(*sizes, value=None):
    rows = torch.arange(sum(sizes)).split(sizes)
    x = torch.arange(2.0 * sum(sizes)).view(-1, 2).split(sizes)
    return [
        {"x": a if value is None else torch.full_like(a, value), BATCH_ROWS: r} for a, r in zip(x, rows, strict=True)
    ]


def plan_of(module, *, steps=2, max_epochs=4, annealing=None, rate=None, **kwargs):
    length = {"steps_per_epoch": steps, "max_epochs": max_epochs}
    return TrainingPlan(
        module,
        annealing=Annealing(**length, **(annealing or {"n_epochs_warmup": 1, "n_epochs_cycle": 2})),
        learning_rate=LearningRate(**length, **({"lr": 1e-3, "gamma": 0.995} | (rate or {}))),
        **kwargs,
    )


def fit(plan, train, validation=(), max_epochs=4):
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loaders = [DataLoader(list(part), batch_size=None) for part in (train, validation)]
    trainer.fit(plan, train_dataloaders=loaders[0], val_dataloaders=loaders[1] if validation else None)
    return plan


def test_metrics_are_means_over_cells_not_over_minibatches():
    train, validation = batches(3, 1), batches(2, 4)
    plan = fit(plan_of(Toy(), max_epochs=1, rate={"lr": 1e-30}), train, validation, max_epochs=1)
    (record,) = plan.records
    for mode, part in (("train", train), ("validation", validation)):
        x = torch.cat([batch["x"] for batch in part]).double()
        distance = float(x.square().sum(1).mean())
        assert record[f"reconstruction_loss_{mode}"] == pytest.approx(distance, rel=1e-6)
        assert record[f"{mode}_loss"] == pytest.approx(distance, rel=1e-6)
        assert record[f"kl_local_{mode}"] == 0.5
        assert record[f"elbo_{mode}"] == pytest.approx(distance + 0.5, rel=1e-6)
        assert record[f"first_{mode}"] == pytest.approx(float(x[:, 0].mean()), rel=1e-6)
    assert "kl_weight_validation" not in record


def test_the_step_decides_weight_and_noise():
    module = Toy()
    annealing = {"n_epochs_warmup": 1, "n_epochs_cycle": 2, "ratio": 0.5}
    plan = fit(plan_of(module, max_epochs=3, annealing=annealing), batches(2, 2), batches(2), max_epochs=3)
    train = [call for call in module.calls if call[0]]
    assert [call[1] for call in train] == [True, True, False, False, False, False]
    assert [call[2] for call in train] == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    assert [record["kl_weight"] for record in plan.records] == [0.0, 0.25, 1.0]
    validation = [call for call in module.calls if not call[0]]
    assert {(call[1], call[2]) for call in validation} == {(False, 1.0)}


def test_noise_depends_on_seed_and_step_alone_and_validation_repeats_it():
    def noises(seed):
        module = Toy()
        fit(plan_of(module, max_epochs=2, seed=seed), batches(2, 2), batches(2, 2), max_epochs=2)
        return ([c[3] for c in module.calls if c[0]], [c[3] for c in module.calls if not c[0]])

    torch.manual_seed(3)
    train, validation = noises(1)
    torch.manual_seed(4)
    again, _ = noises(1)
    other, _ = noises(2)
    assert all(torch.equal(a, b) for a, b in zip(train, again, strict=True))
    assert len({tuple(noise.tolist()) for noise in (*train, *validation[:2], *other)}) == 4 + 2 + 4
    assert torch.equal(torch.stack(validation[:2]), torch.stack(validation[2:]))


def test_the_learning_rate_falls_by_epoch():
    plan, seen = plan_of(Toy(), rate={"lr": 0.1, "gamma": 0.5}), []
    original = plan.training_step

    def step(batch, batch_idx):
        seen.append(plan.optimizer.param_groups[0]["lr"])
        return original(batch, batch_idx)

    plan.training_step = step
    fit(plan, batches(2, 2), max_epochs=3)
    assert seen == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    assert (plan.epoch, plan.step, plan.batch_in_epoch) == (3, 6, 0)


@pytest.mark.parametrize(("name", "kind"), [("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW)])
def test_the_optimiser_is_the_chosen_one(name, kind):
    optimizer = plan_of(Toy(), optimizer=name, rate={"lr": 0.2}, weight_decay=0.3, eps=0.4).configure_optimizers()
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.2, 0.3, 0.4)


def test_training_is_that_of_torch():
    module = Toy()
    fit(plan_of(module, rate={"lr": 0.1, "gamma": 1.0}, weight_decay=0.01), batches(2, 2), max_epochs=2)
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight], lr=0.1, weight_decay=0.01, fused=True)
    for batch in batches(2, 2) * 2:
        optimizer.zero_grad()
        (batch["x"] - weight).square().sum(1).mean().backward()
        optimizer.step()
    assert torch.equal(module.weight, weight)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_frozen_entries_of_a_weight_do_not_decay_and_frozen_weights_are_left_out(name):
    module = Toy()
    module.partly = nn.Parameter(torch.ones(2))
    module.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    setattr(module.partly, IS_PARTLY_FROZEN, True)
    with torch.no_grad():
        module.weight += 1
    optimizer = plan_of(module, optimizer=name, weight_decay=0.5, rate={"lr": 0.1}).configure_optimizers()
    assert [[p.shape for p in group["params"]] for group in optimizer.param_groups] == [[(2,)], [(2,)]]
    for parameter in (module.weight, module.partly):
        parameter.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(module.partly, torch.ones(2))
    assert (module.weight < 1).all()


def test_a_loss_that_is_not_finite_stops_at_the_step_and_names_the_rows():
    train = [*batches(2), *batches(3, value=float("nan"))]
    train[1][BATCH_ROWS] = torch.tensor([7, 4, 9])
    plan = plan_of(Toy())
    with pytest.raises(NotFiniteLossError, match=r"The loss of step 1 \(epoch 0\) is not finite") as caught:
        fit(plan, train)
    assert isinstance(caught.value, TrainingError)
    assert caught.value.rows == [7, 4, 9]
    assert (caught.value.epoch, caught.value.step) == (0, 1)
    assert plan.step == 1
    assert NotFiniteLossError(2, 5, None, what="weights").rows == []


def test_state_goes_out_and_comes_back():
    plan = fit(plan_of(Toy()), batches(2, 2), max_epochs=2)
    state = plan.state()
    fresh = plan_of(Toy())
    fresh.load_state(state)
    assert fresh.state() == state
    assert (fresh.epoch, fresh.step) == (2, 4)
    state["records"][0]["epoch"] = -1
    assert fresh.records[0]["epoch"] == 0.0


def test_a_stop_is_granted_after_the_step():
    plan = plan_of(Toy(), steps=3)
    original = plan.training_step

    def step(batch, batch_idx):
        plan.is_stop_requested = plan.step == 1
        return original(batch, batch_idx)

    plan.training_step = step
    fit(plan, batches(2, 2, 2))
    assert (plan.epoch, plan.step, plan.batch_in_epoch) == (0, 2, 2)
    assert plan.records == []


def test_seeded_noise_leaves_the_global_generator():
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    with _seeded(1, 2, 3, torch.device("cpu")):
        first = torch.randn(2)
    assert torch.equal(torch.randn(2), expected)
    with _seeded(1, 2, 3, torch.device("cpu")):
        assert torch.equal(torch.randn(2), first)


@given(st.tuples(st.integers(0, 2**40), st.integers(0, 2**41), st.integers(0, 64)))
def test_mixed_seeds_are_valid_and_tell_their_arguments_apart(numbers):
    seed, stream, rank = numbers
    mixed = _mix(*numbers)
    assert 0 <= mixed < 2**63
    others = {_mix(seed + 1, stream, rank), _mix(seed, stream + 1, rank), _mix(seed, stream, rank + 1)}
    assert mixed not in others
    assert len(others) == 3


def test_processes_share_the_statistics_that_are_saved_and_nothing_else(monkeypatch):
    module = nn.BatchNorm1d(2)
    module.register_buffer("positions", torch.arange(3), persistent=False)
    plan = plan_of(module)
    monkeypatch.setattr(TrainingPlan, "trainer", SimpleNamespace(world_size=2))
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda buffer, source: sent.append((buffer, source)))
    plan.on_validation_start()
    assert [source for _, source in sent] == [0, 0, 0]
    expected = [module.running_mean, module.running_var, module.num_batches_tracked]
    assert all(buffer is other for (buffer, _), other in zip(sent, expected, strict=True))


class Wide(Toy):
    """Two weights."""

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, batch, **kwargs):
        return super().forward(batch | {"x": batch["x"] * self.other}, **kwargs)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
def test_a_step_in_backward_gives_bitwise_the_same_weights_and_keeps_no_gradient(optimizer):
    weights = []
    for step_in_backward in (False, True):
        plan = plan_of(Wide(), optimizer=optimizer, weight_decay=0.1, step_in_backward=step_in_backward)
        fit(plan, batches(3, 2))
        weights.append([p.detach().clone() for p in plan.module.parameters()])
        assert not any(p._post_accumulate_grad_hooks for p in plan.module.parameters())
        if step_in_backward:
            assert all(p.grad is None for p in plan.module.parameters())
    assert not torch.equal(weights[0][0], torch.zeros(2))
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gradient_clip_val": 1.0}, "gradient clipping"),
        ({"accumulate_grad_batches": 2}, "accumulated gradients"),
        ({"world_size": 2}, "several processes"),
        ({"precision": "bf16-mixed"}, "mixed precision"),
    ],
)
def test_a_step_in_backward_is_refused_where_all_gradients_are_needed(options, named):
    usual = {"gradient_clip_val": None, "accumulate_grad_batches": 1, "world_size": 1, "precision": "32-true"}
    plan = plan_of(Toy(), step_in_backward=True)
    plan._trainer = SimpleNamespace(**usual)
    plan._check_step_in_backward()
    plan._trainer = SimpleNamespace(**usual | options)
    with pytest.raises(ConfigError, match=rf"step_in_backward=True cannot be had with {named}"):
        plan._check_step_in_backward()


def test_a_loss_that_is_not_finite_leaves_no_hooks():
    plan = plan_of(Toy(), step_in_backward=True)
    with pytest.raises(NotFiniteLossError):
        fit(plan, batches(2, 2, value=float("nan")))
    assert not plan.module.weight._post_accumulate_grad_hooks
