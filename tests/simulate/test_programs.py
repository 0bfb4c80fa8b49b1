from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.integrate import quad
from scipy.stats import nbinom, norm, poisson

from epivi._errors import ConfigError
from epivi.simulate import gene_programs
from epivi.simulate.programs import conditional_means


@pytest.fixture(scope="module")
def default():
    return gene_programs()


def truth(adata, *keys):
    return [adata.uns["simulation"][key] for key in keys]


def within_gene(x, predicted):
    return np.mean([np.corrcoef(x[:, g], predicted[:, g])[0, 1] for g in range(x.shape[1])])


def test_output_has_the_documented_form(default):
    assert default.shape == (1000, 200)
    assert type(default.X) is sparse.csr_matrix
    assert default.X.dtype == np.int32
    assert default.obs["group"].value_counts(sort=False).to_dict() == {f"group_{k}": 250 for k in range(4)}
    assert default.var["module"].value_counts(sort=False).to_dict() == {f"module_{m}": 20 for m in range(10)}
    record = default.uns["simulation"]
    np.testing.assert_array_equal(default.var["module"].cat.codes, record["module"])
    assert (np.diff(record["module"]) != 0).sum() > 100  # order tells nothing
    assert record["cells"].tolist() == default.obs_names.tolist()
    assert record["rate"].dtype == record["conditional"].dtype == np.float32
    assert record["simulator"] == "gene_programs"
    assert record["strength"] == 1.0


def test_rates_follow_the_formula(default):
    module, loading, level, depth = truth(default, "module", "loading", "level", "depth")
    activity, rate = truth(default, "activity", "rate")
    log_rate = np.log(np.outer(depth, level)) + loading * activity[:, module] - loading**2 / 2
    np.testing.assert_allclose(rate, np.exp(log_rate), rtol=1e-5)
    assert level.mean() == pytest.approx(2.0)
    assert depth.mean() == pytest.approx(1.0, abs=0.04)
    assert np.log(depth).std() == pytest.approx(0.3, abs=0.03)
    assert 0.5 <= loading.min() < loading.max() <= 1.5


