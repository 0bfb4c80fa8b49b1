from __future__ import annotations

from itertools import permutations

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from epivi._errors import ConfigError, DataError
from epivi.simulate import accessibility, inclusion_probability
from epivi.simulate.scatac import WeightedSampler, rare_types

# anndata 0.13 reads deprecated options of pandas 3.1 when it takes subsets and writes files
anndata_on_pandas_3 = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")

SMALL = {"n_fg": 120, "n_bg": 80, "median": 50, "clip": (10, 90)}


def foreground_sums(adata):
    return np.asarray(adata.X[:, adata.var["foreground"].to_numpy()].sum(axis=1)).ravel()


def row_sums(adata):
    return np.asarray(adata.X.sum(axis=1)).ravel()


def test_sampler_gives_the_probabilities_of_successive_draws():
    weights = np.array([1.0, 2.0, 3.0, 6.0])
    share = weights / weights.sum()
    exact = np.zeros(4)
    for first, second in permutations(range(4), 2):  # first, then second among the others
        exact[[first, second]] += share[first] * share[second] / (1 - share[first])
    rng, n = np.random.default_rng(0), 40_000
    sampler = WeightedSampler(weights, np.arange(4))
    hits = sum(np.bincount(sampler.draw(2, rng), minlength=4) for _ in range(n))
    assert exact.sum() == pytest.approx(2.0)
    np.testing.assert_allclose(hits / n, exact, atol=0.01)


def test_sampler_skips_weight_zero_never_repeats_and_is_capped():
    sampler = WeightedSampler(np.array([0.0, 1.0, 5.0, 0.0, 2.0]), np.array([10, 11, 12, 13, 14]))
    rng = np.random.default_rng(0)
    assert sampler.draw(0, rng).size == 0
    for m in (1, 2, 3, 9):
        drawn = sampler.draw(m, rng)
        assert len(set(drawn.tolist())) == min(m, 3)
        assert set(drawn.tolist()) <= {11, 12, 14}


@settings(max_examples=25, deadline=None)
@given(
    n_cells=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=3).filter(
        lambda table: sum(map(sum, table)) > 0
    ),
    rho=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_counts_rows_and_foreground_share_are_exact(n_cells, rho, seed):
    adata = accessibility(n_cells, **SMALL, rho=rho, seed=seed)
    fragments = adata.obs["fragments"].to_numpy()
    assert set(np.unique(adata.X.data)) <= {1, 2}
    np.testing.assert_array_equal(row_sums(adata), fragments)
    np.testing.assert_array_equal(foreground_sums(adata), np.rint(fragments * rho))
    np.testing.assert_array_equal(adata.obs["depth"], adata.X.getnnz(axis=1))
    assert row_sums(adata).min() > 0
    assert adata.n_obs == np.sum(n_cells)


def test_output_has_the_documented_form():
    adata = accessibility([[5, 3], [0, 4]], **SMALL)
    assert type(adata.X) is sparse.csr_matrix
    assert adata.X.dtype == np.int32
    assert adata.X.has_canonical_format
    assert list(adata.obs) == ["cell_type", "batch", "fragments", "depth", "rare"]
    assert list(adata.var) == ["chrom", "start", "end", "foreground"]
    assert adata.obs["cell_type"].value_counts(sort=False).to_dict() == {"type_0": 5, "type_1": 7}
    assert adata.obs["batch"].value_counts(sort=False).to_dict() == {"batch_0": 8, "batch_1": 4}
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique
    bulk, foreground = adata.varm["bulk"], adata.var["foreground"].to_numpy()
    assert list(bulk) == ["type_0", "type_1"]
    np.testing.assert_array_equal(bulk["type_0"][~foreground], bulk["type_1"][~foreground])
    np.testing.assert_allclose(bulk[foreground].sum(), 1.0)
    np.testing.assert_allclose(bulk[~foreground].sum(), 1.0)


def test_the_record_holds_every_argument():
    record = accessibility([[5], [4]], **SMALL, rho=[0.3, 0.5], seed=7, profile_seed=2).uns["simulation"]
    expected = {"n_fg": 120, "n_bg": 80, "specificity": 0.25, "effect_sd": 1.6, "seed": 7, "profile_seed": 2}
    assert {key: record[key] for key in expected} == expected
    np.testing.assert_array_equal(record["n_cells"], [[5], [4]])
    np.testing.assert_array_equal(record["rho"], [0.3, 0.5])
    np.testing.assert_array_equal(record["median"], [50, 50])
    np.testing.assert_array_equal(record["clip"], [[10, 90], [10, 90]])
    assert record["profiles"] == "synthetic"
    assert set(record["versions"]) == {"epivi", "numpy", "anndata"}


