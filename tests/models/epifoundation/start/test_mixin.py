"""Where weights start: peaks at LSI, genes at their means, readouts at a ridge regression."""

from __future__ import annotations

import mudata as md
import numpy as np
import pytest
import torch
from scipy import sparse

import epivi
from epivi.models.epifoundation.start.readout import Moments, reduced_rank_ridge


def test_peaks_start_where_their_cells_lie(simulated, make):
    plain, started = (make(simulated.copy(), peak_init=init) for init in ("random", "lsi"))
    moved = (started.module.encoder.peaks.table.weight - plain.module.encoder.peaks.table.weight).detach().numpy()
    expected = epivi.pp.reference.peak_centroids(simulated["atac"].copy(), n_comps=32, seed=1)
    assert not moved[:2].any()
    np.testing.assert_allclose(moved[2:, : expected.shape[1]], expected, atol=1e-5)


def test_vectors_are_told_in_units_of_their_spread_when_training_began(simulated, make, learn):
    model = make(simulated.copy())
    with pytest.warns(UserWarning, match="trained"):
        latent = model.get_latent_representation()
    learn(model, plan_kwargs={"lr": 1e-12, "weight_decay": 0.0})
    own = latent[np.asarray(model.train_indices)]
    told = model.module.standardised(torch.from_numpy(own)).numpy()
    np.testing.assert_allclose(told.mean(0), 0.0, atol=1e-3)
    np.testing.assert_allclose(told.std(0), 1.0, atol=1e-3)
    # a second training keeps what the decoder has learnt with
    before = model.module.standardised(torch.from_numpy(own))
    learn(model, lr=1e-2)
    assert torch.equal(model.module.standardised(torch.from_numpy(own)), before)


def test_expression_starts_at_the_ridge_regression(simulated, make, learn):
    model = make(simulated.copy(), task="expression", linear_readout=True)
    with pytest.warns(UserWarning, match="trained"):
        latent = model.get_latent_representation()
    learn(model, plan_kwargs={"lr": 1e-12, "weight_decay": 0.0}, train_size=0.7)
    y = simulated["rna"].X.toarray()
    values = np.log1p(1e4 * y / y.sum(1, keepdims=True))
    units = (values - values.mean(0)) / values.std(0)
    z = model.module.standardised(torch.from_numpy(latent)).numpy().astype(float)
    parts = [Moments.of([(z[rows], units[rows])]) for rows in (model.train_indices, model.validation_indices)]
    weight, _ = reduced_rank_ridge(*parts)
    found = model.get_normalized_expression().to_numpy()
    np.testing.assert_allclose(found, values.mean(0) + values.std(0) * (z @ weight), atol=5e-3)


def test_genes_are_told_in_units_of_their_spread(simulated, make):
    partial = md.MuData({"atac": simulated["atac"].copy(), "rna": simulated["rna"][20:].copy()})
    y = simulated["rna"].X.toarray()[20:]
    values = np.log1p(1e4 * y / y.sum(1, keepdims=True))
    module = make(partial, setup={"batch_key": None, "labels_key": None}, task="expression").module
    np.testing.assert_allclose(module.gene_mean.numpy(), values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(module.gene_sd.numpy(), values.std(0), rtol=1e-4)
    # a gene that never varies has a least spread
    flat = partial.copy()
    rna = flat["rna"].X.toarray()
    rna[:, 3] = 0
    flat.mod["rna"].X = sparse.csr_matrix(rna)
    module = make(flat, setup={"batch_key": None, "labels_key": None}, task="expression").module
    assert float(module.gene_mean[3]) == 0.0
    assert float(module.gene_sd[3]) == pytest.approx(0.01 * float(module.gene_sd.max()))
    levels = make(
        partial, setup={"batch_key": None, "labels_key": None}, task="expression", expression_target="level"
    ).module
    assert torch.equal(levels.gene_sd, torch.ones(20))


def test_pretraining_starts_at_a_linear_discriminant(simulated, make, learn):
    model = make(simulated.copy(), linear_readout=True)
    with pytest.warns(UserWarning, match="trained"):
        latent = model.get_latent_representation()
    learn(model, plan_kwargs={"lr": 1e-12, "weight_decay": 0.0}, train_size=0.7)
    y = (simulated["rna"].X.toarray() > 0).astype(float)
    np.testing.assert_allclose(model.module.gene_mean.numpy(), y.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.module.gene_sd.numpy(), y.std(0), rtol=1e-4)
    z = model.module.standardised(torch.from_numpy(latent)).numpy().astype(float)
    told = (y - y.mean(0)) / y.std(0)
    parts = [Moments.of([(z[rows], told[rows])]) for rows in (model.train_indices, model.validation_indices)]
    weight, _ = reduced_rank_ridge(*parts)
    share = (y.sum(0) + 0.5) / 61
    odds = np.log(share / (1 - share))
    # of a share p + d the logit is about logit(p) + d / (p (1 - p))
    expected = odds - odds.mean() + z @ (weight / y.std(0))
    found = model.get_normalized_expression().to_numpy().astype(float)
    np.testing.assert_allclose(np.log(found / (1 - found)), expected, atol=5e-3)


def test_without_validation_cells_the_start_is_chosen_by_the_training_cells(simulated, make, learn):
    model = learn(make(simulated.copy(), task="expression", linear_readout=True), train_size=1.0)
    assert model.module.readout.weight.any()
    assert np.isfinite(model.get_normalized_expression()).all(axis=None)


def test_a_trained_model_is_not_started_again(simulated, make, learn):
    model = learn(make(simulated.copy(), task="expression", linear_readout=True))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    query = epivi.EpiFoundation.load_query_data(simulated.copy(), model)
    learn(query, plan_kwargs={"lr": 1e-12, "weight_decay": 0.0})
    for name, value in query.module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_cells_without_expression_do_not_enter_the_start(simulated, make, learn):
    partial = md.MuData({"atac": simulated["atac"].copy(), "rna": simulated["rna"][20:].copy()})
    model = make(partial, setup={"batch_key": None, "labels_key": None}, task="expression", linear_readout=True)
    pairs = [*model._standard_pairs(np.arange(60))]
    assert sum(len(z) for z, _ in pairs) == sum(len(y) for _, y in pairs) == 40
    np.testing.assert_allclose(np.concatenate([y for _, y in pairs]).mean(0), 0.0, atol=1e-5)
    learn(model)
    assert np.isfinite(model.get_normalized_expression()).all(axis=None)
