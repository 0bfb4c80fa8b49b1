from __future__ import annotations

import logging

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

from epivi._errors import DataError
from epivi._keys import OBS_DEPTH, OBS_N_OPEN
from epivi.data.fields import (
    CHROMOSOMES,
    DENSITY,
    INDEXER,
    MEAN,
    SD,
    CategoryField,
    DepthField,
    JointCategoryField,
    MuDataJointCategoryField,
    MuDataPeaksField,
    PeaksField,
    open_peaks,
)

COUNTS = np.array([[1, 0, 2, 0], [0, 0, 0, 3], [1, 1, 1, 1]], dtype=np.float32)


def anndata(counts=COUNTS, *, names="abcd", layer=None):
    obs = pd.DataFrame({"batch": pd.Categorical(["x", "y", "x"]), "n": [10.0, 0.5, 100.0]}, index=["c1", "c2", "c3"])
    x = sparse.csr_matrix(counts)
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=list(names)))
    if layer:
        adata.layers[layer] = x.copy()
        adata.X = x * 0.5
    return adata


def peaks(layer=None, **kwargs):
    return PeaksField("X", layer, **kwargs)


def test_peaks_register_names_density_and_open_peaks_of_cells():
    adata = anndata()
    chromosomes = np.array(["chr1", "chr1", "chr2", "chr2"])
    state = peaks(chromosomes=chromosomes).register_field(adata)
    assert state["column_names"].tolist() == list("abcd")
    assert state[DENSITY] == pytest.approx(7 / 12)
    assert state[CHROMOSOMES] is chromosomes
    assert state[INDEXER] is None
    assert adata.obs[OBS_N_OPEN].tolist() == [2.0, 1.0, 4.0]


def test_stored_zeros_are_closed():
    adata = anndata()
    padded = sparse.csr_matrix(np.ones_like(COUNTS))
    padded.data[:] = COUNTS.ravel()
    adata.X = padded
    assert peaks().register_field(adata)[DENSITY] == pytest.approx(7 / 12)
    assert adata.obs[OBS_N_OPEN].tolist() == [2.0, 1.0, 4.0]


def test_a_layer_is_read_in_place_of_x_and_named_in_messages():
    adata = anndata(layer="counts")
    assert peaks("counts").register_field(adata)[DENSITY] == pytest.approx(7 / 12)
    with pytest.raises(DataError, match=r"adata.X: cell 'c1'.*0.5, not a whole number.*Whole numbers are in: 'counts'"):
        peaks().register_field(adata)
    adata.layers["counts"] = adata.layers["counts"] * -1
    with pytest.raises(DataError, match=r"mdata\['atac'\].layers\['counts'\]: cell 'c1'.*negative"):
        peaks("counts", where="mdata['atac']").register_field(adata)


def test_empty_cells_and_closed_peaks_are_counted_in_warnings(caplog):
    counts = COUNTS.copy()
    counts[1] = 0
    counts[:, 1] = 0
    with caplog.at_level(logging.WARNING, logger="epivi"):
        peaks().register_field(anndata(counts))
    assert "1 of 3 cells of adata.X have no open peak" in caplog.text
    assert "epivi.pp.filter_cells(adata, min_peaks=1) removes them" in caplog.text
    assert "1 of 4 peaks of adata.X are open in no cell" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="epivi"):
        peaks().register_field(anndata())
    assert caplog.text == ""


def test_peaks_in_the_trained_order_need_no_indexer():
    state = peaks().register_field(anndata())
    target = anndata(COUNTS[::-1].copy())
    moved = peaks().transfer_field(state, target)
    assert moved[INDEXER] is None
    assert moved["n_obs"] == 3
    assert target.obs[OBS_N_OPEN].tolist() == [4.0, 1.0, 2.0]


