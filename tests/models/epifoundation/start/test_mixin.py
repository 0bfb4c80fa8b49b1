"""Where weights start: peaks at LSI, genes at their means, readouts at a ridge regression."""

from __future__ import annotations

import mudata as md
import numpy as np
import pytest
import torch
from scipy import sparse

import epivi
from epivi._errors import ConfigError
from epivi.models.epifoundation.heads.local import near_links
from epivi.models.epifoundation.start.near import Backfit, Cells
from epivi.models.epifoundation.start.readout import Moments, reduced_rank_ridge


def test_peaks_start_where_their_cells_lie(simulated, make):
    one_batch = {"batch_key": None, "labels_key": None}
    plain, started = (make(simulated.copy(), setup=one_batch, peak_init=init) for init in ("random", "lsi"))
    moved = (started.module.encoder.peaks.table.weight - plain.module.encoder.peaks.table.weight).detach().numpy()
    expected = epivi.pp.reference.peak_centroids(simulated["atac"].copy(), n_comps=32, seed=1)
    assert not moved[:2].any()
    np.testing.assert_allclose(moved[2:, : expected.shape[1]], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["mudata", "anndata"])
def test_peaks_start_within_batches_whatever_the_order_of_the_rows(kind):
    mdata = epivi.simulate.linked_multiome(150, n_peaks=80, n_genes=20, n_batches=2, batch_effect=1.0, seed=0)
    atac = mdata["atac"]
    batch = mdata.obs["batch"].astype(str).to_numpy()
    if kind == "mudata":
        # peaks in another order of cells than mdata.obs
        order = np.random.default_rng(0).permutation(150)
        data = md.MuData({"atac": atac[order].copy(), "rna": mdata["rna"].copy()})[mdata.obs_names].copy()
        data.obs["batch"] = batch
        setup = epivi.EpiFoundation.setup_mudata
    else:
        data = atac.copy()
        data.obs["batch"] = batch
        setup = epivi.EpiFoundation.setup_anndata
    setup(data, batch_key="batch")
    plain, started = (epivi.EpiFoundation(data, size="test", peak_init=init, seed=1) for init in ("random", "lsi"))
    moved = (started.module.encoder.peaks.table.weight - plain.module.encoder.peaks.table.weight).detach().numpy()
    expected = epivi.pp.reference.peak_centroids(atac.copy(), n_comps=32, batch_n=batch, seed=1)
    # the decomposition tells components up to their sign
    found = moved[2:, : expected.shape[1]]
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-2)


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


NEAR = {"task": "expression", "linear_readout": True, "local_readout_bp": 50_000}


def unplaced(mdata, **changes):
    """Genes at other places, or at none."""
    var = mdata["rna"].var
    mdata["rna"].var = var.drop(columns=["start", "end"]) if not changes else var.assign(**changes)
    return mdata


def test_expression_starts_at_vectors_and_near_peaks_in_turns(simulated, make, learn, caplog):
    model = make(simulated.copy(), **NEAR)
    with pytest.warns(UserWarning, match="trained"):
        latent = model.get_latent_representation()
    with caplog.at_level("INFO", logger="epivi"):
        learn(model, plan_kwargs={"lr": 1e-12, "weight_decay": 0.0}, train_size=0.7)
    y = simulated["rna"].X.toarray()
    values = np.log1p(1e4 * y / y.sum(1, keepdims=True))
    z = model.module.standardised(torch.from_numpy(latent)).numpy().astype(float)
    peaks = sparse.csc_array((simulated["atac"].X > 0).astype(np.float32))
    links = near_links(*places_of(simulated["atac"]), *places_of(simulated["rna"], bodies=True), window_bp=50_000)
    parts = [
        Cells(z[rows], peaks[rows], sparse.csc_array(values[rows]), values.mean(0), values.std(0))
        for rows in (model.train_indices, model.validation_indices)
    ]
    fit = Backfit(*parts, links).run()
    assert np.isfinite(fit.penalty)
    local = model.module.local
    assert (local.peak.tolist(), local.gene.tolist()) == (links.peak_l.tolist(), links.gene_l.tolist())
    np.testing.assert_allclose(local.weight.detach(), fit.local_l, atol=1e-4)
    np.testing.assert_allclose(local.mean, fit.mean_l, atol=1e-6)
    weight = np.zeros((80, 20))
    weight[links.peak_l, links.gene_l] = fit.local_l
    centred = peaks.toarray() - peaks.toarray()[model.train_indices].mean(0)
    expected = values.mean(0) + values.std(0) * (z @ fit.linear_dn + centred @ weight)
    np.testing.assert_allclose(model.get_normalized_expression(), expected, atol=5e-3)
    assert f"The local readout of {links.peak_l.size} links starts at a ridge regression of penalty" in caplog.text


