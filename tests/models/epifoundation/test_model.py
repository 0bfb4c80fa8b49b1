from __future__ import annotations

import logging
import math
import signal as signals

import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS

import epivi
from epivi import _keys as keys
from epivi._errors import CheckpointError, ConfigError, DataError
from epivi.data.tokens import balanced_sample, name_keys
from epivi.models.epifoundation.config import EpiFoundationConfig
from epivi.train.plan import TrainingPlan


def test_data_that_were_never_set_up_work_with_the_defaults(mdata, learn, caplog):
    with caplog.at_level(logging.WARNING, logger="epivi"):
        model = epivi.EpiFoundation(mdata, size="test")
    assert "EpiFoundation.setup_mudata is called with its defaults" in caplog.text
    described = (
        "EpiFoundation with task: pretraining, peaks: 80, genes: 20, width: 32, layers: 2, batches: 1, classes: 0"
    )
    assert model._model_summary_string.startswith(described)
    learn(model)
    assert model.get_latent_representation().shape == (60, 32)


def test_a_model_needs_data():
    with pytest.raises(ConfigError, match="EpiFoundation needs data"):
        epivi.EpiFoundation()


def test_sizes_and_choices_meet_in_the_configuration(mdata, make):
    model = make(mdata, n_layers=1, max_peaks=10)
    assert model.config == EpiFoundationConfig.chosen({"n_layers": 1, "max_peaks": 10}, size="test")
    assert len(model.module.encoder.transformer.layers) == 1
    assert model.gene_names.tolist() == list(mdata["rna"].var_names)
    assert model.chromosomes == ["chr1", "chr2", "chr3", "chr4"]


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({"size": "small"}, "size"),
        ({"width": 33}, "n_heads=4 does not divide width=33"),
        ({"seed": -1}, "seed=-1"),
        ({"masked_peak_weight": -1.0}, "masked_peak_weight"),
        ({"peak_identity": False}, "take positions='genome'"),
    ],
)
def test_choices_that_are_not_valid_are_refused(mdata, make, choice, match):
    with pytest.raises(ConfigError, match=match):
        make(mdata, **choice)


def test_an_unknown_choice_is_an_unexpected_argument(mdata, make):
    with pytest.raises(TypeError, match="n_layer"):
        make(mdata, n_layer=2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "expression"}, "needs expression: set up a MuData"),
        ({"task": "annotation"}, "at least two classes, found 0"),
        ({"masked_peak_weight": 0.0}, "needs the masked-peak objective"),
    ],
)
def test_a_task_needs_its_data(peaks, make, options, match):
    with pytest.raises(ConfigError, match=match):
        make(peaks, setup={"labels_key": None}, **options)


def test_one_class_is_too_few(mdata, make):
    mdata.obs["cell_type"] = pd.Categorical(["a"] * 30 + ["none"] * 30)
    with pytest.raises(ConfigError, match="at least two classes, found 1"):
        make(mdata, setup={"unlabeled_category": "none"}, task="annotation")


def test_peaks_without_positions_have_no_chromosomes(mdata, make, learn, caplog):
    atac = mdata["atac"]
    atac.var = pd.DataFrame(index=[f"p{i}" for i in range(80)])
    with caplog.at_level(logging.WARNING, logger="epivi"):
        model = make(md.MuData({"atac": atac, "rna": mdata["rna"]}))
    assert "The peaks have no positions" in caplog.text
    assert model.config.positions == "none"
    assert sum(p.numel() for p in model.module.encoder.places.parameters()) == 0
    learn(model)
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_peak_embeddings().to_numpy()).all()
    with pytest.raises(DataError, match="peaks of the model have no positions"):
        model.project_peaks(mdata["atac"].copy())
    with pytest.raises(ConfigError, match="positions='genome' needs peaks with positions"):
        make(model.adata.copy(), positions="genome")


