"""Training: repeatable, resumed exactly, within its budget, and better than the frequency of genes."""

from __future__ import annotations

import signal as signals

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import epivi
from epivi import _keys as keys
from epivi._errors import CheckpointError, DataError
from epivi.data.tokens import balanced_sample, name_keys
from epivi.train.plan import TrainingPlan


def test_one_seed_gives_bitwise_one_model(simulated, make, learn, same_weights, global_state):
    before = global_state()
    first, second = (learn(make(simulated.copy())) for _ in range(2))
    assert same_weights(first, second)
    assert first.history["train_loss"].equals(second.history["train_loss"])
    np.testing.assert_array_equal(first.get_latent_representation(), second.get_latent_representation())
    assert global_state() == before
    assert not same_weights(first, learn(make(simulated.copy()), seed=5))
    assert not same_weights(make(simulated.copy()), make(simulated.copy(), seed=2))


def test_the_number_of_workers_changes_nothing(simulated, make, learn, same_weights):
    first = learn(make(simulated.copy()))
    assert same_weights(first, learn(make(simulated.copy()), num_workers=1))


def test_training_lowers_the_loss_and_beats_the_frequency_of_genes(one_thread, make, learn):
    # programs of two types, each with genes of its own: the peaks tell more than the frequencies
    mdata = epivi.simulate.linked_multiome(
        120, n_types=2, n_peaks=60, n_genes=16, within_sd=0.2, mean_counts=2.0, mean_open=0.4, seed=4
    )
    model = make(mdata, setup={"batch_key": None})
    learn(model, 40, lr=5e-3, early_stopping=False, train_size=0.8)
    history = {key: table.to_numpy()[:, 0] for key, table in model.history.items()}
    assert all(np.isfinite(values).all() for values in history.values())
    assert history["validation_loss"][-1] < history["gene_frequency_loss_validation"][-1] - 0.02
    assert history["balanced_accuracy_validation"][-1] > 0.6


def test_the_baseline_of_the_history_against_a_hand_computation(simulated, make, learn):
    model = learn(make(simulated.copy()), train_size=0.7)
    y = simulated["rna"].X.toarray() > 0
    frequency = (y.sum(0) + 0.5) / (len(y) + 1)
    rows = np.asarray(model.validation_indices)
    matrix = sparse.csr_matrix(y[rows].astype(float))
    genes, is_expressed = balanced_sample(
        matrix.indptr, matrix.indices, 20, name_keys(simulated.obs_names[rows]), 32, seed=1, draw=0
    )
    losses = []
    for cell, row in enumerate(rows):
        n = y[row].sum()
        odds = frequency / (1 - frequency) * (20 - n) / n
        for gene, truth in zip(genes[cell], is_expressed[cell], strict=True):
            if gene >= 0:
                losses.append(-np.log(odds[gene] / (1 + odds[gene]) if truth else 1 / (1 + odds[gene])))
    # 18 cells are read at once (16), then 2: pairs of a minibatch weigh alike, minibatches by their cells
    found = model.history["gene_frequency_loss_validation"].to_numpy()[0, 0]
    assert found == pytest.approx(np.mean(losses), abs=0.02)
    whole = learn(make(simulated.copy()), train_size=0.7, batch_size=60)
    found = whole.history["gene_frequency_loss_validation"].to_numpy()[0, 0]
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def pressed(monkeypatch, at):
    """Press Ctrl-C in a step."""
    before = TrainingPlan.training_step

    def press(plan, *args):
        if plan.step == at:
            signals.raise_signal(signals.SIGINT)
        return before(plan, *args)

    monkeypatch.setattr(TrainingPlan, "training_step", press)


@pytest.mark.parametrize(("task", "at"), [("pretraining", 2), ("pretraining", 5), ("batch_correction", 4)])
def test_an_interrupted_run_goes_on_where_it_was(simulated, make, learn, same_weights, tmp_path, monkeypatch, task, at):
    options = {"save_every_n_steps": 1, "early_stopping": False, "token_budget": 500}
    whole = learn(make(simulated.copy(), task=task), 3, **options)
    with monkeypatch.context() as patch:
        pressed(patch, at)
        first = learn(make(simulated.copy(), task=task), 3, run_dir=tmp_path / "run", **options)
    assert first.is_interrupted_
    resumed = learn(make(simulated.copy(), task=task), 3, run_dir=tmp_path / "run", **options)
    assert same_weights(whole, resumed)
    assert resumed.history["train_loss"].equals(whole.history["train_loss"])


