"""What happens when training cannot go on: a loss that is not finite, Ctrl-C, a GPU that is full."""

from __future__ import annotations

import os
import runpy
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import epivi
from epivi._errors import TrainingError
from epivi.train.keeping import copy_weights
from epivi.train.plan import TrainingPlan

CONFTEST = str(Path(__file__).parent / "conftest.py")
KINDS = ["SAILER", "SAILERX", "ConvNetVAE", "FCVAE"]
# 36 training cells in minibatches of 12: 3 steps an epoch
STEPS = 3


def build(kind, make):
    cls, data = getattr(epivi, kind), make()
    (cls.setup_mudata if kind == "SAILERX" else cls.setup_anndata)(data, batch_key="batch")
    return cls(data, n_latent=2, n_hidden=(4, 3) if kind.startswith("SAILER") else 4, seed=1)


@pytest.fixture(params=KINDS)
def model(request, make_peaks, make_multiome, make_tracks):
    return build(request.param, {"SAILER": make_peaks, "SAILERX": make_multiome}.get(request.param, make_tracks))


@pytest.fixture
def options(quiet, flat):
    return {"max_epochs": 6, "batch_size": 12, "plan_kwargs": flat} | quiet


@pytest.fixture
def at_step(monkeypatch):
    """Call a function right after the loss of some step was computed, or after that step."""

    def patch(step, function, hook="training_step"):
        before = getattr(TrainingPlan, hook)

        def patched(plan, *args):
            now = plan.step
            result = before(plan, *args)
            if now == step:
                function(plan)
            return result

        monkeypatch.setattr(TrainingPlan, hook, patched)

    return patch


@pytest.fixture
def spoiled(monkeypatch, model):
    """Make the loss of one step something else, and count the losses of the training."""
    counts = {"steps": 0, "rows": []}

    def spoil(step, value):
        before = model.module.loss

        def loss(tensors, *args, **kwargs):
            output = before(tensors, *args, **kwargs)
            if model.module.training:
                counts["steps"] += 1
                counts["rows"].append(tensors["rows"].tolist())
                if counts["steps"] == step + 1:
                    output.loss = output.loss * value
            return output

        monkeypatch.setattr(model.module, "loss", loss)
        return counts

    return spoil


@pytest.fixture
def ends_of_epochs(monkeypatch):
    """The weights at the end of each epoch."""
    found = []
    before = TrainingPlan.on_train_epoch_end

    def patched(plan):
        found.append(copy_weights(plan.module))
        before(plan)

    monkeypatch.setattr(TrainingPlan, "on_train_epoch_end", patched)
    return found


def check_usable(model, options):
    assert not model.module.training
    latent = model.get_latent_representation()
    assert np.isfinite(latent).all()
    assert np.isfinite(model.get_normalized_accessibility(return_numpy=True)).all()
    return latent


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_stops_the_training(model, spoiled, options, ends_of_epochs, same_weights, value):
    counts = spoiled(2 * STEPS + 1, value)
    with pytest.raises(TrainingError) as caught:
        model.train(**options)
    message = str(caught.value)
    names = [str(model.adata.obs_names[row]) for row in counts["rows"][-1][:5]]
    assert "The loss of step 7 (epoch 2) is not finite." in message
    assert f"holds 12 cells, among them {names}" in message
    assert "the weights of epoch 1 are restored" in message
    assert "learning rate" in message
    assert counts["steps"] == 2 * STEPS + 2
    assert same_weights(model.module.state_dict(), ends_of_epochs[1])
    assert model.is_trained
    assert model.history["train_loss"].index.tolist() == [0, 1]
    check_usable(model, options)
    before = len(counts["rows"])
    model.train(**options)
    assert len(counts["rows"]) == before + 6 * STEPS


def test_a_failure_in_the_first_epoch_leaves_the_model_as_it_was(model, spoiled, options, same_weights):
    before = copy_weights(model.module)
    spoiled(1, np.nan)
    with pytest.raises(TrainingError, match="no epoch was finished, the weights from before the training are restored"):
        model.train(**options)
    assert same_weights(model.module.state_dict(), before)
    assert not model.is_trained


def test_a_failure_in_a_second_training_keeps_the_first(model, spoiled, options, same_weights):
    model.train(**options)
    before, latent = copy_weights(model.module), model.get_latent_representation()
    spoiled(1, np.nan)
    with pytest.raises(TrainingError, match="from before the training"):
        model.train(**options)
    assert same_weights(model.module.state_dict(), before)
    assert model.is_trained
    assert np.array_equal(check_usable(model, options), latent)


