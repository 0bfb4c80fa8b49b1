"""Tracks that cannot be used: each is refused before training, with cause, place and remedy, and left as it was."""

from __future__ import annotations

import mudata as md
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import epivi
from epivi._errors import DataError, EpiviError

MODELS = ["ConvNetVAE", "FCVAE"]
N, BINS = 40, 48
CELL = "cell 'c3' (row 3), channel 'atac', bin chr1:400-500"


def same(data):
    return data


def counts(change, *, dense=False):
    """Change the counts, given as (cells, channels, bins) float64."""

    def apply(data):
        if hasattr(data, "mod"):
            stacked = np.stack([part.X.toarray() for part in data.mod.values()], axis=1).astype(float)
            changed = change(stacked)
            for m, part in enumerate(data.mod.values()):
                part.X = changed[:, m] if dense else sparse.csr_matrix(changed[:, m])
            return data
        stacked = data.obsm["tracks"].toarray().reshape(N, 3, BINS).astype(float)
        changed = change(stacked)
        data.obsm["tracks"] = changed if dense else sparse.csr_matrix(changed.reshape(N, -1))
        return data

    return apply


def put(value):
    def change(stacked):
        stacked[3, 1, 4] = value
        return stacked

    return change


def entry(change):
    """Change the array in obsm."""

    def apply(adata):
        adata.obsm["tracks"] = change(adata.obsm["tracks"])
        return adata

    return apply


def described(**changes):
    """Change the description in uns; None removes an entry."""

    def apply(adata):
        found = dict(adata.uns["tracks"])
        for key, value in changes.items():
            found[key] = value(found[key]) if callable(value) else value
        adata.uns["tracks"] = {key: value for key, value in found.items() if value is not None}
        return adata

    return apply


def bins(key, row, value):
    """Change one value of the table of bins, in all modalities."""

    def change(table):
        table = table.copy()
        values = table[key].astype(object).to_list()
        values[row] = value
        table[key] = pd.Series(values, index=table.index, dtype=object)
        return table

    def apply(data):
        if not hasattr(data, "mod"):
            return described(bins=change)(data)
        for part in data.mod.values():
            changed = change(part.var)
            part.var = changed
        return data

    return apply


def ordered(order):
    """Put the bins into another order, without the counts."""

    def apply(data):
        if not hasattr(data, "mod"):
            return described(bins=lambda table: table.iloc[order])(data)
        for part in data.mod.values():
            part.var = part.var.iloc[order]
        return data

    return apply


def mask(change, key="measured"):
    """Give the data a mask of measured channels, all True but for a change."""

    def apply(data):
        data.obsm[key] = change(np.ones((data.n_obs, 3), dtype=bool))
        return data

    return apply


def cleared(rows, columns=slice(None)):
    def change(measured):
        measured[rows, columns] = False
        return measured

    return change


def obs(key, values):
    def apply(data):
        data.obs[key] = values(data.obs) if callable(values) else values
        return data

    return apply


def at_five(key, value):
    def change(frame):
        values = frame[key].astype(object).to_list()
        values[5] = value
        return pd.Series(values, index=frame.index)

    return change


def damaged(matrix):
    matrix.indptr = matrix.indptr[::-1].copy()
    return matrix


def outside(matrix):
    matrix.indices[3] = matrix.shape[1] + 5
    return matrix


