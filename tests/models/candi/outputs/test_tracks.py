from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pytest
from scipy import stats

import epivi
from epivi._errors import ConfigError

LAYERS = ["mean", "median", "var", "lower", "upper"]
BOTH = [*LAYERS, *(f"signal_{name}" for name in LAYERS)]


def test_results_have_names(trained, simulated):
    found = trained.impute("chr2")
    missing = np.argwhere(~simulated.obsm["availability"])
    expected = [f"{simulated.obs_names[b]}|{simulated.var_names[a]}" for b, a in missing]
    assert list(found.obs_names) == expected
    assert not found.obs["available"].any()
    assert [name for name in found.layers if name] == BOTH
    bins = simulated.uns["bins"]
    assert (found.var[["start", "end"]].to_numpy() == bins[bins["chrom"] == "chr2"][["start", "end"]].to_numpy()).all()
    np.testing.assert_array_equal(found.X, found.layers["mean"])
    assert found.uns["signal_transform"] == "arcsinh"
    assert trained.denoise("chr2").obs["available"].all()
    assert trained.get_normalized_expression("chr2").shape == (20, 320)


def test_values_of_unavailable_assays_have_no_influence(trained, simulated, assert_same_tracks):
    noisy = simulated.copy()
    hidden = ~simulated.obsm["availability"]
    rng = np.random.default_rng(0)
    noisy.obsm["counts"][hidden] = rng.integers(0, 900, (hidden.sum(), 1040))
    noisy.obsm["signal"][hidden] = np.nan
    for name in ("depth", "coverage", "read_length"):
        noisy.obsm[name][hidden] = rng.uniform(1, 9, hidden.sum())
    noisy.obsm["run_type"][hidden] = 1
    for method in ("impute", "denoise", "get_normalized_expression"):
        expected = getattr(trained, method)("chr3")
        assert_same_tracks(getattr(trained, method)("chr3", adata=noisy), expected, atol=0)
    first = trained.impute("chr3", leave_one_out=True)
    assert_same_tracks(trained.impute("chr3", leave_one_out=True, adata=noisy), first, atol=0)
    z = trained.get_latent_representation("chr3").X
    np.testing.assert_array_equal(trained.get_latent_representation("chr3", adata=noisy).X, z)


@pytest.mark.parametrize("locus_prior", [False, True])
def test_leave_one_out_does_not_see_what_it_predicts(simulated, make, learn, locus_prior):
    model = learn(make(simulated.copy(), locus_prior=locus_prior), 1)
    other = simulated.copy()
    other.obsm["counts"][1, 3] = 50
    other.obsm["signal"][1, 3] = 9.0
    if locus_prior:
        # the mean moves with the values that are in it
        probe = make(other.copy(), locus_prior=True)
        other.varm["locus_prior"] = probe.adata.varm["locus_prior"]
    asked = {"assays": ["H3K27ac", "H3K4me3"], "biosamples": "biosample_1", "leave_one_out": True}
    first, second = model.impute("chr1", **asked), model.impute("chr1", adata=other, **asked)
    assert list(first.obs["assay"]) == ["H3K27ac", "H3K4me3"]
    for name in ("mean", "var", "signal_mean", "signal_var"):
        np.testing.assert_allclose(first.layers[name][0], second.layers[name][0], rtol=2e-3, atol=1e-4)
        assert not np.allclose(first.layers[name][1], second.layers[name][1], rtol=1e-2)


def test_order_company_and_batch_size_change_nothing(trained, assert_same_tracks):
    expected = trained.denoise("chr1")
    for size in (1, 7):
        assert_same_tracks(trained.denoise("chr1", batch_size=size), expected)
    names = [f"biosample_{b}" for b in (4, 2, 0, 3, 1)]
    found = trained.denoise("chr1", biosamples=names)
    assert_same_tracks(found[expected.obs_names].copy(), expected)
    one = trained.denoise("chr1", ["H3K4me3"], "biosample_2")
    assert_same_tracks(one, expected[one.obs_names].copy())


def test_the_region_chooses_bins_and_changes_none(trained, assert_same_tracks):
    whole = trained.impute()
    for region in ("chr1:3,250-3,600", ["chr3", "chr1:0-25"], ("chr2", 0, 5000)):
        part = trained.impute(region)
        assert_same_tracks(part, whole[:, part.var_names].copy())