def test_permuted_and_further_peaks_are_matched_by_name(caplog):
    state = peaks().register_field(anndata()) | {DENSITY: 0.123}
    order = [3, 0, 2, 1]
    wide = np.hstack([COUNTS[:, order], np.ones((3, 2), dtype=np.float32)])
    target = anndata(wide, names="dacbyz")
    with caplog.at_level(logging.INFO, logger="epivi"):
        moved = peaks().transfer_field(state, target)
    assert "matched by name" in caplog.text
    np.testing.assert_array_equal(wide[:, moved[INDEXER]], COUNTS)
    assert moved["column_names"].tolist() == list("abcd")
    assert moved[DENSITY] == 0.123  # that of training
    # peaks that the model does not know do not count
    assert target.obs[OBS_N_OPEN].tolist() == [2.0, 1.0, 4.0]


def test_missing_peaks_are_named():
    state = peaks().register_field(anndata())
    with pytest.raises(DataError, match=r"adata.X lacks 2 of the 4 features.*'b', 'd'.*prepare_query_anndata"):
        peaks().transfer_field(state, anndata(COUNTS[:, :2].copy(), names="ac"))


@given(
    arrays(np.int8, (5, 4), elements=st.integers(0, 2)),
    st.lists(st.integers(0, 3), unique=True, max_size=4),
    st.sampled_from([1, 2, 4096]),
)
def test_open_peaks_count_what_is_not_zero(counts, columns, chunk_rows):
    expected = (counts[:, columns] != 0).sum(1)
    for matrix in (counts, sparse.csr_matrix(counts)):
        found = open_peaks(matrix, np.array(columns, dtype=int), chunk_rows)
        np.testing.assert_array_equal(found, expected)


def test_depths_have_the_moments_of_their_logarithm_below_one_counting_as_one():
    adata = anndata()
    state = DepthField("depth", "n").register_field(adata)
    logs = np.log([10.0, 1.0, 100.0])
    assert state[MEAN] == pytest.approx(logs.mean())
    assert state[SD] == pytest.approx(logs.std())
    assert adata.obs[OBS_DEPTH].tolist() == [10.0, 0.5, 100.0]


def test_by_default_depth_is_the_number_of_open_peaks():
    adata = anndata()
    peaks().register_field(adata)
    DepthField("depth", None).register_field(adata)
    assert adata.obs[OBS_DEPTH].tolist() == [2.0, 1.0, 4.0]


def test_equal_depths_have_a_deviation_of_one():
    adata = anndata()
    adata.obs["n"] = 5.0
    assert DepthField("depth", "n").register_field(adata) == {MEAN: pytest.approx(np.log(5.0)), SD: 1.0}


def test_transferred_depths_keep_the_moments_of_training():
    state = DepthField("depth", "n").register_field(anndata())
    target = anndata()
    target.obs["n"] = [1000.0, 2000.0, 3000.0]
    assert DepthField("depth", "n").transfer_field(state, target) == state
    assert target.obs[OBS_DEPTH].tolist() == [1000.0, 2000.0, 3000.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0, 0.0, 2.0], "above zero"), ([1.0, -1.0, 2.0], "above zero"), ([1.0, np.nan, 2.0], "finite")],
)
def test_depths_that_cannot_be_used_are_named(values, message):
    adata = anndata()
    adata.obs["n"] = values
    with pytest.raises(DataError, match=rf"obs\['n'\] of cell 'c2' \(row 1\).*{message}"):
        DepthField("depth", "n").register_field(adata)
    with pytest.raises(DataError, match=r"no entry 'm'"):
        DepthField("depth", "m").register_field(adata)


def small_batches(data, values):
    data.obs["batch"] = pd.Categorical(values)
    return data


@pytest.mark.filterwarnings("ignore:Category .* fewer than 3 cells:UserWarning")
def test_categories_keep_their_codes_and_new_ones_follow():
    field = CategoryField("batch", "batch")
    adata = anndata()
    state = field.register_field(adata)
    assert state["categorical_mapping"].tolist() == ["x", "y"]
    target = small_batches(anndata(), ["y", "y", "x"])
    field.transfer_field(state, target)
    assert target.obs["_scvi_batch"].tolist() == [1, 1, 0]
    target = small_batches(anndata(), ["a", "y", "x"])
    moved = field.transfer_field(state, target, extend_categories=True)
    assert moved["categorical_mapping"].tolist() == ["x", "y", "a"]
    assert target.obs["_scvi_batch"].tolist() == [2, 1, 0]