SWAPPED = [1, 0, *range(2, BINS)]
INTERLEAVED = [0, 30, *(i for i in range(1, BINS) if i != 30)]
MASK = {"mask_key": "measured"}
# what the case is called: (change of the data, words of the message, arguments of the setup)
SHARED = {
    "negative": (counts(put(-1)), [CELL, "-1", "negative", "raw counts"], {}),
    "negative dense": (counts(put(-1), dense=True), [CELL, "negative"], {}),
    "nan": (counts(put(np.nan)), [CELL, "NaN", "mask_key"], {}),
    "nan dense": (counts(put(np.nan), dense=True), [CELL, "NaN"], {}),
    "inf": (counts(put(np.inf)), [CELL, "infinite"], {}),
    "minus inf": (counts(put(-np.inf)), [CELL, "infinite"], {}),
    "half": (counts(put(0.5)), [CELL, "0.5", "not a whole number", "reads_to_fragments"], {}),
    "log-normalised": (counts(np.log1p), ["not a whole number", "look normalised"], {}),
    "all zero": (counts(np.zeros_like), ["no measured count above zero"], {}),
    "start after end": (bins("start", 7, 9000), ["below its end|does not end after", "chr1"], {}),
    "start below zero": (bins("start", 0, -5), ["below zero|negative start"], {}),
    "start in words": (bins("start", 7, "x"), ["'start']", "'x'", "whole number"], {}),
    "end missing": (bins("end", 7, np.nan), ["'end']", "nan", "whole number"], {}),
    "end fractional": (bins("end", 7, 800.5), ["'end']", "800.5", "whole number"], {}),
    "no chromosome": (bins("chrom", 7, None), ["'chrom']", "no chromosome"], {}),
    "overlapping": (bins("end", 7, 850), ["overlaps the bin in front of it", "chr1:800-900"], {}),
    "unsorted": (ordered(SWAPPED), ["chr1:0-100", "starts before the bin in front of it", "1 bins are affected"], {}),
    "interleaved": (ordered(INTERLEAVED), ["chromosomes are interleaved", "bin 2 (chr1:100-200)"], {}),
    "mask missing": (same, ["obsm", "no entry 'measurd'"], {"mask_key": "measurd"}),
    "mask of numbers": (mask(lambda m: m.astype(int)), ["dtype int64", "Boolean array", "astype(bool)"], MASK),
    "mask of floats": (mask(lambda m: m * 1.0), ["dtype float64", "Boolean array"], MASK),
    "mask of two channels": (mask(lambda m: m[:, :2]), ["shape (40, 2)", "(40, 3)", "channels"], MASK),
    "mask of other names": (
        mask(lambda m: pd.DataFrame(m, columns=["a", "b", "c"], index=[f"c{i}" for i in range(N)])),
        ["has the columns ['a', 'b', 'c']", "'ac', 'atac', 'me3'"],
        MASK,
    ),
    "sparse mask": (mask(sparse.csr_matrix), ["type csr_matrix", "Boolean array"], MASK),
    "nothing measured": (mask(cleared([3, 7])), ["2 of 40 cells", "'c3' (row 3)", "no measured channel"], MASK),
    "channel never measured": (mask(cleared(slice(None), 1)), ["'atac'", "measured in no cell"], MASK),
    "empty": (same, ["empty='masked'", "Did you mean 'mask'"], {"empty": "masked"}),
    "batch missing": (same, ["no entry 'bacth'", "Did you mean 'batch'"], {"batch_key": "bacth"}),
    "labels missing": (same, ["no entry 'celltype'", "'cell_type'"], {"labels_key": "celltype"}),
    "category missing": (same, ["no entry 'dono'", "'donor'"], {"categorical_covariate_keys": ["dono"]}),
    "number missing": (same, ["no entry 'agee'", "'age'"], {"continuous_covariate_keys": ["agee"]}),
    "keys as text": (same, ["list of keys", "'age'"], {"continuous_covariate_keys": "age"}),
    "key of another type": (same, ["must be a string", "3 (int)"], {"batch_key": 3}),
    "key twice": (same, ["'donor' is used twice"], {"categorical_covariate_keys": ["donor", "donor"]}),
    "key in two roles": (
        same,
        ["'batch' is used twice"],
        {"batch_key": "batch", "categorical_covariate_keys": ["batch"]},
    ),
    "unknown argument": (same, ["'batch_kye'", "Did you mean 'batch_key'"], {"batch_kye": "batch"}),
    "batch nan": (obs("batch", at_five("batch", np.nan)), ["obs['batch']", "1 missing"], {"batch_key": "batch"}),
    "batch of two types": (obs("batch", at_five("batch", 3)), ["mixes types", "int, str"], {"batch_key": "batch"}),
    "batch continuous": (same, ["obs['age']", "looks continuous"], {"batch_key": "age"}),
    "labels nan": (obs("cell_type", at_five("cell_type", np.nan)), ["1 missing"], {"labels_key": "cell_type"}),
    "covariate nan": (
        obs("age", at_five("age", np.nan)),
        ["'c5' (row 5)", "nan"],
        {"continuous_covariate_keys": ["age"]},
    ),
    "covariate inf": (
        obs("age", at_five("age", np.inf)),
        ["'c5' (row 5)", "inf"],
        {"continuous_covariate_keys": ["age"]},
    ),
    "covariate in words": (same, ["obs['batch']", "numbers are needed"], {"continuous_covariate_keys": ["batch"]}),
}
ANNDATA = {
    "no tracks": (same, ["adata.obsm", "no entry 'track'", "Did you mean 'tracks'"], {"tracks_key": "track"}),
    "no description": (lambda a: a.uns.clear() or a, ["adata.uns", "no entry 'tracks'"], {}),
    "description is a list": (lambda a: a.uns.update(tracks=["ac"]) or a, ["is a list", "dict"], {}),
    "no channels": (described(channels=None), ["no entry 'channels'"], {}),
    "no bins": (described(bins=None), ["no entry 'bins'"], {}),
    "channels empty": (described(channels=np.array([], dtype=str)), ["['channels'] is empty"], {}),
    "channels twice": (described(channels=["ac", "ac", "me3"]), ["names 'ac' 2 times"], {}),
    "too few channels": (described(channels=["ac", "me3"]), ["shape (40, 144)", "(40, 96)", "2 channels"], {}),
    "too few bins": (described(bins=lambda t: t[:-1]), ["shape (40, 144)", "(40, 141)", "47 bins"], {}),
    "bins are no table": (described(bins=lambda t: t.to_numpy()), ["is a ndarray", "DataFrame"], {}),
    "bins without rows": (described(bins=lambda t: t[:0]), ["has no row"], {}),
    "bins without start": (described(bins=lambda t: t.drop(columns="start")), ["no entry 'start'"], {}),
    "bin size of words": (described(bin_size_bp="big"), ["bin_size_bp", "'big'", "whole number"], {}),
    "bin size too small": (described(bin_size_bp=50), ["wider than bin_size_bp=50", "chr1:0-100"], {}),
    "two axes": (entry(lambda x: x.toarray()), ["2 axes", "(40, 144)", "Reshape it to (cells, channels, bins)"], {}),
    "bins before channels": (
        entry(lambda x: x.toarray().reshape(N, 3, BINS).swapaxes(1, 2).copy()),
        ["shape (40, 48, 3)", "(40, 3, 48)"],
        {},
    ),
    "csc": (entry(sparse.csc_matrix), ["format 'csc'", ".tocsr()"], {}),
    "frame": (entry(lambda x: pd.DataFrame(x.toarray(), index=[f"c{i}" for i in range(N)])), ["is a DataFrame"], {}),
    "masked array": (entry(lambda x: np.ma.masked_array(x.toarray().reshape(N, 3, BINS))), ["MaskedArray"], {}),
    "bool": (entry(lambda x: x.astype(bool)), ["dtype bool", "astype('uint8')"], {}),
    "bool dense": (entry(lambda x: x.toarray().reshape(N, 3, BINS) > 0), ["dtype bool"], {}),
    "complex": (entry(lambda x: x.astype(complex)), ["complex128"], {}),
    "strings": (entry(lambda x: x.toarray().reshape(N, 3, BINS).astype(str)), ["dtype <U"], {}),
    "objects": (entry(lambda x: x.toarray().reshape(N, 3, BINS).astype(object)), ["dtype object"], {}),
    "damaged rows": (entry(damaged), ["damaged sparse matrix", "indptr"], {}),
    "damaged columns": (entry(outside), ["damaged sparse matrix", "outside its shape"], {}),
    "cells twice": (lambda a: setattr(a, "obs_names", ["c1", *a.obs_names[1:]]) or a, ["not unique", "'c1'"], {}),
    "no cells": (lambda a: a[:0].copy(), ["0 cells"], {}),
    "one cell": (lambda a: a[:1].copy(), ["1 cells, at least 2"], {}),
    "view": (lambda a: a[:20], ["view", ".copy()"], {}),
}


