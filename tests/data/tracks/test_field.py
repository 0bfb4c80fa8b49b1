from __future__ import annotations

import logging
from itertools import pairwise

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scvi.data import AnnDataManagerValidationCheck
from scvi.data.fields import CategoricalObsField
from torch.utils.data import DataLoader

from epivi._errors import DataError
from epivi._keys import OBSM_TRACKS_MEASURED
from epivi.data.sparse import SparseDataManager
from epivi.data.tracks.field import MuDataTracksField, TracksField
from epivi.data.tracks.reader import TracksReader, channel_bounds, dense_rows
from epivi.models.base_saving import plain
from epivi.simulate import tracks as simulate
from epivi.train._encoding import decode, encode

N, C, L = 12, 3, 7
CHANNELS = ["ac", "me1", "me3"]
KEYS = ["x_indptr", "x_indices", "x_values", "modality_mask"]
ORDERS = [[0], [3, 1, 2], [11, 0, 5, 0, 11], list(range(N)), [4, 4]]


@pytest.fixture
def counts_ncl():
    rng = np.random.default_rng(0)
    counts = (rng.integers(1, 5, (N, C, L)) * (rng.random((N, C, L)) < 0.5)).astype(np.uint16)
    counts[:, :, 3] = 0
    counts[4, 1] = 0
    return counts


def bins(n=L):
    chrom = ["chr1"] * (n - 2) + ["chr2"] * 2
    start = np.r_[np.arange(n - 2) * 100, 0, 100]
    return pd.DataFrame({"chrom": chrom, "start": start, "end": start + 100}, index=[f"b{i}" for i in range(n)])


