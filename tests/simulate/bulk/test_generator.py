"""The simulated bulk experiments against their truth, and their form against that of a store."""

import anndata as ad
import numpy as np
import pytest
from scipy import stats

from epivi.simulate import bulk

SMALL = {"n_biosamples": 5, "chrom_sizes": [160, 80]}


def test_the_output_has_the_documented_form():
    adata = bulk(**SMALL, signal=True, dna=True, gap=10, unknown=0.3, missing=0.5)
    assert adata.var_names.tolist() == ["DNase", "ATAC", "H3K4me3", "H3K27ac", "H3K4me1", "H3K36me3"]
    forms = {key: (str(value.dtype), value.shape) for key, value in adata.obsm.items()}
    assert forms == {
        "counts": ("uint16", (5, 6, 240)),
        "signal": ("float32", (5, 6, 240)),
        "availability": ("bool", (5, 6)),
        **dict.fromkeys(("depth", "coverage", "read_length"), ("float32", (5, 6))),
        "run_type": ("int8", (5, 6)),
    }
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X, adata.obsm["availability"])
    assert adata.uns["signal_transform"] == "arcsinh"
    assert adata.uns["categories"]["run_type"].tolist() == ["single", "paired"]
    assert adata.uns["dna"].shape == (240 * 25,)
    assert adata.uns["genome"] == {
        "name": "simulated",
        "chrom_sizes": {"chr1": 170 * 25, "chr2": 90 * 25},
        "bin_size_bp": 25,
    }
    assert adata.uns["simulation"]["chrom_sizes"] == {"chr1": 160, "chr2": 80}
    assert adata.uns["truth"]["pair"].tolist() == ["DNase", "ATAC"]
    assert set(bulk(**SMALL).obsm) == set(forms) - {"signal"}
    assert "dna" not in bulk(**SMALL).uns