def modality(change, name="atac"):
    def apply(mdata):
        change(mdata.mod[name])
        return mdata

    return apply


def matrix(change):
    return modality(lambda part: setattr(part, "X", change(part.X)))


def without_positions(part):
    part.var = pd.DataFrame(index=[f"bin{i}" for i in range(part.n_vars)])


def without_bins(mdata):
    return md.MuData({"ac": mdata.mod["ac"], "atac": mdata.mod["atac"][:, :0].copy()})


MUDATA = {
    "modality missing": (same, ["no modality 'acc'", "Did you mean 'ac'"], {"modalities": ["acc", "atac"]}),
    "modality misnamed": (same, ["no modality 'me33' for channel 'm'"], {"modalities": {"m": "me33"}}),
    "modality twice": (same, ["'ac' twice"], {"modalities": {"a": "ac", "b": "ac"}}),
    "modalities as text": (same, ["modalities='ac'", "list of modalities"], {"modalities": "ac"}),
    "modalities empty": (same, ["at least one name"], {"modalities": []}),
    "modalities of numbers": (same, ["names are text"], {"modalities": [1, 2]}),
    "layer missing": (same, ["layers", "no entry 'counts'"], {"layer": "counts"}),
    "no positions": (modality(without_positions), ["mdata['atac']", "no position", "'bin0'", "chr1:0-10000"], {}),
    "bool": (matrix(lambda x: x.astype(bool)), ["mdata['atac'].X", "dtype bool"], {}),
    "complex": (matrix(lambda x: x.astype(complex)), ["mdata['atac'].X", "complex128"], {}),
    "strings": (matrix(lambda x: x.toarray().astype(str)), ["mdata['atac'].X", "dtype <U"], {}),
    "damaged rows": (matrix(damaged), ["mdata['atac'].X", "damaged sparse matrix"], {}),
    "no matrix": (matrix(lambda x: None), ["mdata['atac'].X", "empty"], {}),
    "no bins": (without_bins, ["mdata['atac'].X", "shape (40, 0)"], {}),
    "key of a modality": (same, ["no entry 'depth'", "mdata.obs"], {"batch_key": "depth"}),
    "tracks in obsm": (same, ["Unknown argument 'tracks_key'"], {"tracks_key": "tracks"}),
}


