from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.special import logsumexp

import epivi
from epivi._errors import ConfigError, DataError
from epivi.data.tracks.grids import TrackGrid
from epivi.data.tracks.reader import TracksReader

CHANNELS = ["H3K27ac", "ATAC", "H3K27me3"]


@pytest.fixture(scope="module")
def imputers(simulated_missing, fit):
    """Models trained on cells of which 40 % lack ATAC."""
    models = {}
    for kind in ("ConvNetVAE", "FCVAE"):
        options = {"kernel_size": 5, "stride": 5, "n_filters": (4,)} if kind == "ConvNetVAE" else {}
        data = simulated_missing.copy()
        models[kind] = fit(getattr(epivi, kind)(data, n_latent=4, n_hidden=16, seed=1, **options), 3, batch_size=16)
    return models


@pytest.fixture
def imputer(imputers, kind):
    return imputers[kind]


def per_channel(matrix, n_bins=120):
    return matrix.reshape(len(matrix), -1, n_bins).sum(2)


def test_latents_are_the_means_of_the_posterior(trained, entries, forward):
    outputs, _, _ = forward(trained.module, entries(trained))
    mean, variance = trained.get_latent_representation(return_dist=True)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, outputs["mean_bd"].detach(), atol=1e-6)
    np.testing.assert_allclose(variance, outputs["logvar_bd"].detach().exp(), rtol=1e-5)
    assert trained.get_latent_representation(indices=[]).shape == (0, 4)
    some = trained.get_latent_representation(indices=np.arange(60) == 7)
    np.testing.assert_allclose(some, mean[[7]], atol=1e-6)


def test_modalities_that_are_not_chosen_are_not_read(trained, counts):
    other = trained.adata.copy()
    dense = counts(other)
    dense[:, [0, 2]] = 7
    other.obsm["tracks"] = dense
    expected = trained.get_latent_representation(modality="ATAC")
    assert np.array_equal(trained.get_latent_representation(other, modality=["ATAC"]), expected)
    everything = trained.get_latent_representation(modality=CHANNELS)
    assert np.array_equal(everything, trained.get_latent_representation())


