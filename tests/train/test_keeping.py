from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from epivi._errors import CheckpointError
from epivi.train.checkpoint import is_checkpoint
from epivi.train.keeping import RunState, WeightKeeper, copy_weights

FINGERPRINT = {"model": "M", "lr": 0.1, "data": "abc"}


def feed(keeper, values, *, kl_weights=None):
    """Feed one value an epoch; the weight of the module is the number of the epoch."""
    module, stops = nn.Linear(1, 1, bias=False), []
    for epoch, value in enumerate(values):
        with torch.no_grad():
            module.weight.fill_(epoch)
        record = {"epoch": float(epoch), "m": value}
        if kl_weights is not None:
            record["kl_weight"] = kl_weights[epoch]
        stops.append(keeper.update(module, record))
    return stops


def test_copies_do_not_change_with_the_module():
    module = nn.BatchNorm1d(2)
    copy = copy_weights(module)
    with torch.no_grad():
        module.weight += 1
        module.running_mean += 1
    assert torch.equal(copy["weight"], torch.ones(2))
    assert torch.equal(copy["running_mean"], torch.zeros(2))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_copies_on_disk_equal_those_in_memory_and_do_not_change_with_the_module(kind):
    module = nn.BatchNorm1d(3).to(kind)  # its count of minibatches has no axes
    with torch.no_grad():
        module.weight.copy_(torch.arange(3.0))
    memory, disk = copy_weights(module), copy_weights(module, on_disk=True)
    with torch.no_grad():
        module.weight += 1
    assert memory.keys() == disk.keys()
    for key, value in memory.items():
        assert disk[key].dtype == value.dtype
        assert torch.equal(disk[key], value)
    module.load_state_dict(disk)
    assert torch.equal(module.weight, memory["weight"])
    disk["weight"] += 5  # a copy of one's own
    assert torch.equal(module.weight, memory["weight"])


def test_a_keeper_on_disk_keeps_the_same():
    found = WeightKeeper("m", patience=2, on_disk=True)
    feed(found, [5.0, 3.0, 4.0])
    assert found.best_weights["weight"].item() == 1.0
    assert found.last_good["weight"].item() == 2.0


def test_a_module_without_weights_can_be_copied_to_disk():
    assert copy_weights(nn.ReLU(), on_disk=True) == {}


def test_the_lowest_value_is_kept_and_patience_counts_from_it():
    keeper = WeightKeeper("m", patience=2)
    assert feed(keeper, [5.0, 3.0, 4.0, 2.0, 2.5, 2.0]) == [False, False, False, False, False, True]
    assert (keeper.best, keeper.best_epoch) == (2.0, 3)
    assert keeper.best_weights["weight"].item() == 3.0
    assert keeper.last_good["weight"].item() == 5.0


def test_epochs_below_full_kl_weight_do_not_count():
    keeper = WeightKeeper("m", patience=1)
    stops = feed(keeper, [1.0, 1.0, 4.0, 2.0, 9.0, 9.0], kl_weights=[0.0, 0.99, 1.0, 1.0, 0.5, 1.0])
    assert stops == [False, False, False, False, False, True]
    assert (keeper.best, keeper.best_epoch) == (2.0, 3)


def test_without_patience_it_never_stops():
    keeper = WeightKeeper("m", patience=None)
    assert not any(feed(keeper, [1.0] + [2.0] * 50))
    assert keeper.best_epoch == 0


def test_small_changes_and_nan_do_not_count():
    keeper = WeightKeeper("m", patience=10, min_delta=0.5)
    feed(keeper, [3.0, 2.6, math.nan, 2.4])
    assert (keeper.best, keeper.best_epoch, keeper.waited) == (2.4, 3, 0)
    feed(keeper, [2.0])
    assert keeper.waited == 1


def test_without_the_metric_only_the_last_weights_are_kept():
    keeper = WeightKeeper("other", patience=1)
    assert not any(feed(keeper, [1.0, 2.0, 3.0]))
    assert keeper.best_weights is None
    assert keeper.last_good["weight"].item() == 2.0


def test_a_restored_keeper_goes_on_where_it_was():
    keeper, fresh = WeightKeeper("m", patience=3), WeightKeeper("m", patience=3)
    feed(keeper, [2.0, 3.0, 3.0])
    fresh.load_state(keeper.state())
    assert (fresh.best, fresh.best_epoch, fresh.waited) == (2.0, 0, 2)
    assert fresh.best_weights["weight"].item() == 0.0
    assert feed(fresh, [4.0]) == [True]
    assert fresh.is_exhausted
    assert not keeper.is_exhausted