def bits(data):
    """Everything of the counts."""
    arrays = [part.X for part in data.mod.values()] if hasattr(data, "mod") else [data.obsm.get("tracks")]
    found = []
    for array in arrays:
        parts = [array.data, array.indices, array.indptr] if sparse.issparse(array) else [np.asarray(array)]
        found.append((type(array), [p.tolist() if p.dtype == object else p.tobytes() for p in parts]))
    return found


def fit(model, data, setup, quiet):
    """Set up, build and train, as a user would."""
    cls = getattr(epivi, model)
    (cls.setup_mudata if isinstance(data, md.MuData) else cls.setup_anndata)(data, **setup)
    cls(data).train(max_epochs=1, **quiet)


def refused(model, data, words, setup, quiet):
    before = bits(data)
    with pytest.raises((EpiviError, ValueError)) as caught:
        fit(model, data, setup, quiet)
    assert isinstance(caught.value, EpiviError)
    message = str(caught.value)
    missing = [word for word in words if not any(part in message for part in word.split("|"))]
    assert not missing, f"{missing} not in: {message}"
    assert bits(data) == before


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [*SHARED, *ANNDATA])
def test_tracks_that_cannot_be_used_are_refused(model, name, make_tracks, quiet, no_training):
    change, words, setup = (SHARED | ANNDATA)[name]
    refused(model, change(make_tracks()), words, setup, quiet)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [*SHARED, *(f"mudata {name}" for name in MUDATA)])
def test_modalities_that_cannot_be_used_are_refused(model, name, make_tracks_mudata, quiet, no_training):
    change, words, setup = (SHARED | {f"mudata {key}": case for key, case in MUDATA.items()})[name]
    refused(model, change(make_tracks_mudata()), words, setup, quiet)


def test_there_are_enough_cases():
    assert len(SHARED) + min(len(ANNDATA), len(MUDATA)) >= 50


