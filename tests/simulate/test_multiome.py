from __future__ import annotations

import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.special import softmax

from epivi._errors import ConfigError, DataError
from epivi.simulate import accessibility, multiome

ATAC = {"n_fg": 150, "n_bg": 100, "median": 60, "clip": (10, 120)}
# anndata 0.13 and mudata 0.4 use deprecated parts of pandas 3.1 when they take subsets and write files
mudata_on_pandas_3 = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")


def simulate(n_cells=(30, 20), **changes):
    return multiome(list(n_cells), **{"n_genes": 40, "rna_dims": 5, "atac_kwargs": ATAC, **changes})


def test_reference_membership_and_missing_rows_agree():
    mdata = simulate(n_atac_only=12)
    has = mdata.obs["has_reference"].to_numpy()
    assert mdata.obs["has_reference"].dtype == bool
    np.testing.assert_array_equal(has, mdata.obs_names.isin(mdata["rna"].obs_names))
    np.testing.assert_array_equal(has, np.r_[np.ones(50, dtype=bool), np.zeros(12, dtype=bool)])
    reference = mdata.obsm["reference"]
    np.testing.assert_array_equal(np.isnan(reference), np.repeat(~has[:, None], 5, axis=1))
    np.testing.assert_array_equal(reference[has], mdata["rna"].obsm["X_pca"])
    assert mdata.obs_names.tolist() == mdata["atac"].obs_names.tolist()
    assert mdata.obs_names[:50].tolist() == mdata["rna"].obs_names.tolist()


def test_output_has_the_documented_form():
    mdata = simulate([[20, 10], [0, 12]], n_subtypes=[2, 3])
    assert list(mdata.mod) == ["atac", "rna"]
    assert list(mdata.obs) == ["cell_type", "subtype", "batch", "has_reference"]
    atac, rna = mdata["atac"], mdata["rna"]
    assert type(atac.X) is sparse.csr_matrix
    assert type(rna.X) is sparse.csr_matrix
    assert rna.X.dtype == atac.X.dtype == np.int32
    assert rna.shape == (42, 40)
    assert rna.varm["loadings"].shape == (40, 5)
    assert list(rna.obs) == ["cell_type", "subtype", "batch", "rna_depth"]
    assert list(atac.varm["bulk"]) == ["type_0.0", "type_0.1", "type_1.0", "type_1.1", "type_1.2"]
    for obs in (mdata.obs, atac.obs, rna.obs):
        counts = obs.groupby("subtype", observed=True).size().to_dict()
        assert counts == {"type_0.0": 10, "type_0.1": 10, "type_1.0": 8, "type_1.1": 7, "type_1.2": 7}
        assert (obs["subtype"].str.split(".").str[0] == obs["cell_type"].astype(str)).all()
        assert all(isinstance(obs[key].dtype, pd.CategoricalDtype) for key in ("cell_type", "subtype", "batch"))
    fragments = atac.obs["fragments"].to_numpy()
    np.testing.assert_array_equal(atac.X.sum(axis=1).A1, fragments)
    record = mdata.uns["simulation"]
    assert record["simulator"] == "multiome"
    assert record["subtype_only_in"] == "both"
    assert record["centres"].shape == (5, 5)
    assert atac.uns["simulation"]["profiles"] == "synthetic"


def test_rna_counts_follow_embedding_and_depth():
    mdata = simulate([400, 300], rna_median=5000, n_genes=20)
    rna = mdata["rna"]
    expected = softmax(rna.obsm["X_pca"] @ rna.varm["loadings"].T, axis=1) * rna.obs["rna_depth"].to_numpy()[:, None]
    pearson = (rna.X.toarray() - expected) / np.sqrt(expected)
    assert abs(pearson.mean()) < 0.05
    assert abs(pearson.var() - 1) < 0.05
    log_depths = np.log(rna.obs["rna_depth"]), np.log(mdata["atac"].obs["depth"])
    assert np.corrcoef(*log_depths)[0, 1] == pytest.approx(0.5, abs=0.1)


def test_embedding_lies_about_the_true_centres():
    mdata = simulate([300, 200], rna_noise=0.1)
    rna, centres = mdata["rna"], mdata.uns["simulation"]["centres"]
    residual = rna.obsm["X_pca"] - centres.loc[rna.obs["subtype"].tolist()].to_numpy()
    assert residual.std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("only_in", [None, "atac", "rna"])