def test_a_run_with_another_split_or_budget_is_not_resumed(simulated, make, learn, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        pressed(patch, 1)
        learn(make(simulated.copy()), run_dir=tmp_path / "run", save_every_n_steps=1)
    with pytest.raises(CheckpointError, match="token_budget"):
        learn(make(simulated.copy()), run_dir=tmp_path / "run", token_budget=900)
    with pytest.raises(CheckpointError, match="split_key"):
        learn(make(simulated.copy()), run_dir=tmp_path / "run", split_key="batch")


def test_half_precision_and_accumulated_gradients_give_finite_weights(simulated, make, learn, same_weights):
    full = learn(make(simulated.copy()), accumulate_grad_batches=2)
    half = learn(make(simulated.copy()), accumulate_grad_batches=2, precision="bf16-mixed")
    for model in (full, half):
        assert all(torch.isfinite(value).all() for value in model.module.state_dict().values())
        assert all(value.dtype != torch.bfloat16 for value in model.module.state_dict().values())
    assert not same_weights(full, half)
    assert not same_weights(full, learn(make(simulated.copy())))
    np.testing.assert_allclose(half.history["train_loss"].to_numpy(), full.history["train_loss"].to_numpy(), rtol=0.05)


def test_groups_are_not_torn_apart(mdata, make, learn):
    mdata.obs["donor"] = [f"d{i % 6}" for i in range(60)]
    model = learn(make(mdata), split_key="donor", train_size=0.7)
    donors = [set(mdata.obs["donor"].iloc[rows]) for rows in (model.train_indices, model.validation_indices)]
    assert [len(part) for part in donors] == [4, 2]
    assert not donors[0] & donors[1]
    with pytest.raises(DataError, match="split_key='doner' is no column of obs"):
        learn(make(mdata), split_key="doner")


@pytest.mark.parametrize("token_budget", [60, 10**6])
def test_minibatches_keep_to_the_budget(mdata, make, learn, monkeypatch, token_budget):
    shapes = []
    before = TrainingPlan.training_step

    def step(plan, batch, at):
        shapes.append((batch[keys.BATCH_TOKENS].shape, batch[keys.BATCH_ROWS].tolist()))
        return before(plan, batch, at)

    monkeypatch.setattr(TrainingPlan, "training_step", step)
    model = learn(make(mdata), token_budget=token_budget)
    seen = [row for _, rows in shapes for row in rows]
    assert sorted(seen) == sorted(model.train_indices)
    assert all(b <= 16 and (b * t <= token_budget or b == 1) for (b, t), _ in shapes)
    assert len(shapes) >= (54 if token_budget == 60 else 4) // 2


def test_epochs_draw_other_genes_and_peaks(mdata, make, learn, monkeypatch):
    drawn = {}
    before = TrainingPlan.training_step

    def step(plan, batch, at):
        lengths = batch[keys.BATCH_LENGTH].tolist()
        for cell, row in enumerate(batch[keys.BATCH_ROWS].tolist()):
            tokens = tuple(batch[keys.BATCH_TOKENS][cell, : lengths[cell]].tolist())
            drawn.setdefault(row, []).append((tokens, tuple(batch[keys.BATCH_GENES][cell].tolist())))
        return before(plan, batch, at)

    monkeypatch.setattr(TrainingPlan, "training_step", step)
    learn(make(mdata, max_peaks=6, max_genes=4), 2)
    assert all(len({tokens for tokens, _ in draws}) == 2 for draws in drawn.values())
    assert sum(len({genes for _, genes in draws}) == 2 for draws in drawn.values()) > 0.9 * len(drawn)


def test_small_batches_are_read_more_often_for_batch_correction(mdata, make):
    mdata.obs["batch"] = pd.Categorical(["big"] * 50 + ["small"] * 7 + ["tiny"] * 3)
    model = make(mdata, task="batch_correction")
    rows = model._balanced(np.arange(60), 0)
    assert [(rows < 50).sum(), ((rows >= 50) & (rows < 57)).sum(), (rows >= 57).sum()] == [50, 50, 30]
    # as evenly as can be: 50 = 7 * 7 + 1
    counts = np.bincount(rows)
    assert set(counts[:50]) == {1}
    assert sorted(counts[50:57]) == [7] * 6 + [8]
    assert set(counts[57:]) == {10}
    np.testing.assert_array_equal(rows, model._balanced(np.arange(60), 0))
    plain = make(mdata, task="annotation")
    np.testing.assert_array_equal(plain._balanced(np.arange(60), 0), np.arange(60))


def test_the_history_tells_of_no_terms_that_the_loss_does_not_have(pretrained):
    names = set(pretrained.history)
    assert {"train_loss", "validation_loss", "gene_loss_train", "balanced_accuracy_validation"} <= names
    assert not [name for name in names if name.startswith(("elbo", "kl_"))]