def test_the_order_of_biosamples_in_the_data_changes_nothing(trained, simulated, assert_same_tracks):
    order = [3, 0, 4, 1, 2]
    found = trained.impute("chr2", adata=simulated[order].copy())
    expected = trained.impute("chr2")
    assert_same_tracks(found[expected.obs_names].copy(), expected)


def test_a_query_with_other_assays_bins_and_names_gives_the_same(trained, adata, on_bins, assert_same_tracks, caplog):
    rows = [1, 2, 3]
    query = on_bins(adata, (adata.uns["bins"]["chrom"] == "chr2").to_numpy(), ["H3K27ac", "DNase", "H3K4me3"])[rows]
    query = query.copy()
    query.obs_names = ["x", "y", "z"]
    with caplog.at_level(logging.WARNING, logger="epivi"):
        found = trained.get_normalized_expression(adata=query)
    assert "adata lacks the assays 'ATAC': they count as unavailable" in caplog.text
    expected = trained.get_normalized_expression("chr2", biosamples=[f"biosample_{b}" for b in rows])
    assert found.obs["assay"].tolist() == expected.obs["assay"].tolist()
    found.obs_names = expected.obs_names
    assert_same_tracks(found, expected)
    assert found.obs["available"].tolist() == expected.obs["available"].tolist()


def test_intervals_are_quantiles_of_the_predicted_laws(trained):
    found = trained.impute("chr3", interval=0.8, threshold=2.0)
    mean, var = (found.layers[name].astype(np.float64) for name in ("mean", "var"))
    theta = mean**2 / (var - mean)
    law = stats.nbinom(theta, theta / (theta + mean))
    for name, q in (("lower", 0.1), ("median", 0.5), ("upper", 0.9)):
        # the parameters were rounded to single precision on the way: a step may fall to its other side
        assert np.mean(found.layers[name] != law.ppf(q)) < 2e-3
    np.testing.assert_allclose(found.layers["exceeds"], law.sf(2.0), atol=1e-3)
    normal = stats.norm(found.layers["signal_mean"], np.sqrt(found.layers["signal_var"]))
    for name, q in (("lower", 0.1), ("median", 0.5), ("upper", 0.9)):
        np.testing.assert_allclose(found.layers[f"signal_{name}"], normal.ppf(q), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.layers["signal_exceeds"], normal.sf(2.0), atol=1e-5)
    assert "lower" not in trained.impute("chr3", interval=None).layers


def test_the_original_scale_is_that_before_arcsinh(trained):
    plain, found = trained.denoise("chr3"), trained.denoise("chr3", original_scale=True, threshold=3.0)
    u, v = plain.layers["signal_mean"], plain.layers["signal_var"]
    np.testing.assert_allclose(found.layers["signal_mean"], np.sinh(u) * np.exp(v / 2), rtol=1e-4)
    for name in ("median", "lower", "upper"):
        np.testing.assert_allclose(found.layers[f"signal_{name}"], np.sinh(plain.layers[f"signal_{name}"]), rtol=1e-4)
    np.testing.assert_allclose(found.layers["signal_exceeds"], stats.norm(u, np.sqrt(v)).sf(np.arcsinh(3.0)), atol=1e-5)
    np.testing.assert_array_equal(found.layers["mean"], plain.layers["mean"])
    assert found.uns["signal_transform"] == "none"


def test_twice_the_depth_is_twice_the_mean_where_depth_is_an_offset_alone(offset_only):
    for method in ("impute", "denoise", "get_normalized_expression"):
        one, two = (getattr(offset_only, method)("chr3", covariates={"depth": d}) for d in (1e7, 2e7))
        np.testing.assert_allclose(two.layers["mean"], 2 * one.layers["mean"], rtol=1e-5)
        # theta is the same: the variance is m + m^2 / theta
        theta = [x.layers["mean"] ** 2 / (x.layers["var"] - x.layers["mean"]) for x in (one, two)]
        np.testing.assert_allclose(theta[0], theta[1], rtol=1e-2)


def test_depths_may_be_asked_for_by_assay(offset_only):
    own = offset_only.denoise("chr3", biosamples="biosample_1")
    depth = offset_only.adata.obsm["depth"][1]
    found = offset_only.denoise("chr3", biosamples="biosample_1", covariates={"depth": {"DNase": 3 * depth[0]}})
    np.testing.assert_allclose(found.layers["mean"][0], 3 * own.layers["mean"][0], rtol=1e-4)
    np.testing.assert_array_equal(found.layers["mean"][1:], own.layers["mean"][1:])


