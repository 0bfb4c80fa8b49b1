from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.special import logsumexp
from scipy.stats import spearmanr

from epivi._errors import ConfigError
from epivi.metrics import confounder_information
from epivi.models.base_latent import RowNoise
from epivi.models.sailer.outputs import sparse_rows


@pytest.fixture(scope="module")
def full(trained):
    return trained.get_normalized_accessibility()


def test_probabilities_have_the_names_of_the_data(trained, full, simulated):
    assert full.index.tolist() == simulated.obs_names.tolist()
    assert full.columns.tolist() == simulated.var_names.tolist()
    assert ((full > 0) & (full < 1)).all(axis=None)


def test_chosen_regions_are_columns_of_the_whole(trained, full):
    names = [full.columns[i] for i in (300, 2, 77)]
    pd.testing.assert_frame_equal(trained.get_normalized_accessibility(region_list=names), full[names], rtol=1e-5)
    single = trained.get_normalized_accessibility(region_list=names[0], indices=[9, 3])
    pd.testing.assert_frame_equal(single, full.loc[full.index[[9, 3]], [names[0]]], rtol=1e-5)


def test_an_unknown_region_is_named_with_the_nearest(trained, full):
    with pytest.raises(ConfigError, match=rf"'{full.columns[3]}0'.*Did you mean"):
        trained.get_normalized_accessibility(region_list=[full.columns[0], full.columns[3] + "0"])


def test_a_threshold_gives_the_same_values_in_sparse_form(trained, full):
    dense = np.where(full.to_numpy() < 0.3, 0, full.to_numpy())
    assert 0 < (dense > 0).mean() < 1
    found = trained.get_normalized_accessibility(threshold=0.3)
    assert isinstance(found.X, sparse.csr_matrix)
    assert found.X.nnz == (dense > 0).sum()
    np.testing.assert_array_equal(found.X.toarray(), dense)
    assert found.obs_names.tolist() == full.index.tolist()
    assert found.var_names.tolist() == full.columns.tolist()
    bare = trained.get_normalized_accessibility(threshold=0.3, return_numpy=True, batch_size=9)
    np.testing.assert_allclose(bare.toarray(), dense, rtol=1e-4, atol=1e-6)


def test_a_bare_array_and_the_alias_hold_the_same(trained, full):
    np.testing.assert_array_equal(trained.get_normalized_accessibility(return_numpy=True), full.to_numpy())
    pd.testing.assert_frame_equal(trained.get_normalized_expression(), full)


def test_cells_in_another_order_get_the_same_values(trained, full, simulated):
    order = np.random.default_rng(0).permutation(simulated.n_obs)
    found = trained.get_normalized_accessibility(simulated[order].copy(), transform_batch="batch_1")
    expected = trained.get_normalized_accessibility(transform_batch="batch_1").loc[found.index]
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)


def profile(x):
    """Relative accessibility of the peaks, free of depth."""
    mean = np.asarray(x).mean(0)
    return mean / mean.sum()


def test_predictions_move_towards_the_batch_that_the_decoder_is_told(trained, simulated):
    x, batch = (simulated.X > 0).toarray(), simulated.obs["batch"].to_numpy()
    same_types = simulated.obs["cell_type"] == simulated.obs["cell_type"].cat.categories[0]
    told = {
        b: trained.get_normalized_accessibility(transform_batch=b, indices=same_types) for b in ("batch_0", "batch_1")
    }
    true = {b: profile(x[(batch == b) & same_types]) for b in told}
    for b, other in (("batch_0", "batch_1"), ("batch_1", "batch_0")):
        distance = np.abs(profile(told[b]) - true[b]).sum()
        assert distance < 0.8 * np.abs(profile(told[other]) - true[b]).sum()
    moved = profile(told["batch_1"]) - profile(told["batch_0"])
    assert np.corrcoef(moved, true["batch_1"] - true["batch_0"])[0, 1] > 0.7


def test_by_default_all_cells_are_told_the_deeper_batch_and_it_is_said(trained, full, caplog):
    with caplog.at_level(logging.INFO, logger="epivi"):
        trained.get_normalized_accessibility(indices=[0])
    assert "'batch_1', the batch with the highest median depth" in caplog.text
    pd.testing.assert_frame_equal(trained.get_normalized_accessibility(transform_batch="batch_1"), full)


