from __future__ import annotations

import logging

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

import epivi
from epivi._errors import DataError
from epivi._keys import OBS_HAS_REFERENCE, OBS_RNA_DEPTH, OBSM_REFERENCE
from epivi.models.sailerx.reference import ReferenceSource, min_max

# four cells: 2, 4, 4 and 1 open peaks; 8, 4, 1 and 32 RNA counts
OPEN = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
RNA = np.array([[8, 0], [2, 2], [0, 1], [30, 2]])
RATIO = np.log([8 / 2, 4 / 4, 1 / 4, 32 / 1])


def four_cells(*, rna_rows=(0, 1, 2, 3), names="abcd", rna=RNA, opened=OPEN):
    obs = pd.DataFrame(index=list(names))
    var = pd.DataFrame(index=[f"chr1:{i}00-{i}50" for i in range(1, 6)])
    atac = ad.AnnData(opened.astype(np.float32), obs=obs, var=var)
    rows = list(rna_rows)
    genes = pd.DataFrame(index=["g1", "g2"])
    expressed = ad.AnnData(rna[rows].astype(np.float32), obs=obs.iloc[rows], var=genes)
    expressed.obsm["X_pca"] = np.arange(1.0, 4 * 3 + 1).reshape(4, 3)[rows]
    return md.MuData({"atac": atac, "rna": expressed})


def model_of(mdata, **setup):
    epivi.SAILERX.setup_mudata(mdata, **setup)
    return epivi.SAILERX(mdata, n_latent=2, n_hidden=(4, 3), min_reference_per_batch=2)


def closed_form():
    """Min-max of the log ratios between the 1 % and 99 % quantiles, which lie 3 % of a gap inside the extremes."""
    r = np.sort(RATIO)
    low, high = r[0] + 0.03 * (r[1] - r[0]), r[3] - 0.03 * (r[3] - r[2])
    return low, high, np.clip((RATIO - low) / (high - low), 0, 1)


def test_the_weight_of_four_cells_is_the_closed_form():
    *_, expected = closed_form()
    weights = model_of(four_cells()).get_alignment_weights()
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert weights[2] == 0.0
    assert weights[3] == 1.0


def test_queries_use_the_limits_of_training_and_are_clamped():
    model = model_of(four_cells())
    low, high, _ = closed_form()
    query = four_cells(names="efgh", rna=np.array([[1000, 0], [3, 0], [0, 1], [2, 2]]))
    found = model._validate_anndata(query)
    weights = model.get_anndata_manager(found).get_from_registry("align_weight").ravel()
    ratio = np.log([1000 / 2, 3 / 4, 1 / 4, 4 / 1])
    np.testing.assert_allclose(weights, np.clip((ratio - low) / (high - low), 0, 1), rtol=1e-12)
    assert weights[0] == 1.0
    assert weights[2] == 0.0


def test_cells_without_rna_weigh_nothing_and_set_no_limits():
    mdata = four_cells(rna_rows=(3, 0, 1))
    model = model_of(mdata)
    r = np.sort(RATIO[[0, 1, 3]])
    low, high = r[0] + 0.02 * (r[1] - r[0]), r[2] - 0.02 * (r[2] - r[1])
    expected = np.clip((RATIO - low) / (high - low), 0, 1)
    expected[2] = 0
    np.testing.assert_allclose(model.get_alignment_weights(), expected, rtol=1e-12)
    assert mdata.obs[OBS_HAS_REFERENCE].tolist() == [True, True, False, True]
    expected = np.arange(1.0, 13).reshape(4, 3)
    expected[2] = 0
    np.testing.assert_array_equal(mdata.obsm[OBSM_REFERENCE], expected)


def test_equal_ratios_weigh_one():
    twice = np.repeat(OPEN.sum(1, keepdims=True), 2, axis=1)  # the ratios differ by rounding
    assert model_of(four_cells(rna=twice)).get_alignment_weights().tolist() == [1.0] * 4
    np.testing.assert_array_equal(min_max(np.array([3.0, 4.0]), np.nan, np.nan), [1.0, 1.0])
    np.testing.assert_allclose(min_max(np.array([-1.0, 0.5, 9.0]), 0.0, 2.0), [0.0, 0.25, 1.0])


def test_depths_below_one_count_as_one(caplog):
    with caplog.at_level(logging.WARNING, logger="epivi"):
        weights = model_of(four_cells(rna=np.array([[8, 0], [0, 0], [0, 1], [30, 2]]))).get_alignment_weights()
    assert "1 cells of mdata['rna'] have no RNA count" in caplog.text
    assert np.isfinite(weights).all()
    ratio = np.log([8 / 2, 1 / 4, 1 / 4, 32 / 1])
    low, high = np.quantile(ratio, [0.01, 0.99])
    np.testing.assert_allclose(weights, np.clip((ratio - low) / (high - low), 0, 1), rtol=1e-12)