class Plan:
    """What a state reads of a training plan."""

    def __init__(self, *, step=0, batch_in_epoch=0, rank=0, value=0.0):
        self.module = nn.Linear(2, 1)
        with torch.no_grad():
            self.module.weight.fill_(value)
        self.inner = torch.optim.Adam(self.module.parameters())
        self.optimizer = SimpleNamespace(optimizer=self.inner)
        self.step, self.batch_in_epoch, self.global_rank = step, batch_in_epoch, rank
        self.records = []
        self.keeper = WeightKeeper("m", patience=2)

    def advance(self):
        self.inner.zero_grad()
        self.module(torch.ones(1, 2)).sum().backward()
        self.inner.step()
        self.step += 1
        return self

    def state(self):
        return {"step": self.step, "batch_in_epoch": self.batch_in_epoch, "records": [{"epoch": 0.0, "m": 1.5}]}

    def load_state(self, state):
        self.step, self.batch_in_epoch, self.records = (state[k] for k in ("step", "batch_in_epoch", "records"))


def test_a_run_comes_back_whole(tmp_path):
    plan = Plan(value=0.5).advance().advance()
    plan.keeper.update(plan.module, {"epoch": 0.0, "m": 1.5})
    RunState(tmp_path / "run", FINGERPRINT).save(plan)
    fresh, state = Plan(), RunState(tmp_path / "run", FINGERPRINT)
    assert state.resume(fresh)
    state.restore_optimizer(fresh.inner)
    assert torch.equal(fresh.module.weight, plan.module.weight)
    assert fresh.step == 2
    assert fresh.records == [{"epoch": 0.0, "m": 1.5}]
    assert fresh.keeper.best == 1.5
    # the optimiser goes on with the same moments
    assert torch.equal(fresh.advance().module.weight, plan.advance().module.weight)


def test_an_optimiser_is_restored_once(tmp_path):
    plan = Plan().advance()
    RunState(tmp_path, FINGERPRINT).save(plan)
    state, fresh = RunState(tmp_path, FINGERPRINT), Plan()
    state.resume(fresh)
    state.restore_optimizer(fresh.inner)
    other = Plan()
    state.restore_optimizer(other.inner)
    assert not other.inner.state


def test_an_empty_folder_holds_no_run(tmp_path):
    assert not RunState(tmp_path / "none", FINGERPRINT).resume(Plan())


def test_another_run_is_refused_and_what_differs_is_named(tmp_path):
    RunState(tmp_path, FINGERPRINT).save(Plan())
    with pytest.raises(CheckpointError, match=r"does not fit \(lr: 0.1 then, 0.2 now\)") as caught:
        RunState(tmp_path, FINGERPRINT | {"lr": 0.2}).resume(Plan())
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(CheckpointError, match=r"new: None then, 1 now"):
        RunState(tmp_path, FINGERPRINT | {"new": 1}).resume(Plan())


@pytest.mark.parametrize(
    ("step", "batch_in_epoch", "every", "rank", "expected"),
    [
        (10, 0, None, 0, True),  # the end of an epoch
        (10, 3, None, 0, False),
        (10, 3, 10, 0, True),
        (9, 3, 10, 0, False),
        (10, 0, None, 1, False),  # other processes write nothing
    ],
)
def test_states_are_saved_when_they_are_due(tmp_path, step, batch_in_epoch, every, rank, expected):
    state = RunState(tmp_path, FINGERPRINT, every_n_steps=every)
    state.save_if_due(Plan(step=step, batch_in_epoch=batch_in_epoch, rank=rank))
    assert is_checkpoint(tmp_path / "state") is expected


def test_steps_are_counted_from_the_last_save(tmp_path):
    state, plan, saved = RunState(tmp_path, FINGERPRINT, every_n_steps=4), Plan(batch_in_epoch=1), []
    for step in range(1, 10):
        plan.step = step
        plan.batch_in_epoch = 0 if step == 3 else 1  # step 3 ends an epoch
        state.save_if_due(plan)
        fresh = Plan()
        RunState(tmp_path, FINGERPRINT).resume(fresh)
        saved.append(fresh.step)
    assert saved == [0, 0, 3, 3, 3, 3, 7, 7, 7]


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    state = RunState(tmp_path, FINGERPRINT)
    state.save(Plan(value=1.0, step=3))
    state.save(Plan(value=math.nan, step=4))
    fresh = Plan()
    assert RunState(tmp_path, FINGERPRINT).resume(fresh)
    assert fresh.step == 3
    assert (fresh.module.weight == 1.0).all()
