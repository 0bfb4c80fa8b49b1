from __future__ import annotations

import logging
import math

import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS

import epivi
from epivi import _keys as keys
from epivi._errors import ConfigError, DataError
from epivi.models.epifoundation.config import EpiFoundationConfig


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
    assert model.config == EpiFoundationConfig.chosen(
        {"n_layers": 1, "max_peaks": 10, "dropout_rate": 0.1}, size="test"
    )
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
    learn(model, 20, lr=5e-3, early_stopping=False)
    loss = model.history["peak_loss_train"].to_numpy()[:, 0]
    np.testing.assert_allclose(loss, model.history["train_loss"].to_numpy()[:, 0])
    # hidden open and closed peaks weigh alike: chance is ln 2, where it begins
    assert loss[0] == pytest.approx(math.log(2), abs=0.02)
    assert loss[-1] < math.log(2) - 0.04


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
        {"linear_readout": True},
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


def test_a_model_of_expression_is_loaded_with_peaks_alone(expressive, simulated, same_weights, tmp_path):
    expressive.save(tmp_path / "model")
    expected = expressive.get_normalized_expression()
    peaks = simulated["atac"].copy()
    loaded = epivi.EpiFoundation.load(tmp_path / "model", peaks)
    assert same_weights(loaded, expressive)
    pd.testing.assert_frame_equal(loaded.get_normalized_expression(), expected)
    query = epivi.EpiFoundation.load_query_data(simulated["atac"].copy(), tmp_path / "model")
    pd.testing.assert_frame_equal(query.get_normalized_expression(), expected)


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


def test_genes_without_bodies_have_their_chromosome_alone(simulated, make):
    bare = simulated.copy()
    bare["rna"].var = bare["rna"].var[["chrom"]]
    some = simulated.copy()
    some["rna"].var = some["rna"].var.assign(start=some["rna"].var["start"].where(np.arange(20) > 2))
    full, half, none = (make(data, positions="genome").module for data in (simulated.copy(), some, bare))
    assert torch.equal(half.genes.position[:3], none.genes.position[:3])
    assert torch.equal(half.genes.position[3:], full.genes.position[3:])
    vectors = none.genes(none.encoder.places)
    expected = none.genes.norm(none.genes.genes(torch.arange(1, 21)) + none.encoder.places(none.genes.chrom, None))
    torch.testing.assert_close(vectors, expected, rtol=0, atol=0)