def test_the_observed_batch_is_that_of_each_cell(trained, simulated):
    found = trained.get_normalized_accessibility(transform_batch="observed")
    for b in ("batch_0", "batch_1"):
        rows = (simulated.obs["batch"] == b).to_numpy()
        expected = trained.get_normalized_accessibility(transform_batch=b)
        pd.testing.assert_frame_equal(found[rows], expected[rows], rtol=1e-4)


def test_an_unknown_batch_is_named_with_the_nearest(trained):
    with pytest.raises(ConfigError, match=r"transform_batch='batch1' is no batch.*'batch_1'"):
        trained.get_normalized_accessibility(transform_batch="batch1")


def test_more_depth_means_more_open_peaks(trained, full):
    depths = [10, 30, 60, 120]
    means = [trained.get_normalized_accessibility(library_size=d, return_numpy=True).mean() for d in depths]
    assert (np.diff(means) > 0.01).all()
    mean_depth = float(np.exp(np.log(trained.get_library_size_factors()).mean()))
    at_mean = trained.get_normalized_accessibility(library_size=mean_depth)
    pd.testing.assert_frame_equal(at_mean, full, rtol=1e-4)


def test_the_observed_depth_is_that_of_each_cell(trained, full):
    found = trained.get_normalized_accessibility(library_size="observed", return_numpy=True).sum(1)
    depth = trained.get_library_size_factors()
    assert spearmanr(found, depth).statistic > 0.9
    assert abs(spearmanr(full.sum(axis=1), depth).statistic) < 0.5
    row = int(depth.argmax())
    own = trained.get_normalized_accessibility(library_size=float(depth[row]), indices=[row], return_numpy=True)
    assert own.sum() == pytest.approx(found[row], rel=1e-4)


@pytest.mark.parametrize("library_size", ["latent", 0.0, -3, float("nan")])
def test_a_depth_that_cannot_be_used_is_refused(trained, library_size):
    with pytest.raises(ConfigError, match="library_size"):
        trained.get_normalized_accessibility(library_size=library_size)


@pytest.mark.parametrize("threshold", [-0.1, 1.5])
def test_a_threshold_outside_its_range_is_refused(trained, threshold):
    with pytest.raises(ConfigError, match="threshold"):
        trained.get_normalized_accessibility(threshold=threshold)


def test_calibrated_values_have_the_density_of_the_data_and_weighted_ones_do_not(trained, simulated):
    density = (simulated.X > 0).mean()
    options = {"library_size": "observed", "transform_batch": "observed", "return_numpy": True}
    calibrated = trained.get_normalized_accessibility(**options)
    weighted = trained.get_normalized_accessibility(calibrated=False, **options)
    assert calibrated.mean() == pytest.approx(density, rel=0.1)
    assert weighted.mean() > 1.5 * density
    omega = float(trained.module.open_weight)
    np.testing.assert_allclose(weighted, omega * calibrated / (1 + (omega - 1) * calibrated), rtol=1e-4)


def test_samples_are_drawn_with_the_seed_of_the_model(trained, full):
    first, second = (trained.get_normalized_accessibility(use_z_mean=False) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert not np.allclose(first, full, rtol=1e-3)


def test_latents_are_the_means_and_variances_of_the_posterior(trained):
    mean, variance = trained.get_latent_representation(return_dist=True)
    np.testing.assert_array_equal(mean, trained.get_latent_representation())
    batch = trained.adata_manager.create_torch_dataset()[np.arange(140)]
    with torch.no_grad():
        qz = trained.module.inference(batch["x_indptr"], batch["x_indices"], deterministic=True)["qz"]
    np.testing.assert_allclose(mean, qz.loc, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, qz.variance, rtol=1e-5)
    assert mean.dtype == np.float32


def test_an_untrained_model_says_so_and_embeds_cell_by_cell(make):
    model = make()
    with pytest.warns(UserWarning, match="inferred values from an untrained model"):
        latent = model.get_latent_representation()
    with pytest.warns(UserWarning, match="inferred values from an untrained model"):
        np.testing.assert_allclose(model.get_latent_representation(batch_size=1), latent, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.get_normalized_accessibility(transform_batch="batch_1"),
        lambda m: m.get_normalized_expression(transform_batch="batch_1"),
        lambda m: m.get_elbo(),
        lambda m: m.get_marginal_ll(n_mc_samples=1),
        lambda m: m.confounder_report(),
    ],
)
def test_every_getter_of_an_untrained_model_warns_once(make, call):
    with pytest.warns(UserWarning, match="inferred values from an untrained model") as caught:
        call(make())
    assert sum("untrained model" in str(warning.message) for warning in caught) == 1