def described(array, channels=CHANNELS, **more):
    uns = {"channels": np.array(channels), "bins": bins(), "genome": "hg38", "bin_size_bp": 100}
    obs = pd.DataFrame({"batch": pd.Categorical(["a", "b"] * (N // 2))}, index=[f"c{i}" for i in range(N)])
    return ad.AnnData(obs=obs, obsm={"tracks": array, **more}, uns={"tracks": uns})


def flat(counts_ncl):
    return counts_ncl.reshape(len(counts_ncl), -1)


KINDS = {
    "uint16": np.array,
    "uint8": lambda x: x.astype(np.uint8),
    "int64": lambda x: x.astype(np.int64),
    "float32": lambda x: x.astype(np.float32),
    "float16": lambda x: x.astype(np.float16),
    "fortran": np.asfortranarray,
    "csr_matrix": lambda x: sparse.csr_matrix(flat(x)),
    "csr_array": lambda x: sparse.csr_array(flat(x)),
    "csr float64": lambda x: sparse.csr_matrix(flat(x).astype(float)),
    "csr unsorted with zeros": lambda x: unsorted(sparse.csr_matrix(flat(x))),
}


def unsorted(matrix):
    """The same matrix with stored zeros and columns in falling order."""
    full = sparse.csr_matrix(np.ones(matrix.shape, dtype=matrix.dtype))
    full.data[:] = matrix.toarray()[:, ::-1].ravel()
    full.indices[:] = np.tile(np.arange(matrix.shape[1])[::-1], matrix.shape[0])
    full.has_sorted_indices = False
    return full


def mudata_of(counts_ncl, measured=None, *, kind=sparse.csr_matrix, named=False):
    measured = np.ones((N, C), dtype=bool) if measured is None else measured
    mods = {}
    for m, name in enumerate(CHANNELS):
        rows = np.flatnonzero(measured[:, m])[::-1]  # another order than that of the MuData
        var = bins()
        var.index = [f"{c}:{s}-{e}" for c, s, e in var.itertuples(index=False)] if named else f"{name}:" + var.index
        var = var[[]] if named else var
        mods[name] = ad.AnnData(kind(counts_ncl[rows, m]), obs=pd.DataFrame(index=[f"c{i}" for i in rows]), var=var)
    # mudata asks for names that no other modality has; those of bins are the same by nature
    mdata = md.MuData(mods) if not named else named_mudata(mods)
    return mdata[[f"c{i}" for i in range(N)]].copy() if not named else mdata


@pytest.mark.filterwarnings("ignore:var_names are not unique")
def named_mudata(mods):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return md.MuData(mods)


def manager(data, *fields, source=None):
    found = SparseDataManager(
        fields=list(fields),
        setup_method_args={"model_name": "M", "setup_args": {}},
        validation_checks=AnnDataManagerValidationCheck(check_fully_paired_mudata=False),
    )
    found.register_fields(data, source_registry=source)
    return found


def batch_of(data, field, rows, source=None):
    batch = manager(data, field, source=source).create_torch_dataset()[rows]
    return {key: batch[key].numpy() for key in KEYS}


def assert_same(batch, other):
    for key in KEYS:
        assert batch[key].dtype == other[key].dtype
        np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def expected(counts_ncl, measured, rows):
    matrix = sparse.csr_matrix(flat(np.where(measured[..., None], counts_ncl, 0)[rows]))
    return {
        "x_indptr": matrix.indptr.astype(np.int64),
        "x_indices": matrix.indices.astype(np.int64),
        "x_values": matrix.data.astype(np.float32),
        "modality_mask": measured[rows].astype(np.float32),
    }


def some_measured():
    measured = np.random.default_rng(1).random((N, C)) < 0.7
    measured[~measured.any(axis=1), 0] = True
    return measured


FULL = np.ones((N, C), dtype=bool)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ORDERS)
def test_every_storage_gives_the_same_batches(counts_ncl, kind, rows):
    array = KINDS[kind](counts_ncl)
    before = array.copy()
    assert_same(batch_of(described(array), TracksField("X", "tracks"), rows), expected(counts_ncl, FULL, rows))
    measured = some_measured()
    adata = described(array, m=measured)
    found = batch_of(adata, TracksField("X", "tracks", mask_key="m"), rows)
    assert_same(found, expected(counts_ncl, measured, rows))
    if sparse.issparse(array):  # the user's array keeps its order and zeros
        np.testing.assert_array_equal(before.indices, array.indices)
        np.testing.assert_array_equal(before.data, array.data)


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_array, np.array])
@pytest.mark.parametrize("rows", ORDERS)
def test_modalities_give_the_batches_of_the_stacked_array(counts_ncl, kind, rows):
    for measured in (FULL, some_measured()):
        mdata = mudata_of(counts_ncl, measured, kind=kind)
        assert mdata.obs_names.tolist() == [f"c{i}" for i in range(N)]
        assert_same(batch_of(mdata, MuDataTracksField("X", CHANNELS), rows), expected(counts_ncl, measured, rows))


def test_modalities_are_chosen_renamed_and_read_from_layers_and_names(counts_ncl):
    mdata = mudata_of(counts_ncl)
    for name in CHANNELS:
        mdata[name].layers["counts"] = mdata[name].X.copy()
        mdata[name].X = mdata[name].X * 0.5
    field = MuDataTracksField("X", {"H3K27me3": "me3", "H3K27ac": "ac"}, layer="counts")
    state = field.register_field(mdata)
    assert state["column_names"].tolist() == ["H3K27me3", "H3K27ac"]
    found = field.make_reader(mdata, state).rows(np.arange(N)).toarray()
    np.testing.assert_array_equal(found, flat(counts_ncl[:, [2, 0]]))
    named = mudata_of(counts_ncl, named=True)
    state = MuDataTracksField("X").register_field(named)
    assert state["column_names"].tolist() == CHANNELS
    assert len(state["grids"]) == 1
    assert state["grids"][0]["chrom"].tolist() == bins()["chrom"].tolist()


def test_modalities_may_differ_in_their_bins(counts_ncl):
    mdata = mudata_of(counts_ncl)
    coarse = bins(4)
    coarse.index = "x" + coarse.index
    other = ad.AnnData(sparse.csr_matrix(counts_ncl[:, 1, :4]), obs=mdata.obs[[]].copy(), var=coarse)
    mdata = md.MuData({"ac": mdata["ac"].copy(), "x": other, "me3": mdata["me3"].copy()})
    field = MuDataTracksField("X")
    state = field.register_field(mdata)
    assert state["n_bins"] == [7, 4, 7]
    assert state["grid_of_channel"] == [0, 1, 0]
    found = field.make_reader(mdata, state).rows(np.arange(N)).toarray()
    np.testing.assert_array_equal(found, np.hstack([counts_ncl[:, 0], counts_ncl[:, 1, :4], counts_ncl[:, 2]]))
    assert field.get_summary_stats(state) == {"n_cells": N, "n_vars": 18, "n_channels": 3}


def test_genome_and_width_of_bins_are_those_noted_when_counting(counts_ncl):
    mdata = mudata_of(counts_ncl)
    assert MuDataTracksField("X").register_field(mdata)["genome"] is None
    for name in CHANNELS:
        mdata[name].uns["fragments"] = {"genome": "hg38", "bin_size_bp": 250}
    state = MuDataTracksField("X").register_field(mdata)
    assert (state["genome"], state["grids"][0]["bin_size_bp"]) == ("hg38", 250)
    for name in CHANNELS:  # merged since
        mdata[name].uns["fragments"] = {"genome": "", "bin_size_bp": 50}
    state = MuDataTracksField("X").register_field(mdata)
    assert (state["genome"], state["grids"][0]["bin_size_bp"]) == (None, 100)
    adata = described(counts_ncl)
    adata.uns["tracks"]["genome"] = ""
    assert TracksField("X", "tracks").register_field(adata)["genome"] is None


def test_the_state_holds_channels_bins_and_statistics_of_what_was_measured(counts_ncl):
    measured = some_measured()
    field = TracksField("X", "tracks", mask_key="m")
    state = field.register_field(described(counts_ncl, m=measured))
    shown = np.where(measured[..., None], counts_ncl, 0)
    assert state["total_counts"] == shown.sum((0, 2)).tolist()
    assert state["n_measured"] == measured.sum(0).tolist()
    assert state["density"] == pytest.approx((shown > 0).sum() / (measured.sum() * L))
    assert (state["n_bins"], state["genome"], state["n_obs"]) == ([L] * C, "hg38", N)
    assert state["channel_indexer"].tolist() == [0, 1, 2]
    again = decode(encode(plain(state)))
    assert again.keys() == state.keys()
    adata = described(counts_ncl, m=measured)
    field.transfer_field(again, adata)
    assert_same(
        {k: v.numpy() for k, v in field.make_reader(adata, again).read(np.arange(N)).items()},
        expected(counts_ncl, measured, np.arange(N)),
    )


def test_what_lies_under_the_mask_never_matters(counts_ncl):
    measured = some_measured()
    hostile = counts_ncl.astype(np.float32)
    hostile[~measured] = np.array([np.nan, np.inf, -1, 0.5, 7, 9, 1e30], dtype=np.float32)
    field = TracksField("X", "tracks", mask_key="m")
    clean = field.register_field(described(np.where(measured[..., None], counts_ncl, 0), m=measured))
    for array in (hostile, sparse.csr_matrix(flat(hostile))):
        adata = described(array, m=measured)
        state = field.register_field(adata)
        assert_same(batch_of(adata, field, np.arange(N)), expected(counts_ncl, measured, np.arange(N)))
        assert (state["total_counts"], state["density"]) == (clean["total_counts"], clean["density"])


def test_a_mask_of_columns_is_matched_by_name_and_joins_membership(counts_ncl):
    measured = some_measured()
    table = pd.DataFrame(measured[:, ::-1], columns=CHANNELS[::-1], index=[f"c{i}" for i in range(N)])
    found = batch_of(described(counts_ncl, m=table), TracksField("X", "tracks", mask_key="m"), np.arange(N))
    assert_same(found, expected(counts_ncl, measured, np.arange(N)))
    present = FULL.copy()
    present[2:5, 0] = False
    mdata = mudata_of(counts_ncl, present)
    mdata.obsm["m"] = measured | ~present.any(axis=1, keepdims=True)
    mdata.obsm["m"][2:5, 1] = True
    both = mdata.obsm["m"] & present
    found = batch_of(mdata, MuDataTracksField("X", CHANNELS, mask_key="m"), np.arange(N))
    assert_same(found, expected(counts_ncl, both, np.arange(N)))


def test_a_channel_without_counts_is_a_measurement_unless_asked_otherwise(counts_ncl, caplog):
    adata = described(counts_ncl)
    with caplog.at_level(logging.WARNING, logger="epivi"):
        batch = batch_of(adata, TracksField("X", "tracks"), [4])
    assert "1 of 12 cells have channel 'me1' of adata measured and without any count; empty='mask'" in caplog.text
    assert batch["modality_mask"].tolist() == [[1, 1, 1]]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="epivi"):
        batch = batch_of(adata, TracksField("X", "tracks", empty="mask"), [4])
    assert "they count as not measured" in caplog.text
    assert batch["modality_mask"].tolist() == [[1, 0, 1]]
    adata.obsm["m"] = FULL.copy()
    adata.obsm["m"][4, 1] = False
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="epivi"):
        TracksField("X", "tracks", mask_key="m").register_field(adata)
    assert caplog.text == ""