@pytest.mark.filterwarnings("ignore:Category .* fewer than 3 cells:UserWarning")
def test_an_unknown_category_is_named_with_the_remedy():
    field = CategoryField("batch", "batch")
    adata = small_batches(anndata(), ["day_1", "day_2", "day_1"])
    state = field.register_field(adata)
    target = small_batches(anndata(), ["day1", "day_2", "day_1"])
    message = r"obs\['batch'\] holds \['day1'\], unknown to the trained model. Did you mean 'day_1'.*load_query_data"
    with pytest.raises(DataError, match=message):
        field.transfer_field(state, target)


@pytest.mark.filterwarnings("ignore:Category .* fewer than 3 cells:UserWarning")
@pytest.mark.parametrize("in_modality", [False, True])
def test_unknown_categories_of_covariates_are_named_with_the_known_ones(in_modality):
    def target(values):
        adata = small_batches(anndata(), values)
        return md.MuData({"rna": adata}) if in_modality else adata

    options = {"mod_key": "rna"} if in_modality else {}
    field = (MuDataJointCategoryField if in_modality else JointCategoryField)("covariates", ["batch"], **options)
    state = field.register_field(target(["d1", "d2", "d1"]))
    assert state["mappings"]["batch"].tolist() == ["d1", "d2"]
    message = (
        r"obs\['batch'\] holds \['d0', 'd7'\], unknown to the trained model, which has \['d1', 'd2'\]\..*load_query"
    )
    with pytest.raises(DataError, match=message):
        field.transfer_field(state, target(["d7", "d0", "d1"]))
    with pytest.raises(DataError, match=r"obs\['batch'\] holds \[nan\], unknown to the trained model"):
        field.transfer_field(state, target(["d1", None, "d1"]))
    with pytest.raises(DataError, match=r"holds \[1, 2\], unknown to the trained model, which has \['d1', 'd2'\]"):
        field.transfer_field(state, target([1, 2, 1]))
    absent = target(["d1", "d2", "d1"])
    del (absent.mod["rna"] if in_modality else absent).obs["batch"]
    with pytest.raises(DataError, match="obs has no entry 'batch'"):
        field.transfer_field(state, absent)
    data = target(["d2", "d2", "d1"])
    holder = data.mod["rna"] if in_modality else data
    assert field.transfer_field(state, data)["n_cats_per_key"] == [2]
    assert holder.obsm["_scvi_covariates"]["batch"].tolist() == [1, 1, 0]
    data = target(["d2", "d0", "d1"])
    assert field.transfer_field(state, data, extend_categories=True)["mappings"]["batch"].tolist() == ["d1", "d2", "d0"]


def test_no_more_than_ten_known_categories_are_named():
    field = JointCategoryField("covariates", ["batch"])
    names = [f"c{i}" for i in range(36)]
    obs = pd.DataFrame({"batch": [f"d{i % 12:02}" for i in range(36)]}, index=names)
    adata = ad.AnnData(np.ones((36, 1)), obs=obs)
    state = field.register_field(adata)
    other = adata.copy()
    other.obs["batch"] = "new"
    with pytest.raises(DataError, match=r"\['new'\].* 'd09'\] and 2 more\. New categories"):
        field.transfer_field(state, other)


def test_without_a_key_all_cells_are_of_one_category():
    field = CategoryField("batch", None)
    state = field.register_field(anndata())
    target = anndata()
    field.transfer_field(state, target)
    assert target.obs["_scvi_batch"].tolist() == [0, 0, 0]


def test_peaks_of_a_modality_are_found_in_the_mudata():
    mdata = md.MuData({"atac": anndata()})
    field = MuDataPeaksField("X", None, mod_key="atac", mod_required=True, where="mdata['atac']")
    state = field.register_field(mdata)
    assert state[DENSITY] == pytest.approx(7 / 12)
    assert mdata["atac"].obs[OBS_N_OPEN].tolist() == [2.0, 1.0, 4.0]