def test_fragments_have_the_stated_median_limits_and_tails():
    # F 5,000, sigma 1.5, limits 1,000 and 20,000: 14 % and 18 % of cells sit at the limits
    adata = accessibility([20_000], n_fg=2, n_bg=2, median=5000, log_sd=1.5, clip=(1000, 20_000))
    fragments = adata.obs["fragments"].to_numpy()
    assert fragments.min() == 1000
    assert fragments.max() == 20_000
    at_limits = [(fragments == 1000).mean(), (fragments == 20_000).mean()]
    np.testing.assert_allclose(at_limits, stats.norm.cdf([np.log(1 / 5) / 1.5, -np.log(4) / 1.5]), atol=0.01)
    np.testing.assert_array_equal(row_sums(adata), 8)  # capped: all four regions, both copies


def test_median_is_within_two_percent():
    adata = accessibility([20_000], n_fg=2, n_bg=2)
    assert abs(adata.obs["fragments"].median() / 600 - 1) < 0.02
    assert adata.obs["fragments"].between(100, 4000).all()
    assert abs(np.log(adata.obs["fragments"]).std() / 0.8 - 1) < 0.05


def test_a_very_wide_spread_raises_no_overflow():
    fragments = accessibility([50], **{**SMALL, "log_sd": 1e4}).obs["fragments"]
    assert set(fragments) <= {10, 90}


def test_depth_arguments_go_by_batch_and_type():
    adata = accessibility(
        [[3, 3], [3, 3]], n_fg=200, n_bg=200, median=[40, 100], log_sd=0, rho=[0.2, 0.5],
        clip=[(1, 60), (1, 90)], depth_by_type=[1.0, 0.5],
    )  # fmt: skip
    fragments = adata.obs.groupby(["batch", "cell_type"], observed=True)["fragments"].unique().explode()
    assert fragments.tolist() == [40, 20, 90, 50]
    share = foreground_sums(adata) / row_sums(adata)
    np.testing.assert_allclose(share, np.repeat([0.2, 0.5], 6))


def test_open_frequency_follows_weight_and_the_stated_probability():
    adata = accessibility([20_000], n_fg=150, n_bg=0, median=60, log_sd=0, rho=1.0, clip=(10, 100), seed=2)
    bulk = adata.varm["bulk"]["type_0"].to_numpy()
    frequency = adata.X.getnnz(axis=0) / adata.n_obs
    assert stats.spearmanr(frequency, bulk).statistic > 0.99
    assert np.abs(frequency - inclusion_probability(bulk, 30)).max() < 0.012


@anndata_on_pandas_3
def test_regions_of_weight_zero_stay_closed_and_given_profiles_are_kept():
    weights = {"B": np.r_[np.zeros(20), np.ones(30)], "T": np.r_[np.ones(30), np.zeros(20)]}
    background = np.r_[0.0, np.ones(9)]
    adata = accessibility(
        [40, 40], n_fg=50, n_bg=10, median=30, clip=(10, 50), rho=0.8, profiles=weights, background=background
    )
    foreground = adata.var["foreground"].to_numpy()
    for name, weight in weights.items():
        cells = adata[adata.obs["cell_type"] == name]
        hits = cells.X[:, foreground].sum(axis=0).A1
        assert (hits[weight == 0] == 0).all()
        assert (hits[weight > 0] > 0).all()
        np.testing.assert_allclose(adata.varm["bulk"][name][foreground], weight / weight.sum())
    assert adata.X[:, np.flatnonzero(~foreground)[0]].sum() == 0
    assert adata.uns["simulation"]["profiles"] == "given"