def test_a_mask_that_lies_there_unused_is_mentioned(counts_ncl, caplog):
    counts_ncl[4, 1, 0] = 1
    with caplog.at_level(logging.WARNING, logger="epivi"):
        TracksField("X", "tracks").register_field(described(counts_ncl, tracks_mask=FULL))
    assert "adata.obsm['tracks_mask'] is not used: name it with mask_key=" in caplog.text


@pytest.mark.parametrize("kind", ["uint16", "csr_array"])
def test_channels_of_a_query_are_matched_by_name(counts_ncl, kind, caplog):
    field = TracksField("X", "tracks")
    source = manager(described(counts_ncl), field).registry
    order = [2, 0, 1]
    adata = described(KINDS[kind](counts_ncl[:, order]), [CHANNELS[i] for i in order])
    with caplog.at_level(logging.INFO, logger="epivi"):
        found = batch_of(adata, field, np.arange(N), source)
    assert "not in the order of training: they are matched by name" in caplog.text
    assert_same(found, expected(counts_ncl, FULL, np.arange(N)))
    caplog.clear()
    wide = np.concatenate([counts_ncl[:, [2]], counts_ncl[:, [0]] * 0 + 9, counts_ncl[:, [0]]], axis=1)
    adata = described(KINDS[kind](wide), ["me3", "new", "ac"])
    registry = manager(adata, field, source=source).registry["field_registries"]["X"]
    assert (
        registry["state_registry"]["total_counts"] == source["field_registries"]["X"]["state_registry"]["total_counts"]
    )
    assert "adata lacks the channels ['me1']: they count as not measured" in caplog.text
    assert "has the channels ['new'], unknown to the trained model: they are ignored" in caplog.text
    measured = np.tile([True, False, True], (N, 1))
    np.testing.assert_array_equal(adata.obsm[OBSM_TRACKS_MEASURED], measured)
    assert_same(batch_of(adata, field, [3, 0], source), expected(counts_ncl, measured, [3, 0]))