def test_activities_have_unit_variance_and_groups_explain_half_of_it(default):
    activity, of_group, sd = truth(default, "activity", "group_activity", "activity_sd")
    np.testing.assert_allclose(of_group.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(of_group.var(axis=0), np.r_[np.full(5, 0.5), np.zeros(5)], atol=1e-12)
    np.testing.assert_allclose(sd**2 + of_group.var(axis=0), 1.0)
    np.testing.assert_allclose(activity.var(axis=0), 1.0, atol=0.2)
    codes = default.obs["group"].cat.codes.to_numpy()
    for k in range(4):
        np.testing.assert_allclose(activity[codes == k].mean(axis=0), of_group[k], atol=4 / np.sqrt(250))


@pytest.mark.parametrize("dispersion", [0.0, 0.4])
def test_counts_have_the_moments_of_their_law(dispersion):
    adata = gene_programs(2000, n_genes=50, n_modules=5, strength=0.5, dispersion=dispersion)
    (rate,) = truth(adata, "rate")
    residual = (adata.X.toarray() - rate) / np.sqrt(rate + dispersion * rate**2)
    assert abs(residual.mean()) < 4 / np.sqrt(residual.size)
    assert residual.var() == pytest.approx(1.0, abs=0.03)


def test_means_agree_with_the_log_normal_closed_form():
    adata = gene_programs(20_000, n_genes=12, n_modules=4, n_groups=2, depth_sd=0.0, strength=0.6)
    module, loading, level = truth(adata, "module", "loading", "level")
    of_group, sd = truth(adata, "group_activity", "activity_sd")
    x, codes = adata.X.toarray(), adata.obs["group"].cat.codes.to_numpy()
    slope = 0.6 * loading
    for k in range(2):
        log_mean = slope * of_group[k, module] + slope**2 * (sd[module] ** 2 - 1) / 2
        error = x[codes == k].std(axis=0) / np.sqrt((codes == k).sum())
        assert (np.abs(x[codes == k].mean(axis=0) - level * np.exp(log_mean)) < 4.5 * error).all()


def test_genes_of_a_module_correlate_and_others_do_not(default):
    (module,) = truth(default, "module")
    correlation = np.corrcoef(np.log1p(default.X.toarray()).T)
    same = module[:, None] == module
    np.fill_diagonal(correlation, np.nan)
    assert np.nanmean(correlation[same]) > 0.4
    assert abs(np.nanmean(correlation[~same])) < 0.1
    # the strongest partner of nearly every gene is of its module
    best = np.nanargmax(correlation, axis=1)
    assert (module[best] == module).mean() > 0.95


@pytest.mark.parametrize("dispersion", [0.0, 0.5])
def test_conditional_mean_agrees_with_numerical_integration(dispersion):
    adata = gene_programs(8, n_genes=8, n_modules=2, n_groups=2, dispersion=dispersion, strength=0.8, seed=3)
    record, x = adata.uns["simulation"], adata.X.toarray()
    codes = adata.obs["group"].cat.codes.to_numpy()

    def mass(n, h, z):
        slope = 0.8 * record["loading"][h]
        mean = record["depth"][n] * record["level"][h] * np.exp(slope * z - slope**2 / 2)
        if dispersion == 0:
            return poisson.pmf(x[n, h], mean), mean
        return nbinom.pmf(x[n, h], 1 / dispersion, 1 / (1 + dispersion * mean)), mean

    for n in range(4):
        for g in range(8):
            m = record["module"][g]
            others = [h for h in range(8) if record["module"][h] == m and h != g]
            centre, sd = record["group_activity"][codes[n], m], record["activity_sd"][m]

            def weight(z, n=n, others=others, centre=centre, sd=sd):
                return norm.pdf(z, centre, sd) * np.prod([mass(n, h, z)[0] for h in others])

            span = (centre - 7 * sd, centre + 7 * sd)
            top = quad(lambda z, n=n, g=g, w=weight: w(z) * mass(n, g, z)[1], *span, epsabs=0, limit=200)[0]
            bottom = quad(weight, *span, epsabs=0, limit=200)[0]
            assert record["conditional"][n, g] == pytest.approx(top / bottom, rel=1e-4)


def test_conditional_mean_without_partners_is_that_of_a_log_normal():
    base, slope = np.array([[2.0], [3.0]]), np.array([0.7])
    means = conditional_means(np.array([[9], [0]]), base, slope, mean_n=np.array([0.0, 1.0]), sd=0.5, dispersion=0.0)
    expected = base[:, 0] * np.exp(0.7 * np.array([0.0, 1.0]) + 0.7**2 * 0.5**2 / 2)
    np.testing.assert_allclose(means[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("dispersion", [0.0, 0.5])
def test_errors_of_the_oracles_are_ordered_and_calibrated(dispersion):
    adata = gene_programs(dispersion=dispersion)
    x = adata.X.toarray()
    depth, level, rate, conditional = truth(adata, "depth", "level", "rate", "conditional")
    additive = np.outer(depth, level)
    mse = [((x - predicted) ** 2).mean() for predicted in (rate, conditional, additive)]
    assert mse[0] < mse[1] < 0.6 * mse[2]
    # Poisson or negative binomial: the error of the rate is the variance of the law
    assert mse[0] == pytest.approx((rate + dispersion * rate**2).mean(), rel=0.12)
    # the conditional mean has no bias and its error is orthogonal to it
    slope = np.cov(x.ravel(), conditional.ravel())[0, 1] / conditional.var()
    assert slope == pytest.approx(1.0, abs=0.04)
    assert (x - conditional).mean() == pytest.approx(0.0, abs=0.03)
    assert within_gene(x, conditional) > within_gene(x, additive) + 0.3


def test_without_strength_the_additive_model_is_the_oracle():
    adata = gene_programs(100, strength=0.0)
    depth, level, rate, conditional = truth(adata, "depth", "level", "rate", "conditional")
    np.testing.assert_allclose(rate, np.outer(depth, level), rtol=1e-6)
    np.testing.assert_allclose(conditional, rate, rtol=1e-5)


def test_one_group_has_no_group_effect():
    of_group, sd = truth(gene_programs(30, n_groups=1), "group_activity", "activity_sd")
    np.testing.assert_array_equal(of_group, 0.0)
    np.testing.assert_array_equal(sd, 1.0)


def test_same_seed_same_data_and_other_seeds_differ():
    first, again, other = (gene_programs(50, n_genes=30, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.X.toarray(), again.X.toarray())
    assert (first.X != other.X).nnz > 0
    pd.testing.assert_frame_equal(first.obs, again.obs)
    pd.testing.assert_frame_equal(first.var, again.var)
    for a, b in zip(truth(first, "rate", "conditional"), truth(again, "rate", "conditional"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (truth(first, "module")[0] != truth(other, "module")[0]).any()


def test_result_can_be_written_and_read(tmp_path):
    adata = gene_programs(20, n_genes=30)
    adata.write_h5ad(tmp_path / "programs.h5ad")
    back = anndata.read_h5ad(tmp_path / "programs.h5ad")
    for a, b in zip(truth(adata, "rate", "module", "cells"), truth(back, "rate", "module", "cells"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_cells": 0}, "n_cells=0 is not valid: give a whole number of at least 1"),
        ({"n_genes": 1.5}, r"n_genes=1\.5 is not valid"),
        ({"n_modules": True}, "n_modules=True is not valid"),
        ({"n_groups": -1}, "n_groups=-1 is not valid"),
        ({"seed": -1}, "seed=-1 is not valid"),
        ({"strength": -0.5}, r"strength=-0\.5 is not valid: give a finite number between 0 and 3"),
        ({"mean_counts": 0}, "mean_counts=0 is not valid"),
        ({"dispersion": float("inf")}, "dispersion=inf is not valid"),
        ({"depth_sd": "a"}, "depth_sd='a' is not valid"),
        ({"n_modules": 201}, "n_modules=201 is more than n_genes=200"),
        ({"n_cells": 3}, "n_groups=4 is more than n_cells=3"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        gene_programs(**changes)