def test_own_depths_are_used():
    mdata = four_cells()
    mdata["rna"].obs["n"] = [16.0, 8.0, 2.0, 64.0]
    mdata["atac"].obs["m"] = [4.0, 8.0, 8.0, 2.0]
    weights = model_of(mdata, rna_depth_key="n", depth_key="m").get_alignment_weights()
    np.testing.assert_allclose(weights, closed_form()[2], rtol=1e-12)
    assert mdata.obs[OBS_RNA_DEPTH].tolist() == [16.0, 8.0, 2.0, 64.0]
    mdata["rna"].obs["n"] = [16.0, 0.0, 2.0, 64.0]
    with pytest.raises(DataError, match=r"mdata\['rna'\].obs\['n'\] of cell 'b'.*above zero"):
        epivi.SAILERX.setup_mudata(mdata, rna_depth_key="n")


def test_any_key_of_obsm_can_be_the_reference():
    mdata = four_cells()
    mdata["rna"].obsm["X_scVI"] = np.eye(4)[:, :2] + 1
    model = model_of(mdata, reference_key="X_scVI")
    np.testing.assert_array_equal(mdata.obsm[OBSM_REFERENCE], np.eye(4)[:, :2] + 1)
    assert model.module.n_reference == 2
    with pytest.raises(DataError, match=r"mdata\['rna'\].obsm has no entry 'X_scvi'. Did you mean 'X_scVI'"):
        epivi.SAILERX.setup_mudata(mdata, reference_key="X_scvi")


def test_rows_of_nan_have_no_reference():
    mdata = four_cells()
    mdata["rna"].obsm["X_pca"][1] = np.nan
    weights = model_of(mdata).get_alignment_weights()
    assert mdata.obs[OBS_HAS_REFERENCE].tolist() == [True, False, True, True]
    assert weights[1] == 0
    assert np.isfinite(mdata.obsm[OBSM_REFERENCE]).all()
    assert not mdata.obsm[OBSM_REFERENCE][1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.__setitem__((1, 0), np.nan), "partly NaN"),
        (lambda x: x.__setitem__((1, 0), np.inf), "infinite"),
        (lambda x: x.__setitem__(1, 0), "hold only zeros"),
        (lambda x: x.__setitem__(slice(1, None), np.nan), "1 of 4 cells have a reference"),
    ],
)
def test_a_reference_that_cannot_be_used_is_refused_with_the_cell(change, message):
    mdata = four_cells()
    change(mdata["rna"].obsm["X_pca"])
    with pytest.raises(DataError, match=message):
        epivi.SAILERX.setup_mudata(mdata)


def test_without_an_embedding_one_is_computed_and_it_is_said(simulated_multiome, caplog):
    mdata = simulated_multiome.copy()
    del mdata["rna"].obsm["X_pca"]
    with caplog.at_level(logging.WARNING, logger="epivi"):
        epivi.SAILERX.setup_mudata(mdata)
    assert "principal components of mdata['rna'] are computed" in caplog.text
    assert "X_pca" not in mdata["rna"].obsm
    reference = mdata.obsm[OBSM_REFERENCE][mdata.obs[OBS_HAS_REFERENCE]]
    assert reference.shape[0] == 70
    computed = epivi.pp.rna_reference(mdata["rna"], copy=True).obsm["X_pca"]
    rows = mdata["rna"].obs_names.get_indexer(mdata.obs_names[mdata.obs[OBS_HAS_REFERENCE]])
    np.testing.assert_allclose(reference, computed[rows], rtol=1e-5, atol=1e-6)


def test_a_modality_without_counts_needs_a_depth():
    mdata = four_cells()
    rna = ad.AnnData(None, obs=mdata["rna"].obs[[]].copy(), var=pd.DataFrame(index=pd.Index([], dtype=str)))
    rna.obsm["X_pca"] = mdata["rna"].obsm["X_pca"]
    bare = md.MuData({"atac": mdata["atac"].copy(), "rna": rna})
    with pytest.raises(DataError, match=r"holds no counts: name the RNA depth of the cells with rna_depth_key"):
        epivi.SAILERX.setup_mudata(bare)


def test_an_anndata_carries_the_reference_itself():
    adata = four_cells()["atac"].copy()
    adata.obsm["X_ref"] = np.array([[1.0, 2], [np.nan, np.nan], [3, 1], [2, 2]])
    epivi.SAILERX.setup_anndata(adata, "X_ref")
    model = epivi.SAILERX(adata, n_latent=2, n_hidden=(4, 3))
    assert model.get_alignment_weights().tolist() == [1.0, 0.0, 1.0, 1.0]
    adata.obs["rna"] = [8.0, 4.0, 1.0, 32.0]
    adata.obsm["X_ref"][1] = 1.0
    epivi.SAILERX.setup_anndata(adata, "X_ref", rna_depth_key="rna")
    weights = epivi.SAILERX(adata, n_latent=2, n_hidden=(4, 3)).get_alignment_weights()
    np.testing.assert_allclose(weights, closed_form()[2], rtol=1e-12)


def test_a_source_knows_whether_the_data_carry_a_reference():
    mdata = four_cells()
    source = ReferenceSource("rna", layer=None, reference_key=None, rna_depth_key=None, atac="atac")
    assert source.is_in(mdata)
    alone = md.MuData({"atac": mdata["atac"].copy()})
    assert not source.is_in(alone)
    source.store(alone, n_dimensions=3)
    assert alone.obsm[OBSM_REFERENCE].shape == (4, 3)
    assert not alone.obs[OBS_HAS_REFERENCE].any()