@pytest.mark.parametrize("modalities", [None, CHANNELS])
def test_a_query_may_lack_modalities_and_cells(counts_ncl, modalities, caplog):
    field = MuDataTracksField("X", modalities)
    source = manager(mudata_of(counts_ncl), field).registry
    query = mudata_of(counts_ncl)
    extra = ad.AnnData(np.ones((N, 1), np.float32), obs=query.obs[[]].copy(), var=pd.DataFrame(index=["gene"]))
    query = md.MuData({"rna": extra, "me3": query["me3"].copy(), "ac": query["ac"][:8].copy()})
    measured = np.tile([True, False, True], (N, 1))
    absent = ~query.obs_names.isin(query["ac"].obs_names)
    measured[absent, 0] = False
    cells = [int(name[1:]) for name in query.obs_names]
    found = batch_of(query, field, np.arange(N), source)
    assert_same(found, expected(counts_ncl[cells], measured, np.arange(N)))
    assert "mdata lacks the channels ['me1']" in caplog.text
    assert ("mdata has the modalities ['rna'], unknown to the trained model" in caplog.text) == (modalities is None)


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("kind", ["uint16", "csr_matrix", "csr_array"])
def test_files_keep_the_batches(counts_ncl, kind, suffix, tmp_path):
    measured = some_measured()
    adata = described(KINDS[kind](counts_ncl), m=measured)
    field = TracksField("X", "tracks", mask_key="m")
    before = batch_of(adata, field, np.arange(N))
    path = tmp_path / f"a.{suffix}"
    adata.write_h5ad(path) if suffix == "h5ad" else adata.write_zarr(path)
    again = ad.read_h5ad(path) if suffix == "h5ad" else ad.read_zarr(path)
    assert_same(batch_of(again, field, np.arange(N)), before)
    if suffix == "h5ad":
        backed = ad.read_h5ad(path, backed="r")
        try:
            assert_same(batch_of(backed, field, np.arange(N)), before)
        finally:
            backed.file.close()


def test_mudata_files_keep_the_batches(counts_ncl, tmp_path):
    field = MuDataTracksField("X", CHANNELS)
    mdata = mudata_of(counts_ncl, some_measured())
    before = batch_of(mdata, field, np.arange(N))
    mdata.write(tmp_path / "a.h5mu")
    again = md.read_h5mu(tmp_path / "a.h5mu")
    assert again.obs_names.tolist() == mdata.obs_names.tolist()
    assert_same(batch_of(again, field, np.arange(N)), before)