def test_no_cells_give_empty_results(trained, simulated):
    found = trained.get_normalized_accessibility(indices=[])
    assert found.shape == (0, 320)
    assert found.columns.tolist() == simulated.var_names.tolist()
    assert trained.get_normalized_accessibility(indices=[], return_numpy=True).dtype == np.float32
    assert trained.get_normalized_accessibility(indices=[], threshold=0.5).shape == (0, 320)
    assert trained.get_normalized_accessibility(
        indices=[], region_list=found.columns[[3, 1]], use_z_mean=False
    ).shape == (
        0,
        2,
    )
    assert trained.get_latent_representation(indices=[]).shape[0] == 0
    assert trained.get_library_size_factors(indices=[]).shape == (0,)
    assert np.isnan(trained.get_elbo(indices=[]))
    assert np.isnan(trained.get_marginal_ll(indices=[], n_mc_samples=2))
    assert trained.get_marginal_ll(indices=[], n_mc_samples=2, return_mean=False).shape == (0,)


def test_the_noise_of_a_cell_does_not_depend_on_the_others(trained):
    order = np.random.default_rng(0).permutation(140)
    whole = trained.get_marginal_ll(n_mc_samples=2, return_mean=False)
    found = trained.get_marginal_ll(indices=order, n_mc_samples=2, return_mean=False, batch_size=9)
    np.testing.assert_allclose(found, whole[order], rtol=1e-5)
    assert trained.get_elbo(indices=order, batch_size=9) == pytest.approx(trained.get_elbo(), rel=1e-6)


def test_an_array_of_depths_is_refused(trained):
    with pytest.raises(ConfigError, match=r"library_size=array.*a number above 0"):
        trained.get_normalized_accessibility(library_size=np.ones(3))


def test_the_elbo_is_that_of_calibrated_bernoulli_likelihoods(trained, simulated):
    dataset = trained.adata_manager.create_torch_dataset()
    batch = dataset[np.arange(140)]
    x = torch.from_numpy((simulated.X > 0).toarray().astype(np.float32))
    with torch.no_grad():
        outputs = trained.module.inference(batch["x_indptr"], batch["x_indices"], deterministic=True)
        qz = outputs["qz"]
        outputs["z"] = qz.loc + qz.scale * RowNoise(trained.seed, range(140)).draw(qz.loc.shape[1])
        hidden = trained.module.generative(**trained.module._get_generative_input(batch, outputs))["hidden"]
        p = trained.module.probabilities(hidden, None)
        log_p = torch.distributions.Bernoulli(probs=p).log_prob(x).sum(1)
        prior = torch.distributions.Normal(0.0, 1.0)
        kl = torch.distributions.kl_divergence(qz, prior).sum(1)
    expected = float((log_p - kl).mean())
    assert trained.get_elbo(batch_size=140) == pytest.approx(expected, rel=1e-5)
    assert trained.get_elbo(indices=range(70), batch_size=70) != trained.get_elbo(indices=range(70, 140), batch_size=70)