def test_one_chromosome_is_enough(mdata, make, learn):
    on_first = mdata["atac"].var["chrom"].astype(str).to_numpy() == "chr1"
    atac = mdata["atac"][:, on_first].copy()
    one = md.MuData({"atac": atac, "rna": mdata["rna"]})
    model = learn(make(one, setup={"empty_cells": "zero"}, positions="genome"))
    assert model.chromosomes == ["chr1"]
    assert model.module.encoder.places.chromosomes.table.num_embeddings == 3
    # genes of other chromosomes are on an unknown contig
    code = np.where(mdata["rna"].var["chrom"].astype(str) == "chr1", 1, 0)
    np.testing.assert_array_equal(model.module.genes.chrom.numpy(), code)
    assert np.isfinite(model.get_latent_representation()).all()


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
    assert history["train_loss"][0] == pytest.approx(math.log(2), abs=0.1)
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


def test_cells_without_rna_are_read_and_not_scored(mdata, make, learn):
    partial = md.MuData({"atac": mdata["atac"], "rna": mdata["rna"][20:].copy()})
    for key in ("batch", "cell_type"):
        partial.obs[key] = mdata.obs[key].reindex(partial.obs_names)
    model = learn(make(partial))
    batch = model._encoding(partial, targets=True)(model.adata_manager.create_torch_dataset()[np.arange(60)])
    has_rna = partial.obs_names.isin(mdata["rna"].obs_names[20:])
    np.testing.assert_array_equal((batch[keys.BATCH_GENES] >= 0).any(1).numpy(), has_rna)
    assert has_rna.sum() == 40
    assert np.isfinite(model.get_latent_representation()).all()
    assert model.get_normalized_expression().shape == (60, 20)


def test_a_cell_that_expresses_all_genes_or_more_than_half_trains(mdata, make, learn):
    y = mdata["rna"].X.toarray()
    y[:20] = 1
    y[20:40, :15] = 1
    mdata.mod["rna"].X = sparse.csr_matrix(y)
    model = learn(make(mdata))
    assert np.isfinite(model.history["train_loss"].to_numpy()).all()
    mdata.mod["rna"].X = sparse.csr_matrix(np.ones_like(y))
    assert learn(make(mdata)).history["train_loss"].to_numpy()[0, 0] == 0.0


def test_unlabeled_cells_are_no_class_and_are_not_scored(mdata, make, learn):
    mdata.obs["cell_type"] = pd.Categorical(["a"] * 20 + ["?"] * 20 + ["b"] * 20)
    model = make(mdata, setup={"unlabeled_category": "?"}, task="annotation")
    assert model.classes == ["a", "b"]
    batch = model._encoding(mdata, targets=True)(model.adata_manager.create_torch_dataset()[np.arange(60)])
    assert batch[keys.BATCH_CLASS].tolist() == [0] * 20 + [-1] * 20 + [1] * 20
    learn(model)
    assert set(model.predict_labels()) <= {"a", "b"}


def test_peaks_alone_are_pretrained_on_hidden_peaks(peaks, make, learn):
    model = make(peaks)
    assert model.config.masked_peak_weight == 1.0
    learn(model, 12, lr=5e-3, early_stopping=False)
    loss = model.history["peak_loss_train"].to_numpy()[:, 0]
    np.testing.assert_allclose(loss, model.history["train_loss"].to_numpy()[:, 0])
    # as often open as closed: chance is ln 2, and peaks differ in how often they are open
    assert loss[0] == pytest.approx(math.log(2), abs=0.15)
    assert loss[-1] < loss[0] - 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"peak_dim": 8},
        {"positions": "genome"},
        {"positions": "genome", "peak_identity": False},
        {"masked_peak_weight": 0.5},
        {"batch_adversary": 0.1, "count_levels": True},
        {"peak_init": "lsi"},
        {"task": "expression", "expression_target": "level", "max_genes": 6},
    ],
)
def test_options_train_save_and_read_the_same_again(simulated, make, learn, same_weights, tmp_path, options):
    model = learn(make(simulated.copy(), **options))
    assert np.isfinite(model.history["train_loss"].to_numpy()).all()
    model.save(tmp_path / "model")
    loaded = epivi.EpiFoundation.load(tmp_path / "model", simulated.copy())
    assert loaded.config == model.config
    assert same_weights(loaded, model)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())