def test_simulated_tracks_are_registered_alike_in_every_form():
    options = {"n": 60, "n_bins": 120, "missing": {"ATAC": 0.4, "H3K27me3": 0.4}, "n_types": 2, "seed": 3}
    rows = np.arange(60)
    field = TracksField("X", "tracks", mask_key="tracks_mask")
    stacked = batch_of(simulate(**options), field, rows)
    assert_same(batch_of(simulate(**options, dense=True), field, rows), stacked)
    mdata = simulate(**options, as_mudata=True)
    at = simulate(**options).obs_names.get_indexer(mdata.obs_names)
    inverse = np.argsort(at)
    assert_same(batch_of(mdata, MuDataTracksField("X"), inverse), stacked)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 7), min_size=1, max_size=80))
def test_dense_rows_are_those_of_scipy(seed, rows):
    rng = np.random.default_rng(seed)
    array = (rng.integers(0, 3, (8, 2, 5)) * (rng.random((8, 1, 1)) < 0.6)).astype(np.uint16)
    found, wanted = dense_rows(array, np.array(rows)), sparse.csr_matrix(flat(array)[rows])
    for key in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(found, key), getattr(wanted, key))
    assert found.dtype == np.uint16
    bounds = channel_bounds(found, np.array([0, 5, 10]))
    np.testing.assert_array_equal(bounds[:, 0], found.indptr[:-1])
    np.testing.assert_array_equal(np.diff(bounds, axis=1), (array[rows] > 0).sum(2))


def test_no_rows_are_an_empty_batch(counts_ncl):
    for kind in ("uint16", "csr_matrix"):
        adata = described(KINDS[kind](counts_ncl))
        batch = batch_of(adata, TracksField("X", "tracks"), np.array([], dtype=int))
        assert (batch["x_indptr"].tolist(), batch["modality_mask"].shape) == ([0], (0, C))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_tracks_pass_loaders_beside_other_fields(counts_ncl, num_workers):
    fields = (TracksField("X", "tracks"), CategoricalObsField("batch", "batch"))
    dataset = manager(described(counts_ncl), *fields).create_torch_dataset()
    loader = DataLoader(dataset, sampler=[[0, 1], [5, 2]], batch_size=None, num_workers=num_workers)
    for rows, batch in zip([[0, 1], [5, 2]], loader, strict=True):
        assert_same({key: batch[key].numpy() for key in KEYS}, expected(counts_ncl, FULL, rows))
        assert batch["rows"].tolist() == rows
        assert batch["batch"].shape == (2, 1)


def test_bins_of_a_query_are_compared_one_by_one(counts_ncl):
    field = TracksField("X", "tracks")
    state = field.register_field(described(counts_ncl))
    other = described(counts_ncl)
    other.uns["tracks"]["bins"].loc["b6", "end"] = 150
    message = r"channel 'ac' of adata \(7\).*trained model \(7\): bin 6 is chr2:100-150, the model has chr2:100-200"
    with pytest.raises(DataError, match=message):
        field.transfer_field(state, other)
    other = described(counts_ncl[:, :, :5].copy())
    other.uns["tracks"]["bins"] = bins().iloc[:5]
    with pytest.raises(DataError, match=r"adata \(5\).*bin 5 is no further bin, the model has chr2:0-100"):
        field.transfer_field(state, other)


def test_another_genome_is_mentioned_and_strange_channels_are_an_error(counts_ncl, caplog):
    field = TracksField("X", "tracks")
    state = field.register_field(described(counts_ncl))
    other = described(counts_ncl)
    other.uns["tracks"]["genome"] = "mm10"
    field.transfer_field(state, other)
    assert "adata is of genome 'mm10', the trained model of 'hg38'" in caplog.text
    with pytest.raises(DataError, match=r"adata has none of the channels of the trained model. Did you mean 'me1'"):
        field.transfer_field(state, described(counts_ncl, ["me_1", "x", "y"]))
    # one cell is enough for a query
    one = described(counts_ncl)[:1].copy()
    assert field.transfer_field(state, one)["n_obs"] == 1


def test_batches_hold_whole_rows_in_order(counts_ncl):
    reader = TracksField("X", "tracks")
    adata = described(counts_ncl)
    tracks_reader = reader.make_reader(adata, reader.register_field(adata))
    assert isinstance(tracks_reader, TracksReader)
    batch = tracks_reader.read(np.arange(N))
    indptr, indices = batch["x_indptr"].numpy(), batch["x_indices"].numpy()
    assert all((np.diff(indices[a:b]) > 0).all() for a, b in pairwise(indptr))
    assert batch["x_values"].numpy().all()