def test_subtypes_show_where_they_should(only_in):
    mdata = simulate(subtype_only_in=only_in)
    bulk, centres = mdata["atac"].varm["bulk"], mdata.uns["simulation"]["centres"]
    foreground = mdata["atac"].var["foreground"].to_numpy()
    ratio = (bulk["type_0.0"] / bulk["type_0.1"]).to_numpy()
    np.testing.assert_array_equal(ratio[~foreground], 1.0)
    changed = ~np.isclose(ratio[foreground], np.median(ratio[foreground]))
    # 8 % of 150 regions in each of two sub-types, some of them in common
    assert changed.sum() == 0 if only_in == "rna" else 12 <= changed.sum() <= 24
    assert np.allclose(centres.loc["type_0.0"], centres.loc["type_0.1"]) == (only_in == "atac")
    assert not np.allclose(bulk["type_0.0"], bulk["type_1.0"])
    assert not np.allclose(centres.loc["type_0.0"], centres.loc["type_1.0"])


def test_type_profiles_are_those_of_the_accessibility_simulator():
    hidden = simulate(subtype_only_in="rna", seed=4)["atac"].varm["bulk"]
    plain = accessibility([3, 3], **ATAC, seed=4).varm["bulk"]
    np.testing.assert_allclose(hidden["type_1.0"], plain["type_1"])


def test_cells_without_rna_are_shallow_and_leave_the_others_alone():
    atac = {**ATAC, "median": [80, 40], "log_sd": [0.0, 0.0], "rho": [0.5, 0.4], "clip": [(10, 120), (5, 120)]}
    n_cells = [[30, 10], [10, 30]]
    without, hybrid = (simulate(n_cells, n_atac_only=n, atac_kwargs=atac) for n in (0, 16))
    kept = slice(0, 80)
    np.testing.assert_array_equal(hybrid["atac"].X[kept].toarray(), without["atac"].X.toarray())
    np.testing.assert_array_equal(hybrid["rna"].X.toarray(), without["rna"].X.toarray())
    np.testing.assert_array_equal(hybrid["rna"].obsm["X_pca"], without["rna"].obsm["X_pca"])
    extra = hybrid["atac"].obs.iloc[80:]
    assert extra["batch"].unique().tolist() == ["batch_2"]
    assert extra["fragments"].unique().tolist() == [30]  # half of the mean of 80 and 40
    assert extra["cell_type"].value_counts(sort=False).tolist() == [8, 8]
    foreground = hybrid["atac"].var["foreground"].to_numpy()
    np.testing.assert_array_equal(hybrid["atac"].X[80:][:, foreground].sum(axis=1).A1, 15)
    assert hybrid["rna"].obs["batch"].cat.categories.tolist() == ["batch_0", "batch_1"]


def test_unique_types_leave_one_type_out_of_each_batch():
    mdata = simulate([30, 20, 10], n_atac_only=20, unique_types=True)
    table = pd.crosstab(mdata.obs["batch"], mdata.obs["cell_type"])
    assert table.to_numpy().tolist() == [[30, 20, 0], [15, 0, 5]]


def test_shuffled_reference_is_a_permutation_without_identity():
    plain, shuffled = simulate([300, 300]), simulate([300, 300], shuffle_reference=True)
    first, second = plain["rna"].obsm["X_pca"], shuffled["rna"].obsm["X_pca"]
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(second, axis=0))
    np.testing.assert_array_equal(plain["atac"].X.toarray(), shuffled["atac"].X.toarray())
    is_first = (plain["rna"].obs["cell_type"] == "type_0").to_numpy()
    gap = [np.linalg.norm(r[is_first].mean(axis=0) - r[~is_first].mean(axis=0)) for r in (first, second)]
    assert gap[1] < 0.2 * gap[0]


def test_same_seed_same_data_and_other_seeds_differ():
    first, again, other = (simulate(seed=seed) for seed in (1, 1, 2))
    for key in ("atac", "rna"):
        np.testing.assert_array_equal(first[key].X.toarray(), again[key].X.toarray())
        assert (first[key].X != other[key].X).nnz > 0
    np.testing.assert_array_equal(first.obsm["reference"], again.obsm["reference"])
    assert not np.allclose(first.obsm["reference"], other.obsm["reference"])


def test_a_batch_does_not_depend_on_the_others():
    small, large = (simulate([[n, 6], [20, 10]]) for n in (4, 18))
    for key in ("atac", "rna"):
        np.testing.assert_array_equal(small[key].X[-30:].toarray(), large[key].X[-30:].toarray())
    np.testing.assert_array_equal(small.obsm["reference"][-30:], large.obsm["reference"][-30:])


def test_profiles_and_depth_factors_go_by_type():
    rng = np.random.default_rng(0)
    atac = {
        **ATAC,
        "profiles": {"B": rng.random(150), "T": rng.random(150)},
        "depth_by_type": [1.0, 0.5],
        "log_sd": 0.0,
    }
    mdata = simulate(atac_kwargs=atac, subtype_only_in="rna")
    assert mdata.obs["subtype"].cat.categories.tolist() == ["B.0", "B.1", "T.0", "T.1"]
    assert mdata["atac"].obs.groupby("cell_type", observed=True)["fragments"].unique().explode().tolist() == [60, 30]
    foreground = mdata["atac"].var["foreground"].to_numpy()
    weights = atac["profiles"]["T"] / atac["profiles"]["T"].sum()
    np.testing.assert_allclose(mdata["atac"].varm["bulk"]["T.1"][foreground], weights)
    assert mdata["atac"].uns["simulation"]["profiles"] == "given"