def test_the_factorised_table_has_the_rank_asked(mdata, make):
    model = make(mdata, peak_dim=4)
    table = model.module.encoder.peaks
    assert table.table.weight.shape == (82, 4)
    assert sum(p.numel() for p in table.parameters()) == 82 * 4 + 4 * 32 + 2 * 32


def test_peaks_start_where_their_cells_lie(simulated, make):
    plain, started = (make(simulated.copy(), peak_init=init) for init in ("random", "lsi"))
    moved = (started.module.encoder.peaks.table.weight - plain.module.encoder.peaks.table.weight).detach().numpy()
    expected = epivi.pp.reference.peak_centroids(simulated["atac"].copy(), n_comps=32, seed=1)
    assert not moved[:2].any()
    np.testing.assert_allclose(moved[2:, : expected.shape[1]], expected, atol=1e-5)


def test_places_of_genes_and_peaks_reach_the_network(pretrained, simulated):
    codes = {f"chr{i}": i for i in range(1, 5)}
    rna = simulated["rna"].var
    np.testing.assert_array_equal(pretrained.module.genes.chrom.numpy(), rna["chrom"].astype(str).map(codes))
    np.testing.assert_array_equal(pretrained.module.genes.position.numpy(), (rna["start"] + rna["end"]) // 2)
    y = simulated["rna"].X.toarray() > 0
    share = (y.sum(0) + 0.5) / 61
    np.testing.assert_allclose(pretrained.module.gene_log_odds.numpy(), np.log(share / (1 - share)), rtol=1e-5)


def test_saved_models_need_no_data_and_read_any(pretrained, simulated, same_weights, tmp_path):
    pretrained.save(tmp_path / "model")
    loaded = epivi.EpiFoundation.load(tmp_path / "model", adata=False)
    assert same_weights(loaded, pretrained)
    expected = pretrained.get_latent_representation()
    for data in (simulated.copy(), simulated["atac"].copy()):
        np.testing.assert_array_equal(loaded.get_latent_representation(data), expected)
    np.testing.assert_array_equal(
        loaded.get_normalized_expression(simulated["atac"].copy()), pretrained.get_normalized_expression()
    )
    assert loaded.gene_names.tolist() == pretrained.gene_names.tolist()
    assert loaded.classes == pretrained.classes
    with pytest.raises(ConfigError, match="loaded without data"):
        loaded.get_latent_representation()
    with pytest.raises(ConfigError, match="loaded without data"):
        loaded.finetune("expression")


def test_a_model_is_saved_with_its_data(pretrained, tmp_path):
    pretrained.save(tmp_path / "model", save_anndata=True)
    loaded = epivi.EpiFoundation.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.get_latent_representation(), pretrained.get_latent_representation())


@pytest.mark.parametrize("key", ["batch", "cell_type"])
def test_data_with_other_categories_are_not_attached_to_saved_weights(pretrained, annotated, mdata, tmp_path, key):
    model = pretrained if key == "batch" else annotated
    model.save(tmp_path / "model")
    mdata.obs[key] = pd.Categorical(["new"] * 30 + [str(mdata.obs[key].iloc[0])] * 30)
    with pytest.raises(DataError, match=rf"obs\['{key}'\] holds \['new'\], unknown to the trained model"):
        epivi.EpiFoundation.load(tmp_path / "model", mdata)


def test_the_registry_is_complete_after_loading(pretrained, tmp_path):
    pretrained.save(tmp_path / "model")
    loaded = epivi.EpiFoundation.load(tmp_path / "model", adata=False)
    for key in (REGISTRY_KEYS.X_KEY, keys.BATCH_RNA):
        one, other = pretrained._field_state(key), loaded._field_state(key)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(np.asarray(one[name], dtype=str), np.asarray(other[name], dtype=str))