def test_same_seed_same_data_and_other_seeds_differ():
    first, again, other = (accessibility([20, 10], **SMALL, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.X.toarray(), again.X.toarray())
    assert first.obs.equals(again.obs)
    assert (first.X != other.X).nnz > 0
    same_profiles = accessibility([20, 10], **SMALL, seed=2, profile_seed=1)
    assert same_profiles.varm["bulk"].equals(first.varm["bulk"])
    assert same_profiles.var.equals(first.var)
    assert (first.X != same_profiles.X).nnz > 0


@anndata_on_pandas_3
def test_a_batch_does_not_depend_on_the_others():
    small, large = (accessibility([[n, 5], [20, 10]], **SMALL) for n in (3, 17))
    parts = [adata[adata.obs["batch"] == "batch_1"] for adata in (small, large)]
    np.testing.assert_array_equal(parts[0].X.toarray(), parts[1].X.toarray())
    assert parts[0].obs.astype({"batch": str}).equals(parts[1].obs.astype({"batch": str}))
    assert small.varm["bulk"].equals(large.varm["bulk"])


@anndata_on_pandas_3
def test_more_cells_of_a_type_keep_the_first_ones():
    few, many = accessibility([5, 7], **SMALL), accessibility([9, 7], **SMALL)
    np.testing.assert_array_equal(few.X.toarray(), many[few.obs_names].X.toarray())


def test_empty_cells_come_on_demand_only():
    adata = accessibility([[10, 4], [6, 0]], **SMALL, allow_empty=True)
    empty = row_sums(adata) == 0
    assert adata.obs_names[empty].tolist() == ["batch_0:type_1:3", "batch_1:type_0:5"]
    assert (adata.obs["depth"][empty] == 0).all()
    np.testing.assert_array_equal(row_sums(adata), adata.obs["fragments"])


def test_rare_goes_by_share_of_the_batch():
    adata = accessibility([[96, 4], [3, 3]], **SMALL)
    rare = adata.obs.groupby(["batch", "cell_type"], observed=True)["rare"].mean().tolist()
    assert rare == [0, 1, 0, 0]
    assert not rare_types(np.array([[0, 10]])).any()


def test_density_and_depth_of_setting_s1():
    adata = accessibility([400, 400, 400, 360, 40])
    depth = np.percentile(adata.obs["depth"], [5, 50, 95])
    np.testing.assert_allclose(depth, [158, 560, 1751], rtol=0.12)
    assert abs(adata.X.nnz / np.prod(adata.shape) - 0.175) < 0.015
    assert adata.obs["rare"].sum() == 40


@anndata_on_pandas_3
def test_a_file_gives_back_the_same(tmp_path):
    adata = accessibility([[10, 4], [6, 0]], **SMALL, chrom_sizes="hg38")
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = anndata.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(back.X.toarray(), adata.X.toarray())
    np.testing.assert_array_equal(back.varm["bulk"], adata.varm["bulk"])
    np.testing.assert_array_equal(back.uns["simulation"]["n_cells"], [[10, 4], [6, 0]])
    assert back.uns["simulation"]["chrom_sizes"]["chr22"] == 50_818_468


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n_cells": [5, -3]}, ConfigError, r"n_cells\[0\]\[1\]=-3"),
        ({"n_fg": 0}, ConfigError, "n_fg=0"),
        ({"n_bg": -1}, ConfigError, "n_bg=-1"),
        ({"n_bg": 0}, ConfigError, "rho=0.4 sends fragments to the background and n_bg=0"),
        ({"rho": 1.2}, ConfigError, "rho=1.2"),
        ({"rho": -0.1}, ConfigError, "rho=-0.1"),
        ({"rho": [0.4, 0.5]}, ConfigError, "rho has 2 entries for 1 batches"),
        ({"clip": (90, 10)}, ConfigError, r"clip=\(90, 10\) is reversed"),
        ({"clip": (0, 10)}, ConfigError, "permits empty cells"),
        ({"median": 0}, ConfigError, "median=0"),
        ({"median": np.nan}, ConfigError, "median=nan"),
        ({"log_sd": -1}, ConfigError, "log_sd=-1"),
        ({"specificity": 2}, ConfigError, "specificity=2"),
        ({"effect_sd": -2}, ConfigError, "effect_sd=-2"),
        ({"seed": -1}, ConfigError, "seed=-1"),
        ({"seed": None}, ConfigError, "seed=None"),
        ({"profile_seed": 1.5}, ConfigError, "profile_seed=1.5"),
        ({"chrom_sizes": "mm10"}, ConfigError, "chrom_sizes='mm10'"),
        ({"depth_by_type": [1.0]}, ConfigError, "depth_by_type has 1 entries for 2 types"),
        ({"depth_by_type": [1.0, 0.0]}, ConfigError, r"depth_by_type\[1\]=0.0"),
        ({"profiles": {"a": np.ones(120), "b": -np.ones(120)}}, DataError, r"profiles\['b'\] holds -1.0 at region 0"),
        ({"profiles": {"a": np.ones(120)}}, DataError, "profiles holds 1 types and n_cells 2"),
        ({"profiles": {"a": np.ones(3), "b": np.ones(3)}}, DataError, r"profiles\['a'\] has shape \(3,\)"),
        ({"background": np.ones(3)}, DataError, r"background has shape \(3,\): give 80 weights"),
    ],
)
def test_what_is_refused_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        accessibility(**{"n_cells": [3, 3], **SMALL, **arguments})