WRONG = {
    "frame": (lambda a: a.obs, "DataFrame"),
    "array": (lambda a: a.obsm["tracks"], "csr_matrix"),
    "file name": (lambda a: "cells.h5ad", "str"),
    "list": (lambda a: [a], "list"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", WRONG)
def test_something_else_than_data_is_refused(model, name, make_tracks, quiet, no_training):
    make, match = WRONG[name]
    with pytest.raises(EpiviError, match=match):
        fit(model, make(make_tracks()), {}, quiet)


@pytest.mark.parametrize("model", MODELS)
def test_an_anndata_is_no_mudata_and_the_other_way_round(model, make_tracks, make_tracks_mudata, no_training):
    cls = getattr(epivi, model)
    with pytest.raises(DataError, match=r"is a AnnData, a MuData is needed\. For an AnnData use setup_anndata"):
        cls.setup_mudata(make_tracks())
    # a table has a method mod
    with pytest.raises(DataError, match="mdata is a DataFrame, a MuData is needed"):
        cls.setup_mudata(make_tracks().obs)
    with pytest.raises(DataError, match="obsm"):
        cls.setup_anndata(make_tracks_mudata())


def test_bins_of_two_widths_that_do_not_divide_are_for_the_other_model(make_tracks_mudata, quiet, no_training):
    mdata = make_tracks_mudata()
    part = mdata.mod["atac"]
    starts = np.arange(BINS) * 70
    part.var = pd.DataFrame(
        {"chrom": "chr1", "start": starts, "end": starts + 70}, index=[f"x{i}" for i in range(BINS)]
    )
    refused("ConvNetVAE", mdata, ["bins of 'atac' do not fit", "70 bp do not divide", "FCVAE"], {}, quiet)


@pytest.mark.parametrize("model", MODELS)
def test_queries_that_cannot_be_used_are_refused(model, make_tracks, quiet):
    cls, adata = getattr(epivi, model), make_tracks()
    cls.setup_anndata(adata, batch_key="batch")
    reference = cls(adata, n_latent=2, n_hidden=4)
    reference.train(max_epochs=1, **quiet)
    shifted = bins("end", 47, 2390)(make_tracks())
    with pytest.raises(DataError, match=r"bin 47 is chr2:2300-2390, the model has chr2:2300-2400. Count the data in"):
        cls.load_query_data(shifted, reference)
    fewer = described(bins=lambda table: table[:-1])(make_tracks())
    fewer.obsm["tracks"] = fewer.obsm["tracks"].toarray().reshape(N, 3, BINS)[:, :, :-1]
    with pytest.raises(DataError, match=r"\(47\) are not those of the trained model \(48\): bin 47 is no further bin"):
        reference.get_latent_representation(fewer)
    foreign = described(channels=["x", "y", "z"])(make_tracks())
    with pytest.raises(DataError, match="none of the channels of the trained model"):
        cls.load_query_data(foreign, reference)
    broken = counts(put(np.nan))(make_tracks())
    with pytest.raises(DataError, match=r"cell 'c3' \(row 3\), channel 'atac'.*NaN"):
        reference.get_latent_representation(broken)
    other = make_tracks()
    other.obs["batch"] = "b7"
    with pytest.raises(DataError, match=r"\['b7'\], unknown to the trained model.*load_query_data"):
        reference.get_latent_representation(other)
    unmeasured = make_tracks()
    unmeasured.obsm["tracks_mask"] = cleared([2])(np.ones((N, 3), dtype=bool))
    with pytest.raises(DataError, match=r"1 of 40 cells .* no measured channel, the first is 'c2' \(row 2\)"):
        cls.load_query_data(unmeasured, reference)


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_imputed_or_reconstructed_from_wrong_arguments(model, make_tracks, quiet):
    cls, adata = getattr(epivi, model), make_tracks()
    cls.setup_anndata(adata)
    trained = cls(adata, n_latent=2, n_hidden=4, modality_dropout_rate=0.3)
    trained.train(max_epochs=1, **quiet)
    for call, match in {
        lambda m: m.impute_modality("atacc"): "Did you mean 'atac'",
        lambda m: m.impute_modality("atac"): "All 40 cells have 'atac'",
        lambda m: m.impute_modality("atac", cells="all", library_size="latent"): "found 'latent'",
        lambda m: m.get_normalized_expression(region_list=["chr1:5-5"]): "does not end after its start",
        lambda m: m.get_normalized_expression(indices=[40]): "holds 40",
        lambda m: m.get_marginal_ll(n_mc_samples=1.5): "n_mc_samples=1.5",
    }.items():
        with pytest.raises(EpiviError, match=match):
            call(trained)