def test_supertracks_are_at_one_depth_even_if_the_model_does_not_read_it(offset_only):
    found = offset_only.get_normalized_expression("chr3")
    depth_ref = dict(zip(offset_only.assay_names, np.asarray(offset_only.state["depth_ref"]), strict=True))
    at_reference = offset_only.get_normalized_expression("chr3", covariates={"depth": depth_ref})
    np.testing.assert_allclose(found.layers["mean"], at_reference.layers["mean"], rtol=1e-6)
    measured = offset_only.denoise("chr3")
    row = measured.obs_names[0]
    ratio = measured[row].layers["mean"] / found[row].layers["mean"]
    assert not np.allclose(ratio, 1, atol=1e-2)


def test_supertracks_are_predicted_at_typical_covariates(trained, assert_same_tracks):
    typical = trained._typical_covariates(None)
    found = trained.get_normalized_expression("chr3")
    measured = trained.denoise("chr3", covariates=typical)
    missing = trained.impute("chr3", covariates=typical)
    together = ad.concat([measured, missing])[found.obs_names].copy()
    for name in ("mean", "var", "signal_mean"):
        np.testing.assert_allclose(found.layers[name], together.layers[name], rtol=1e-4)
    own = trained.denoise("chr3")
    assert not np.allclose(own.layers["mean"], measured.layers["mean"])
    asked = trained.get_normalized_expression("chr3", covariates={"run_type": "paired", "depth": 3e7})
    expected = trained.get_normalized_expression(
        "chr3", covariates=typical | {"run_type": "paired", "depth": 3e7, "coverage": None}
    )
    assert_same_tracks(asked, expected, atol=0)


@pytest.mark.parametrize("kind", ["zarr", "dask"])
def test_arrays_on_disk_give_the_same(simulated, make, learn, same_weights, assert_same_tracks, tmp_path, kind):
    first = learn(make(simulated.copy(), locus_prior=True), 1)
    data = simulated.copy()
    for key in ("counts", "signal"):
        if kind == "dask":
            array = pytest.importorskip("dask.array").from_array(data.obsm[key], chunks=(1, 4, 256))
        else:
            zarr = pytest.importorskip("zarr")
            array = zarr.create_array(
                tmp_path / key, shape=(5, 4, 1040), chunks=(1, 1, 256), dtype=data.obsm[key].dtype
            )
            array[:] = data.obsm[key]
        data.obsm[key] = array
    second = learn(make(data, locus_prior=True), 1)
    assert same_weights(first, second)
    assert_same_tracks(second.impute(), first.impute(), atol=0)
    assert first.evaluate().equals(second.evaluate())


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"interval": 1.0}, "interval=1.0 is out of range"),
        ({"interval": "wide"}, "interval='wide'"),
        ({"threshold": np.nan}, "threshold=nan"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"covariates": {"dept": 1}}, "no covariate 'dept'"),
    ],
)
def test_unfit_arguments_are_refused(trained, asked, match):
    with pytest.raises(ConfigError, match=match):
        trained.impute("chr3", **asked)


def test_a_model_that_was_not_trained_warns(adata, make):
    model = make(adata)
    with pytest.warns(UserWarning, match="untrained"):
        model.denoise("chr3")


def test_other_kinds_of_input_work_alike(make, learn):
    data = epivi.simulate.bulk(3, 4, chrom_sizes=[320, 160], dna=True, signal=True, seed=2)
    setup = {"validation_chroms": ["chr2"], "test_chroms": None}
    model = learn(make(data, setup=setup | {"counts_key": None}, skip=True, hide_all_rate=0.2), 1)
    found = model.impute("chr2", original_scale=True, leave_one_out=True)
    assert [name for name in found.layers if name] == LAYERS
    assert np.isfinite(found.layers["mean"]).all()
    # DNA is read: other bases change the prediction
    other = data.copy()
    other.uns["dna"] = (3 - np.minimum(data.uns["dna"], 3)).astype(np.uint8)
    assert not np.allclose(model.impute("chr2", leave_one_out=True, adata=other).layers["mean"], found.layers["mean"])