def test_a_cell_without_the_chosen_modality_is_named(imputer):
    lacking = np.flatnonzero(~imputer.adata.obsm["tracks_mask"][:, 1])
    name = imputer.adata.obs_names[lacking[2]]
    with pytest.raises(DataError, match=rf"Cell '{name}' has none of the modalities \['ATAC'\]"):
        imputer.get_latent_representation(modality="ATAC", indices=[0, *lacking[2:]])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.get_latent_representation(modality="ATCA"), "modality='ATCA' is no modality.*Did you mean 'ATAC'"),
        (lambda m: m.get_latent_representation(modality=["ATAC", "ATAC"]), "at least one modality, each once"),
        (lambda m: m.get_latent_representation(modality=[]), "at least one modality, each once"),
        (lambda m: m.get_normalized_expression(modality="x"), "modality='x' is no modality"),
        (
            lambda m: m.get_normalized_expression(transform_batch="batch_9"),
            "is no batch of the model. Did you mean 'batch_1'",
        ),
        (lambda m: m.get_normalized_expression(region_list="chr9:0-10"), r"\['chr9:0-10'\] overlaps no bin"),
        (lambda m: m.get_normalized_expression(region_list="chr1"), "The region 'chr1' cannot be read"),
        (lambda m: m.get_normalized_expression(library_size="latent"), "'mean', 'observed' or a positive number"),
        (lambda m: m.get_normalized_expression(library_size=0), "library_size=0"),
        (lambda m: m.get_normalized_expression(threshold=-1), "threshold=-1"),
        (lambda m: m.get_marginal_ll(n_mc_samples=0), "n_mc_samples=0"),
        (lambda m: m.get_elbo(batch_size=0), "batch_size=0"),
        (lambda m: m.get_reconstruction_error(indices=[60]), "holds 60; the data have 60 cells"),
        (lambda m: m.get_normalized_expression(library_size=np.ones(3)), r"library_size=array.*a number above 0"),
        (lambda m: m.get_normalized_expression(modality=1), "modality=.1.? must be a name or a list of names, of"),
        (lambda m: m.get_latent_representation(modality=["ATAC", 1]), "must be a name or a list of names, of"),
        (lambda m: m.impute_modality(1), "modality=1 is no name. Give the name of one modality, of .*'ATAC'"),
        (lambda m: m.impute_modality(["ATAC"]), r"modality=\['ATAC'\] is no name"),
        (lambda m: m.impute_modality("ATCA"), "Did you mean 'ATAC'"),
        (lambda m: m.impute_modality("ATAC", cells="some"), "cells='some'.*'missing', 'all'"),
        (lambda m: m.impute_modality("ATAC"), "has not learnt to do without.*modality_dropout_rate=0.3"),
        (lambda m: m.impute_modality("ATAC", library_size="observed"), "'observed' does not exist for an absent"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(trained, call, match):
    with pytest.raises(ConfigError, match=match):
        call(trained)


def test_tracks_are_shares_times_the_library(trained, counts, entries, forward):
    shares = trained.get_normalized_expression(return_numpy=True)
    np.testing.assert_allclose(per_channel(shares), 1.0, rtol=1e-5)
    _, hidden, _ = forward(trained.module, entries(trained))
    logits = torch.cat(trained.module.logits(hidden), 1).view(60, 3, 120)
    np.testing.assert_allclose(shares, torch.softmax(logits, 2).detach().flatten(1), rtol=1e-4)
    totals = counts(trained.adata).sum(2)
    observed = trained.get_normalized_expression(library_size="observed", return_numpy=True)
    np.testing.assert_allclose(per_channel(observed), totals, rtol=1e-5)
    mean = trained.get_normalized_expression(library_size="mean", return_numpy=True)
    np.testing.assert_allclose(per_channel(mean), np.tile(totals.mean(0), (60, 1)), rtol=1e-5)
    number = trained.get_normalized_expression(library_size=1e4, return_numpy=True)
    np.testing.assert_allclose(number, shares * 1e4, rtol=1e-5)


def test_the_mean_library_is_that_of_the_cells_that_have_the_modality(imputer, counts):
    mask = imputer.adata.obsm["tracks_mask"]
    totals = counts(imputer.adata).sum(2)
    expected = (totals * mask).sum(0) / mask.sum(0)
    tracks = imputer.get_normalized_expression(library_size="mean", return_numpy=True)
    np.testing.assert_allclose(per_channel(tracks), np.tile(expected, (60, 1)), rtol=1e-5)
    observed = imputer.get_normalized_expression(library_size="observed", return_numpy=True)
    np.testing.assert_allclose(per_channel(observed), totals * mask, rtol=1e-5)


def test_tracks_come_with_their_cells_channels_and_bins(trained):
    tracks = trained.get_normalized_expression(indices=[5, 2])
    bins = trained.adata.uns["tracks"]["bins"]
    assert tracks.obs_names.tolist() == trained.adata.obs_names[[5, 2]].tolist()
    assert tracks.var_names[120] == f"ATAC|{bins.index[0]}"
    assert tracks.var["channel"].tolist() == np.repeat(CHANNELS, 120).tolist()
    for key in ("chrom", "start", "end"):
        assert tracks.var[key].tolist() == [*bins[key]] * 3
    np.testing.assert_array_equal(
        trained.get_normalized_accessibility(indices=[5, 2], return_numpy=True), np.asarray(tracks.X)
    )


@pytest.mark.parametrize(
    ("regions", "rows"),
    [
        ("chr1:100,000-120,000", [10, 11]),
        ("chr1:99999-110001", [9, 10, 11]),
        (["chr2:0-1", "chr1:0-20000"], [0, 1, 72]),
        ([("chr2", 470_000, 9_000_000)], [119]),
    ],
)
def test_regions_are_the_bins_that_overlap_them(trained, regions, rows):
    whole = trained.get_normalized_expression()
    part = trained.get_normalized_expression(region_list=regions, modality=["H3K27me3", "H3K27ac"])
    columns = [240 + row for row in rows] + rows
    assert part.var_names.tolist() == whole.var_names[columns].tolist()
    np.testing.assert_allclose(part.X, np.asarray(whole.X)[:, columns], rtol=1e-6)


def test_a_threshold_gives_the_same_values_sparse(trained):
    dense = trained.get_normalized_expression(library_size=100, return_numpy=True)
    expected = np.where(dense < 0.9, 0, dense)
    assert 0 < (expected > 0).mean() < 1
    for size in (None, 7):
        found = trained.get_normalized_expression(library_size=100, threshold=0.9, return_numpy=True, batch_size=size)
        assert isinstance(found, sparse.csr_matrix)
        np.testing.assert_allclose(found.toarray(), expected, rtol=1e-5)
    assert sparse.issparse(trained.get_normalized_expression(threshold=0.01).X)


def test_the_batch_that_the_decoder_is_told(trained):
    own = trained.get_normalized_expression(return_numpy=True)
    codes = (trained.adata.obs["batch"] == "batch_1").to_numpy()
    told = {
        name: trained.get_normalized_expression(transform_batch=name, return_numpy=True)
        for name in ("batch_0", "batch_1")
    }
    np.testing.assert_allclose(told["batch_0"][~codes], own[~codes], rtol=1e-6)
    np.testing.assert_allclose(told["batch_1"][codes], own[codes], rtol=1e-6)
    assert np.abs(told["batch_0"] - told["batch_1"]).max() > 1e-3


def test_a_sample_of_the_latent_is_drawn_with_the_seed_of_the_model(trained, global_state):
    before = global_state()
    first, second = (trained.get_normalized_expression(use_z_mean=False, return_numpy=True) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.allclose(first, trained.get_normalized_expression(return_numpy=True))
    assert global_state() == before


def test_imputation_never_reads_the_modality(imputer, counts):
    """Whatever is stored under it, in cells that have it and in those that lack it."""
    expected = imputer.impute_modality("ATAC", cells="all", return_numpy=True)
    other = imputer.adata.copy()
    dense = counts(other)
    dense[:, 1] = np.random.default_rng(0).integers(0, 9, (60, 120))
    other.obsm["tracks"] = dense
    assert np.array_equal(imputer.impute_modality("ATAC", other, cells="all", return_numpy=True), expected)
    # equally where it is masked
    other.obsm["tracks_mask"] = other.obsm["tracks_mask"].copy()
    lacking = imputer.adata.obsm["tracks_mask"][:, 1] == 0
    found = imputer.impute_modality("ATAC")
    assert found.obs_names.tolist() == imputer.adata.obs_names[lacking].tolist()
    np.testing.assert_allclose(found.X, expected[lacking], rtol=1e-5)
    others = imputer.get_latent_representation(modality=["H3K27ac", "H3K27me3"])
    assert not np.allclose(others[~lacking], imputer.get_latent_representation()[~lacking])
    np.testing.assert_allclose(others[lacking], imputer.get_latent_representation()[lacking], atol=1e-6)


def test_an_array_of_libraries_is_refused_in_imputation_too(imputer):
    with pytest.raises(ConfigError, match=r"library_size=array.*a number above 0"):
        imputer.impute_modality("ATAC", library_size=np.ones(3))


def test_imputation_reads_the_counts_of_the_cells_it_predicts_once(imputer, monkeypatch):
    read = []
    real = TracksReader.rows
    monkeypatch.setattr(TracksReader, "rows", lambda self, rows: read.extend(rows.tolist()) or real(self, rows))
    imputer.impute_modality("ATAC", batch_size=7)
    assert read == np.flatnonzero(~imputer.adata.obsm["tracks_mask"][:, 1]).tolist()


def test_names_are_built_of_the_chosen_bins_alone(trained, monkeypatch):
    built = []
    real = TrackGrid.frame
    monkeypatch.setattr(TrackGrid, "frame", lambda self: built.append(self.n_bins) or real(self))
    assert trained.get_normalized_expression(region_list="chr1:0-20000").shape == (60, 6)
    assert built == [2, 2, 2]
    assert trained.get_normalized_expression(region_list="chr2:0-10000", modality="ATAC").var_names.tolist() == [
        "ATAC|chr2:0-10000"
    ]


def test_imputed_tracks_add_up_to_the_library(imputer, counts):
    has = imputer.adata.obsm["tracks_mask"][:, 1]
    mean = counts(imputer.adata)[has, 1].sum(1).mean()
    found = imputer.impute_modality("ATAC")
    assert found.var["channel"].unique().tolist() == ["ATAC"]
    np.testing.assert_allclose(np.asarray(found.X).sum(1), mean, rtol=1e-5)
    number = imputer.impute_modality("ATAC", library_size=50.0, indices=np.flatnonzero(~has)[:3], return_numpy=True)
    np.testing.assert_allclose(number.sum(1), 50.0, rtol=1e-5)
    assert imputer.impute_modality("ATAC", region_list="chr1:0-20000").shape == ((~has).sum(), 2)
    assert sparse.issparse(imputer.impute_modality("ATAC", threshold=0.5).X)


def test_imputation_that_is_not_possible_is_refused(imputer, kind, make, fit):
    with pytest.raises(DataError, match=r"All 60 cells have 'H3K27ac'. Use cells='all'"):
        imputer.impute_modality("H3K27ac")
    with pytest.raises(ConfigError, match="'observed' does not exist for an absent modality"):
        imputer.impute_modality("ATAC", library_size="observed")
    with pytest.raises(ConfigError, match="transform_batch='b' is no batch"):
        imputer.impute_modality("ATAC", transform_batch="b")
    alone = imputer.adata.copy()
    alone.obsm["tracks_mask"] = np.tile([True, True, True], (60, 1))
    alone.obsm["tracks_mask"][3] = [False, True, False]
    with pytest.raises(DataError, match=f"Cell '{alone.obs_names[3]}' has none of the modalities"):
        imputer.impute_modality("ATAC", alone, cells="all")
    data = epivi.simulate.tracks(30, 96, 1, 2)
    single = fit(make(kind, data, setup={}, modality_dropout_rate=0.3), 1)
    with pytest.raises(ConfigError, match="one modality, 'H3K27ac': there is nothing to predict it from"):
        single.impute_modality("H3K27ac")


@pytest.fixture(scope="module")
def shallow():
    return epivi.simulate.tracks(12, 36, 2, 2, depth=8, missing={"ATAC": 0.4}, seed=1)


@pytest.mark.parametrize("likelihood", ["poisson", "nb"])
def test_the_marginal_likelihood_is_the_integral_over_the_latent(
    kind, shallow, make, fit, entries, counts, dense_log_prob, likelihood
):
    """One latent dimension: the integral on a fine grid, with the densities of torch.distributions."""
    data = shallow.copy()
    options = {"n_latent": 1, "likelihood": likelihood} | (
        {"kernel_size": 3, "stride": 3} if kind == "ConvNetVAE" else {}
    )
    model = fit(make(kind, data, setup={}, **options), 5, batch_size=12, train_size=1.0, lr=0.02)
    module, tensors = model.module, entries(model)
    # a posterior about as wide as the prior and a decoder that is not steep, so that few samples are enough
    with torch.no_grad():
        module.expand.weight *= 0.3
    logvar = module.heads.logvar if kind == "ConvNetVAE" else module.logvar
    torch.nn.init.zeros_(logvar.weight)
    torch.nn.init.constant_(logvar.bias, 0.2 if kind == "ConvNetVAE" else 3.0)
    outputs = module.inference(**module._get_inference_input(tensors), deterministic=True)
    covariates_bk = module._get_generative_input(tensors, outputs)["covariates_bk"]
    dense_bcl = torch.from_numpy(counts(data)).double()
    grid = np.linspace(-9, 9, 601)
    log_p = np.empty((601, 12))
    with torch.inference_mode():
        for i, z in enumerate(grid):
            hidden = module.generative(torch.full((12, 1), z, dtype=torch.float32), covariates_bk)["hidden"]
            log_p[i] = dense_log_prob(module, hidden, dense_bcl, tensors["modality_mask"]).sum(1)
    step = grid[1] - grid[0]
    log_prior = -0.5 * grid[:, None] ** 2 - 0.5 * np.log(2 * np.pi)
    expected = logsumexp(log_p + log_prior + np.log(step), axis=0)
    found = model.get_marginal_ll(n_mc_samples=12000, return_mean=False)
    np.testing.assert_allclose(found, expected, atol=0.2)
    assert model.get_marginal_ll(n_mc_samples=12000) == pytest.approx(found.mean())
    # the exact bound, on the same grid
    mean, sd = (v.detach().numpy()[:, 0].astype(float) for v in (outputs["mean_bd"], outputs["qz"].scale))
    log_q = -0.5 * ((grid[:, None] - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
    bound = (np.exp(log_q) * (log_p + log_prior - log_q)).sum(0) * step
    assert (expected >= bound - 1e-6).all()
    samples = np.mean([elbo_of(model, seed) for seed in range(40)])
    assert samples == pytest.approx(bound.mean(), abs=0.3)
    assert found.mean() > samples - 0.1


def elbo_of(model, seed):
    before, model.seed = model.seed, seed
    try:
        return model.get_elbo()
    finally:
        model.seed = before


def test_the_marginal_likelihood_is_not_below_the_bound(trained, imputer):
    for model in (trained, imputer):
        assert model.get_marginal_ll(n_mc_samples=50) >= model.get_elbo()
        assert (
            model.get_marginal_ll(n_mc_samples=50, indices=[3])
            >= model.get_marginal_ll(n_mc_samples=1, indices=[3]) - 5
        )


def test_errors_add_up_over_modalities(trained, imputer):
    errors = trained.get_reconstruction_error()
    assert list(errors) == [*CHANNELS, "total"]
    assert errors["total"] == pytest.approx(sum(errors[name] for name in CHANNELS), rel=1e-6)
    kl = -trained.get_elbo() - errors["total"]
    assert kl > 0
    mask = imputer.adata.obsm["tracks_mask"]
    errors = imputer.get_reconstruction_error()
    expected = sum(errors[name] * mask[:, m].mean() for m, name in enumerate(CHANNELS))
    assert errors["total"] == pytest.approx(expected, rel=1e-6)


def test_expert_weights_are_shares_of_the_precision(trained_models, imputers):
    model = imputers["FCVAE"]
    weights = model.get_expert_weights()
    assert isinstance(weights, pd.DataFrame)
    assert weights.columns.tolist() == [*CHANNELS, "prior"]
    assert weights.index.tolist() == model.adata.obs_names.tolist()
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    lacking = ~model.adata.obsm["tracks_mask"][:, 1]
    assert (weights.loc[lacking, "ATAC"] == 0).all()
    assert (weights.loc[~lacking, "ATAC"] > 0).all()
    some = trained_models["FCVAE"].get_expert_weights(indices=[4])
    np.testing.assert_allclose(some, trained_models["FCVAE"].get_expert_weights().iloc[[4]], rtol=1e-5)


def test_rare_and_widespread_bins_are_reconstructed(trained, counts):
    """The mean reconstructed share of a bin follows the mean observed one."""
    observed = counts(trained.adata).sum(0).ravel()
    found = trained.get_normalized_expression(library_size="observed", return_numpy=True).sum(0)
    assert np.corrcoef(observed, found)[0, 1] > 0.5