def test_rare_is_about_types_not_subtypes():
    rare = simulate([96, 4], n_subtypes=[30, 1])["atac"].obs.groupby("cell_type", observed=True)["rare"].mean()
    assert rare.to_dict() == {"type_0": 0, "type_1": 1}


def test_without_counts_only_the_embedding_remains():
    mdata = simulate(rna_counts=False)
    assert mdata["rna"].shape == (50, 0)
    assert mdata["rna"].X is None
    np.testing.assert_array_equal(mdata["rna"].obsm["X_pca"], simulate()["rna"].obsm["X_pca"])


@mudata_on_pandas_3
@pytest.mark.parametrize("rna_counts", [True, False])
def test_a_file_and_an_update_give_back_the_same(tmp_path, rna_counts):
    mdata = simulate(n_atac_only=10, rna_counts=rna_counts)
    mdata.update()
    mdata.write(tmp_path / "m.h5mu")
    back = mudata.read_h5mu(tmp_path / "m.h5mu")
    np.testing.assert_array_equal(back.obsm["reference"], mdata.obsm["reference"])
    np.testing.assert_array_equal(back["atac"].X.toarray(), mdata["atac"].X.toarray())
    assert back.obs_names.tolist() == mdata.obs_names.tolist()
    assert back.obs["has_reference"].tolist() == mdata.obs["has_reference"].tolist()
    np.testing.assert_array_equal(back.uns["simulation"]["centres"], mdata.uns["simulation"]["centres"])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n_cells": [5, -1]}, ConfigError, r"n_cells\[0\]\[1\]=-1"),
        ({"subtype_only_in": "atca"}, ConfigError, "subtype_only_in='atca' is unknown. Did you mean 'atac'"),
        ({"n_subtypes": 0}, ConfigError, "n_subtypes=0"),
        ({"n_subtypes": [2]}, ConfigError, "n_subtypes has 1 entries for 2 types"),
        ({"n_subtypes": [2, 0]}, ConfigError, r"n_subtypes\[1\]=0"),
        ({"subtype_share": 1.5}, ConfigError, "subtype_share=1.5"),
        ({"subtype_effect_sd": -1}, ConfigError, "subtype_effect_sd=-1"),
        ({"rna_dims": 0}, ConfigError, "rna_dims=0"),
        ({"rna_noise": -0.5}, ConfigError, "rna_noise=-0.5"),
        ({"rna_subtype_sd": np.inf}, ConfigError, "rna_subtype_sd=inf"),
        ({"rna_median": 0}, ConfigError, "rna_median=0"),
        ({"rna_log_sd": np.nan}, ConfigError, "rna_log_sd=nan"),
        ({"n_genes": 0}, ConfigError, "n_genes=0"),
        ({"n_atac_only": -1}, ConfigError, "n_atac_only=-1"),
        ({"seed": -2}, ConfigError, "seed=-2"),
        ({"unique_types": True}, ConfigError, "unique_types=True needs two batches and two types, found 1 and 2"),
        ({"unique_types": True, "n_cells": [0, 5], "n_atac_only": 3}, ConfigError, "leaves a modality without cells"),
        ({"atac_kwargs": {"medain": 5}}, ConfigError, "atac_kwargs holds the unknown keyword 'medain'"),
        ({"atac_kwargs": {"seed": 5}}, ConfigError, "atac_kwargs may not hold 'seed'"),
        ({"atac_kwargs": {"n_cells": [5]}}, ConfigError, "atac_kwargs may not hold 'n_cells'"),
        ({"atac_kwargs": {"rho": 3}}, ConfigError, "rho=3"),
        ({"atac_kwargs": {"profile_seed": -3}}, ConfigError, "profile_seed=-3"),
        ({"atac_kwargs": {"depth_by_type": [1, 1, 1, 1]}}, ConfigError, "depth_by_type has 4 entries for 2 types"),
        ({"atac_kwargs": {"profiles": {"a": [1], "b": [-1]}, "n_fg": 1}}, DataError, r"profiles\['b'\] holds -1.0"),
        ({"atac_kwargs": {"median": [1, 2]}, "n_atac_only": 5}, ConfigError, "median has 2 entries for 1 batches"),
    ],
)
def test_what_is_refused_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        multiome(**{"n_cells": [5, 5], **arguments})