def places_of(adata, *, bodies=False):
    codes = adata.var["chrom"].astype(str).str.removeprefix("chr").astype(int).to_numpy()
    start, end = adata.var["start"].to_numpy(), adata.var["end"].to_numpy()
    return (codes, start, end) if bodies else (codes, (start + end) // 2)


def test_the_local_readout_tells_what_the_vector_leaves_out(make, learn):
    mdata = epivi.simulate.linked_multiome(500, n_types=3, n_peaks=90, n_genes=30, seed=3)
    train, test = mdata[:400], mdata[400:]
    truth = test["rna"].X.toarray()
    truth = np.log1p(1e4 * truth / truth.sum(1, keepdims=True))
    scores, losses = [], []
    for window_bp in (0, 50_000):
        options = NEAR | {"local_readout_bp": window_bp, "peak_init": "lsi", "max_peaks": 100, "dropout_rate": 0.0}
        model = learn(make(train.copy(), setup={"batch_key": None}, **options), 3, lr=1e-4)
        found = model.get_normalized_expression(test["atac"].copy())
        scores.append(epivi.metrics.expression_scores(truth, found.to_numpy()).summary["pearson"])
        losses.append(model.history["validation_loss"].to_numpy()[:, 0])
    assert scores[1] > scores[0] + 0.05
    # what follows the start keeps what it tells
    assert losses[1].max() < losses[0].min() - 0.05
    assert losses[1][-1] < 1.02 * losses[1][0]
    local, links = model.module.local, mdata.uns["simulation"]["links"]
    pairs = {*zip(links["peak_index"], links["gene_index"], strict=True)}
    is_true = np.array([pair in pairs for pair in zip(local.peak.tolist(), local.gene.tolist(), strict=True)])
    weight = local.weight.detach().numpy()
    assert is_true.sum() == 90
    assert weight[is_true].mean() > 4 * np.abs(weight[~is_true]).mean()


def test_where_near_peaks_tell_nothing_there_is_no_local_readout(simulated, make, learn, caplog):
    shuffled = simulated.copy()
    shuffled.mod["rna"].X = simulated["rna"].X[np.random.default_rng(0).permutation(60)]
    options = {"plan_kwargs": {"lr": 1e-12, "weight_decay": 0.0}, "train_size": 0.7}
    with caplog.at_level("INFO", logger="epivi"):
        model = learn(make(shuffled.copy(), **NEAR), **options)
    assert "there is no local readout" in caplog.text
    plain = learn(make(shuffled.copy(), **NEAR | {"local_readout_bp": 0}), **options)
    expected = plain.get_normalized_expression()
    np.testing.assert_allclose(model.get_normalized_expression(), expected, atol=1e-5)
    learn(model, lr=1e-2)
    assert not model.module.local.weight.any()


def test_without_validation_cells_a_tenth_of_the_training_cells_chooses_the_penalty(simulated, make, learn):
    model = learn(make(simulated.copy(), **NEAR), train_size=1.0)
    assert np.isfinite(model.get_normalized_expression()).all(axis=None)
    # of six of 60 cells, chosen by no share of their own
    shares = np.unique(np.round(model.module.local.mean.numpy() * 54, 4))
    np.testing.assert_allclose(shares, np.round(shares), atol=1e-3)


def test_cells_without_expression_do_not_start_the_local_readout(simulated, make, learn):
    partial = md.MuData({"atac": simulated["atac"].copy(), "rna": simulated["rna"][20:].copy()})
    model = make(partial, setup={"batch_key": None, "labels_key": None}, **NEAR)
    cells = model._start_cells(np.random.default_rng(0).permutation(60))
    has_rna = partial.obs_names.isin(simulated.obs_names[20:])
    np.testing.assert_array_equal(cells.open_cp.toarray(), (partial["atac"].X.toarray() > 0)[has_rna])
    np.testing.assert_allclose(cells.units(np.arange(20)).mean(0), 0.0, atol=1e-5)
    learn(model)
    nothing = model._start_cells(np.flatnonzero(~has_rna))
    assert nothing.z_cd.shape == (0, 32)
    assert not model._start_from_near_peaks({"train": np.flatnonzero(~has_rna), "validation": np.array([], int)})


@pytest.mark.parametrize("task", ["pretraining", "annotation"])
def test_other_tasks_have_no_local_readout(simulated, make, task):
    model = make(unplaced(simulated.copy()), task=task, local_readout_bp=50_000)
    assert model.module.local is None


def test_without_places_there_is_none_unless_it_was_asked_for(simulated, make):
    bare = unplaced(simulated.copy())
    small = {"size": "tutorial", "width": 16, "n_heads": 2, "n_layers": 1, "task": "expression", "peak_init": "random"}
    assert make(simulated.copy(), **small).module.local is not None
    assert make(simulated.copy(), **small, local_readout_bp=0).module.local is None
    assert make(bare.copy(), **small).module.local is None
    with pytest.raises(ConfigError, match=r"local_readout_bp=9 needs to know .* columns chrom, start and end"):
        make(bare, **small, local_readout_bp=9)
    other = unplaced(simulated.copy(), chrom="7")
    assert make(other.copy(), **small).module.local is None
    with pytest.raises(ConfigError, match=r"none does \(chromosomes of the genes \['7'\], of the peaks \['chr1'"):
        make(other, **small, local_readout_bp=50_000)
    peaks = simulated.copy()
    peaks["atac"].var = peaks["atac"].var[[]]
    peaks["atac"].var_names = [f"peak_{i}" for i in range(80)]
    with pytest.raises(ConfigError, match="needs to know which peaks lie near a gene"):
        make(peaks, **small, local_readout_bp=50_000)