@pytest.mark.parametrize("step", [2 * STEPS, 3 * STEPS - 1, 6 * STEPS - 1])
def test_weights_that_are_not_finite_are_never_kept(
    model, at_step, options, ends_of_epochs, same_weights, step, tmp_path
):
    # as after a gradient that is not finite: inside an epoch, at its end, and at the end of the training
    def spoil(plan):
        with torch.no_grad():
            next(plan.module.parameters()).view(-1)[0] = np.nan

    at_step(step, spoil, "on_train_batch_end")
    what = "loss" if step == 2 * STEPS else "weights"
    with pytest.raises(TrainingError, match=rf"The {what} of step \d+ .*not finite.*cells.*are restored"):
        model.train(run_dir=tmp_path / "run", save_every_n_steps=1, **options)
    assert same_weights(model.module.state_dict(), ends_of_epochs[step // STEPS - 1])
    check_usable(model, options)


def test_a_state_that_is_not_finite_is_never_saved(make_peaks, at_step, options, tmp_path, same_weights, monkeypatch):
    whole = build("SAILER", make_peaks)
    whole.train(**options)
    with monkeypatch.context() as patch:
        before = TrainingPlan.optimizer_step

        def optimizer_step(plan, *args, **kwargs):
            before(plan, *args, **kwargs)
            if plan.step == 7:
                with torch.no_grad():
                    next(plan.module.parameters()).fill_(np.nan)

        patch.setattr(TrainingPlan, "optimizer_step", optimizer_step)
        with pytest.raises(TrainingError, match="loss of step 8"):
            build("SAILER", make_peaks).train(run_dir=tmp_path, save_every_n_steps=1, **options)
    resumed = build("SAILER", make_peaks)
    resumed.train(run_dir=tmp_path, save_every_n_steps=1, **options)
    assert same_weights(whole.module.state_dict(), resumed.module.state_dict())


def test_ctrl_c_keeps_the_best_weights(model, at_step, options, monkeypatch, same_weights):
    kept = {}
    before = signal.getsignal(signal.SIGINT)

    def press(plan):
        kept.update(weights=plan.keeper.best_weights, epoch=plan.keeper.best_epoch)
        signal.raise_signal(signal.SIGINT)

    at_step(4 * STEPS + 1, press)
    steps = []
    monkeypatch.setattr(
        TrainingPlan, "optimizer_zero_grad", lambda plan, *args: (steps.append(plan.step), args[-1].zero_grad())
    )
    model.train(**options)
    assert max(steps) == 4 * STEPS + 1
    assert kept["epoch"] >= 0
    assert same_weights(model.module.state_dict(), kept["weights"])
    assert model.is_trained
    assert model.history["train_loss"].index.tolist() == [0, 1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is before
    check_usable(model, options)


def test_a_second_ctrl_c_interrupts(model, at_step, options):
    before = signal.getsignal(signal.SIGINT)

    def press_twice(plan):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second Ctrl-C did nothing")

    at_step(4, press_twice)
    with pytest.raises(KeyboardInterrupt):
        model.train(**options)
    assert signal.getsignal(signal.SIGINT) is before
    assert not model.module.training


def test_a_run_that_was_interrupted_goes_on_where_it_was(make_peaks, options, tmp_path, same_weights, monkeypatch):
    whole = build("SAILER", make_peaks)
    whole.train(**options)
    model = build("SAILER", make_peaks)
    with monkeypatch.context() as patch:
        before = TrainingPlan.training_step

        def press(plan, *args):
            if plan.step == 7:
                signal.raise_signal(signal.SIGINT)
            return before(plan, *args)

        patch.setattr(TrainingPlan, "training_step", press)
        model.train(run_dir=tmp_path, **options)
    assert len(model.history["train_loss"]) == 2
    resumed = build("SAILER", make_peaks)
    resumed.train(run_dir=tmp_path, **options)
    assert same_weights(whole.module.state_dict(), resumed.module.state_dict())
    assert resumed.history["train_loss"].equals(whole.history["train_loss"])


def train_until_interrupted(folder):
    """Train for a long time; the parent sends SIGINT."""
    shared = runpy.run_path(CONFTEST)
    model = build("SAILER", shared["peaks"])
    before = TrainingPlan.on_train_epoch_end

    def patched(plan):
        before(plan)
        Path(folder, "epoch").touch()
        time.sleep(0.05)

    TrainingPlan.on_train_epoch_end = patched
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model.train(**({"max_epochs": 10_000, "plan_kwargs": shared["FLAT"]} | shared["QUIET"]))
    model.save(Path(folder, "model"))


def test_ctrl_c_from_outside_ends_a_training_well(child, tmp_path, make_peaks):
    process = child(train_until_interrupted, str(tmp_path))
    deadline = time.monotonic() + 120
    while not (tmp_path / "epoch").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 0, process.text
    model = epivi.SAILER.load(tmp_path / "model", adata=False)
    assert model.is_trained
    assert 0 < len(model.history["train_loss"]) < 10_000


@pytest.mark.parametrize("step", [1, 2 * STEPS])
def test_a_full_gpu_leaves_the_model_intact(model, at_step, options, ends_of_epochs, same_weights, step):
    before = copy_weights(model.module)

    def fill(plan):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    at_step(step, fill)
    with pytest.raises(
        TrainingError, match=r"out of memory at batch_size=12.*intact, on the CPU.*batch_size=6"
    ) as caught:
        model.train(**options)
    assert isinstance(caught.value.__cause__, torch.cuda.OutOfMemoryError)
    assert same_weights(model.module.state_dict(), ends_of_epochs[1] if step > STEPS else before)
    assert model.device.type == "cpu"
    assert not model.module.training
    assert model.is_trained == (step > STEPS)