def test_the_marginal_likelihood_is_the_integral_over_the_latent(make, simulated, fit):
    """One latent dimension: the integral on a fine grid."""
    model = fit(make(n_latent=1))
    with torch.no_grad():  # a posterior about as wide as the prior, so that few samples are enough
        torch.nn.init.zeros_(model.module.encoder.heads.logvar.weight)
        torch.nn.init.constant_(model.module.encoder.heads.logvar.bias, 0.2)
        model.module.decoder.condition_layer.weight[:, :1] *= 0.3
    rows = np.arange(8)
    batch = model.adata_manager.create_torch_dataset()[rows]
    x = torch.from_numpy((simulated.X[rows] > 0).toarray()).double()
    grid = np.linspace(-9, 9, 601)
    log_p = np.empty((grid.size, rows.size))
    with torch.inference_mode():
        outputs = model.module.inference(batch["x_indptr"], batch["x_indices"], deterministic=True)
        for i, z in enumerate(grid):
            outputs["z"] = torch.full((rows.size, 1), z, dtype=torch.float32)
            hidden = model.module.generative(**model.module._get_generative_input(batch, outputs))["hidden"]
            p = model.module.probabilities(hidden, None).double()
            log_p[i] = torch.distributions.Bernoulli(probs=p).log_prob(x).sum(1)
    log_prior = -0.5 * grid[:, None] ** 2 - 0.5 * np.log(2 * np.pi)
    expected = logsumexp(log_p + log_prior + np.log(grid[1] - grid[0]), axis=0)
    found = model.get_marginal_ll(indices=rows, n_mc_samples=1500, return_mean=False)
    np.testing.assert_allclose(found, expected, atol=0.15)
    assert model.get_marginal_ll(indices=rows, n_mc_samples=1500) == pytest.approx(found.mean())


def test_depths_are_the_numbers_of_open_peaks(trained, simulated):
    expected = np.asarray((simulated.X > 0).sum(1)).ravel()
    np.testing.assert_array_equal(trained.get_library_size_factors(), expected)
    np.testing.assert_array_equal(trained.get_library_size_factors(indices=[5, 2]), expected[[5, 2]])


def test_the_report_holds_the_information_of_each_confounder(trained, simulated):
    report = trained.confounder_report()
    latent = trained.get_latent_representation()
    depth = confounder_information(latent, trained.get_library_size_factors(), discrete=False, seed=trained.seed)
    assert report["information_depth"] == depth.mean
    assert report["information_depth_max"] == depth.max
    codes = simulated.obs["batch"].cat.codes.to_numpy()
    assert report["information_batch"] == confounder_information(latent, codes, discrete=True, seed=trained.seed).mean
    mean, variance = trained.get_latent_representation(return_dist=True)
    kl = 0.5 * (variance + mean**2 - 1 - np.log(variance)).astype(float)
    assert report["kl"] == pytest.approx(kl.sum(1).mean(), rel=1e-5)
    assert report["collapsed_share"] == (kl.mean(0) < 0.01).mean()
    assert 0 < report["mixture_information"] <= np.log(140) + 1e-9
    assert report["mixture_information"] <= report["pairwise_kl"]


def test_the_report_of_one_batch_has_no_batch(make, fit):
    report = fit(make(batch_key=None)).confounder_report(n_cells=50)
    assert not any("batch" in key for key in report.index)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_rows_of_a_sparse_result_hold_what_is_not_below_the_threshold(threshold):
    values = np.random.default_rng(0).random((5, 40)).astype(np.float32)
    values[values < 0.2] = 0.0
    values[3] = 0.0
    values[0, 0], values[0, 1] = np.float32(0.3), np.nan
    found = sparse_rows(values, threshold)
    expected = np.where(values < threshold, 0, values)
    np.testing.assert_array_equal(found.toarray(), expected)
    assert found.nnz == np.count_nonzero(expected)
    assert (found.indices.dtype, found.data.dtype, found.has_sorted_indices) == (np.int32, np.float32, True)


def test_no_rows_make_an_empty_sparse_result():
    assert sparse_rows(np.empty((0, 7), np.float32), 0.5).shape == (0, 7)


@pytest.mark.parametrize("batch_size", [None, 7, 1])
def test_accessibility_does_not_depend_on_how_many_cells_are_read_at_once(trained, batch_size):
    rows = [3, 1, 40, 17, 5, 9, 2, 30, 31]
    whole = trained.get_normalized_accessibility(return_numpy=True)
    found = trained.get_normalized_accessibility(indices=rows, batch_size=batch_size)
    np.testing.assert_allclose(found.to_numpy(), whole[rows], rtol=2e-5)
    thinned = trained.get_normalized_accessibility(
        indices=rows, batch_size=batch_size, threshold=0.3, return_numpy=True
    )
    np.testing.assert_array_equal(thinned.toarray(), np.where(found < 0.3, 0, found))