def test_bins_are_of_equal_width_with_gaps():
    bins = bulk(**SMALL, gap=10, bin_size_bp=50).uns["bins"]
    assert bins.columns.tolist() == ["chrom", "start", "end"]
    assert (bins["end"] - bins["start"] == 50).all()
    for chrom, size in (("chr1", 160), ("chr2", 80)):
        start = bins.loc[bins["chrom"] == chrom, "start"].to_numpy()
        step = np.full(size - 1, 50)
        step[size // 2 - 1] = 11 * 50
        assert (start[0], start.size) == (0, size)
        np.testing.assert_array_equal(np.diff(start), step)


def test_nothing_is_shown_of_experiments_that_were_not_done():
    adata = bulk(40, chrom_sizes=[50, 30], missing=0.6, unknown={"depth": 0.4}, signal=True)
    done = adata.obsm["availability"]
    assert done.sum(axis=1).min() == 2
    # at least two are kept, so that more than 40 % are done
    assert 0.4 < done.mean() < 0.55
    assert (adata.obsm["counts"][~done] == 0).all()
    assert (adata.obsm["signal"][~done] == 0).all()
    np.testing.assert_array_equal(adata.obsm["counts"][done], adata.uns["truth"]["counts"][done])
    for name in ("depth", "coverage", "read_length"):
        assert np.isnan(adata.obsm[name][~done]).all()
    assert (adata.obsm["run_type"][~done] == -1).all()
    assert np.isnan(adata.obsm["depth"][done]).mean() == pytest.approx(0.4, abs=0.12)
    assert not np.isnan(adata.obsm["coverage"][done]).any()
    assert bulk(5, chrom_sizes=[9], missing=1.0).obsm["availability"].sum(axis=1).tolist() == [2] * 5
    assert bulk(5, chrom_sizes=[9], missing=0.0).obsm["availability"].all()


def test_covariates_describe_the_experiments():
    adata = bulk(60, chrom_sizes=[60, 40], missing=0.0, depth_fold=10)
    truth = adata.uns["truth"]
    np.testing.assert_allclose(adata.obsm["depth"], truth["depth"], rtol=1e-6)
    np.testing.assert_allclose(adata.obsm["coverage"], (truth["counts"] > 0).mean(axis=-1), rtol=1e-6)
    assert set(np.unique(adata.obsm["read_length"])) == {36, 50, 76, 101}
    assert set(np.unique(adata.obsm["run_type"])) == {0, 1}
    # depths are log-uniform over a decade around the reference
    place = np.log10(truth["depth"] / truth["depth_ref"]).ravel() + 0.5
    assert stats.kstest(place, "uniform").pvalue > 0.01
    assert (bulk(3, chrom_sizes=[9], depth_fold=1, missing=0).obsm["depth"] == np.float32(2e7)).all()


def test_counts_are_negative_binomial_and_proportional_to_depth():
    adata = bulk(30, chrom_sizes=[400, 200], missing=0.0, dispersion=[1, 2, 3, 4, 5, 50])
    truth = adata.uns["truth"]
    dispersion = truth["dispersion"][:, None]
    mean = (truth["depth"] / truth["depth_ref"])[..., None] * np.exp(truth["log_rate"].astype(float))
    y = adata.obsm["counts"].astype(float)
    residual = (y - mean) / np.sqrt(mean + mean**2 / dispersion)
    assert np.abs(residual.mean(axis=(0, 2))).max() < 4 / np.sqrt(30 * 600)
    assert (residual**2).mean(axis=(0, 2)) == pytest.approx(np.ones(6), abs=0.08)
    law = stats.nbinom(dispersion, dispersion / (dispersion + mean))
    below, at = law.cdf(y - 1), law.cdf(y)
    pit = below + np.random.default_rng(0).random(y.shape) * (at - below)
    for a in range(6):
        assert stats.kstest(pit[:, a].ravel(), "uniform").pvalue > 0.001
    # twice the depth, twice the mean: the ratio does not depend on the depth
    ratio = (y.sum(axis=-1) / np.exp(truth["log_rate"]).sum(axis=-1)).ravel()
    slope, level = np.polyfit(np.log(truth["depth"] / truth["depth_ref"]).ravel(), np.log(ratio), 1)
    assert slope == pytest.approx(1.0, abs=0.03)
    assert level == pytest.approx(0.0, abs=0.03)


def regression(truth, target, inputs):
    """R² of the log rate of one assay, on those of others and their squares and products."""
    rate = truth["log_rate"].transpose(1, 0, 2).reshape(truth["log_rate"].shape[1], -1)[:, ::7].astype(float)
    x = rate[inputs]
    pairs = [x[i] * x[j] for i in range(len(x)) for j in range(i + 1)]
    design = np.stack([np.ones(x.shape[1]), *x, *pairs, *x**3], axis=1)
    fitted = design @ np.linalg.lstsq(design, rate[target], rcond=None)[0]
    return np.corrcoef(fitted, rate[target])[0, 1] ** 2


@pytest.mark.parametrize("n_assays", [4, 6, 9])
def test_the_pair_is_the_most_informative(n_assays):
    truth = bulk(8, n_assays, chrom_sizes=[1500, 500]).uns["truth"]
    for target, partner in ((0, 1), (1, 0)):
        others = [a for a in range(n_assays) if a != target]
        single = {a: regression(truth, target, [a]) for a in others}
        runner_up = max(score for a, score in single.items() if a != partner)
        assert single[partner] > 0.5 > 0.3 > runner_up
        # and no set of the others takes its place
        assert regression(truth, target, others) > regression(truth, target, [a for a in others if a != partner]) + 0.4


def test_each_assay_can_be_imputed_from_the_others():
    adata = bulk(12, chrom_sizes=[1200, 600], missing=0.0)
    truth = adata.uns["truth"]
    scale = (truth["depth"] / truth["depth_ref"])[..., None]
    x = np.log1p(adata.obsm["counts"] / scale)
    smooth = np.stack([np.stack([np.convolve(row, np.ones(7) / 7, "same") for row in part]) for part in x])
    train, test = np.arange(8), np.arange(8, 12)
    for target in range(6):
        mean = x[train, target].mean(axis=0)
        design = [np.stack([np.ones_like(mean), mean, *np.delete(smooth[b], target, 0)], axis=1) for b in range(12)]
        weights = np.linalg.lstsq(np.vstack([design[b] for b in train]), x[train, target].ravel(), rcond=None)[0]
        rate = truth["log_rate"][test, target].ravel()
        by_assays = np.corrcoef(np.concatenate([design[b] @ weights for b in test]), rate)[0, 1]
        by_locus = np.corrcoef(np.tile(mean, 4), rate)[0, 1]
        assert by_assays > max(0.75, by_locus + 0.05)


def test_signal_is_the_poisson_p_value_of_neighbouring_bins():
    adata = bulk(**SMALL, signal=True, missing=0.0)
    counts, signal = adata.obsm["counts"][2, 3].astype(int), adata.obsm["signal"][2, 3]
    mean = counts.mean()
    for at, low, high in ((0, 0, 3), (50, 48, 53), (159, 157, 160), (160, 160, 163), (239, 237, 240)):
        p = stats.poisson(mean * (high - low)).sf(counts[low:high].sum() - 1)
        assert np.sinh(signal[at]) == pytest.approx(-np.log10(p), rel=1e-5, abs=1e-6)
    rate = adata.uns["truth"]["log_rate"]
    assert stats.spearmanr(rate[2, 3], signal).statistic > 0.5
    deep = bulk(1, 3, chrom_sizes=[40], level=3000, gain=3.0, signal=True)
    assert np.isfinite(deep.obsm["signal"]).all()
    assert deep.obsm["signal"].max() == pytest.approx(np.arcsinh(300), rel=1e-6)


def test_large_counts_are_stored_as_int32():
    adata = bulk(2, 3, chrom_sizes=[20, 10], level=1e5)
    assert adata.obsm["counts"].dtype == np.int32
    assert adata.obsm["counts"].max() > 65_535


def test_seeds_decide_everything_and_parts_do_not_disturb_each_other():
    one, same, other = bulk(**SMALL), bulk(**SMALL), bulk(**SMALL, seed=1)
    np.testing.assert_array_equal(one.obsm["counts"], same.obsm["counts"])
    np.testing.assert_array_equal(one.obsm["depth"], same.obsm["depth"])
    assert (one.obsm["counts"] != other.obsm["counts"]).any()
    shared = bulk(**SMALL, seed=1, profile_seed=0).uns["truth"]
    for key in ("shared", "domain", "motifs", "steepness"):
        np.testing.assert_array_equal(shared[key], one.uns["truth"][key])
        assert (other.uns["truth"][key] != one.uns["truth"][key]).any()
    assert (shared["state"] != one.uns["truth"]["state"]).any()
    counts = one.uns["truth"]["counts"]
    fewer = bulk(**SMALL | {"n_biosamples": 3})
    np.testing.assert_array_equal(fewer.uns["truth"]["counts"], counts[:3])
    np.testing.assert_array_equal(fewer.obsm["depth"], one.obsm["depth"][:3])
    for options in ({"missing": 0.9}, {"unknown": 0.5}, {"signal": True}, {"dna": True}):
        np.testing.assert_array_equal(bulk(**SMALL, **options).uns["truth"]["counts"], counts)


def test_the_object_can_be_written_and_read(tmp_path):
    adata = bulk(**SMALL, signal=True, dna=True, unknown=0.2)
    adata.write_h5ad(tmp_path / "bulk.h5ad")
    read = ad.read_h5ad(tmp_path / "bulk.h5ad")
    for key in adata.obsm:
        np.testing.assert_array_equal(read.obsm[key], adata.obsm[key])
    assert read.uns["bins"]["chrom"].tolist() == adata.uns["bins"]["chrom"].tolist()
    np.testing.assert_array_equal(read.uns["truth"]["log_rate"], adata.uns["truth"]["log_rate"])
    np.testing.assert_array_equal(read.uns["dna"], adata.uns["dna"])
    # subsets keep rows and columns together
    np.testing.assert_array_equal(adata[[3]].obsm["counts"], adata.obsm["counts"][[3]])
