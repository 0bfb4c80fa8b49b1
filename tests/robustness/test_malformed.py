"""Data that cannot be used: each is refused before training, with cause, place and remedy, and left as it was."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import epivi
from epivi._errors import EpiviError

ROUTES = ("sailer", "sailerx_anndata", "sailerx_mudata")


def dense(change):
    """A change of the dense float64 counts."""

    def apply(adata):
        counts = adata.X.toarray().astype(np.float64)
        adata.X = change(counts)
        return adata

    return apply


def put(row, column, value, *, sparsely=True):
    """One value at one place."""

    def apply(adata):
        counts = adata.X.toarray().astype(np.float32)
        counts[row, column] = value
        adata.X = sparse.csr_matrix(counts) if sparsely else counts
        return adata

    return apply


def renamed(axis, change):
    def apply(adata):
        names = list(getattr(adata, axis))
        change(names)
        setattr(adata, axis, names)
        return adata

    return apply


def column(key, change, *, table="obs"):
    def apply(adata):
        frame = getattr(adata, table)
        frame[key] = change(frame)
        return adata

    return apply


def coordinates(**changes):
    """Give the peaks the columns chrom, start and end, some of them changed in row 7."""

    def apply(adata):
        for key in ("chrom", "start", "end"):
            adata.var[key] = {"chrom": "chr1", "start": 10, "end": 20}[key]
        for key, value in changes.items():
            values = adata.var[key].astype(object).to_list()
            values[7] = value
            adata.var[key] = values
        return adata

    return apply


def swap_first(value):
    def change(names):
        names[0] = value if value is not None else names[1]

    return change


def layer(change):
    def apply(adata):
        adata.layers["counts"] = change(adata.X.toarray().astype(float))
        return adata

    return apply


def mixed(frame):
    values = frame["batch"].astype(object).to_list()
    values[5] = 3
    return pd.Series(values, index=frame.index, dtype=object)


def with_missing(key, value=np.nan):
    def change(frame):
        values = frame[key].astype(object).to_list()
        values[5] = value
        return values if isinstance(value, float) and key == "batch" else pd.Series(values, index=frame.index)

    return change


def damaged(adata):
    adata.X.indptr = adata.X.indptr[::-1].copy()
    return adata


def outside(adata):
    adata.X.indices[3] = adata.n_vars + 5
    return adata


CELL = "cell 'c3' (row 3)"
# what the case is called: (change of the AnnData, words of the message, arguments of the setup)
CASES = {
    # values
    "negative": (put(3, 4, -1), ["adata.X", CELL, "column 4", "-1", "negative", "raw counts"], {}),
    "negative dense": (put(3, 4, -1, sparsely=False), ["adata.X", CELL, "negative"], {}),
    "nan": (put(3, 4, np.nan), ["adata.X", CELL, "NaN", "set it to 0"], {}),
    "nan dense": (put(3, 4, np.nan, sparsely=False), ["adata.X", CELL, "NaN"], {}),
    "inf": (put(3, 4, np.inf), ["adata.X", CELL, "infinite"], {}),
    "minus inf": (put(3, 4, -np.inf), ["adata.X", CELL, "infinite"], {}),
    "log-normalised": (dense(np.log1p), ["adata.X", "0.693", "not a whole number", "log-normalised"], {}),
    "fractional": (put(3, 4, 1.5), ["adata.X", CELL, "1.5", "not a whole number"], {}),
    "centred": (dense(lambda x: x - x.mean(0)), ["adata.X", "raw counts"], {}),
    "all zero": (dense(np.zeros_like), ["adata.X", "no value above zero"], {}),
    "objects": (dense(lambda x: x.astype(object)), ["adata.X", "dtype object"], {}),
    "strings": (dense(lambda x: x.astype(str)), ["adata.X", "dtype <U"], {}),
    "complex": (dense(lambda x: x.astype(complex)), ["adata.X", "complex128"], {}),
    "damaged rows": (damaged, ["adata.X", "damaged sparse matrix"], {}),
    "damaged columns": (outside, ["adata.X", "index lies outside"], {}),
    "bad layer": (layer(lambda x: x + 0.5), ["layers['counts']", "not a whole number"], {"layer": "counts"}),
    "nan layer": (layer(lambda x: x * np.nan), ["layers['counts']", "NaN"], {"layer": "counts"}),
    # names and axes
    "cells twice": (renamed("obs_names", swap_first(None)), ["obs_names are not unique", "'c1'"], {}),
    "peaks twice": (renamed("var_names", swap_first(None)), ["var_names are not unique", "'chr1:1000-1500'"], {}),
    "some names parse": (renamed("var_names", swap_first("gene")), ["95 of 96", "'gene' cannot"], {}),
    "name reversed": (renamed("var_names", swap_first("chr1:90-10")), ["'chr1:90-10'", "start", "below its end"], {}),
    "name empty": (renamed("var_names", swap_first("chr1:90-90")), ["[90, 90)", "below its end"], {}),
    "no peaks": (lambda a: a[:, :0].copy(), ["zero features", "(40, 0)"], {}),
    "no cells": (lambda a: a[:0].copy(), ["0 cells"], {}),
    "one cell": (lambda a: a[:1].copy(), ["1 cells", "At least two"], {}),
    # coordinates
    "no chromosome": (coordinates(chrom=None), ["var['chrom']", "no chromosome", "'chr1:7000-7500'"], {}),
    "start after end": (coordinates(start=30), ["[30, 20)", "below its end"], {}),
    "start at end": (coordinates(start=20), ["[20, 20)", "below its end"], {}),
    "start below zero": (coordinates(start=-5), ["negative start"], {}),
    "start in words": (coordinates(start="x"), ["var['start']", "'x'", "whole number"], {}),
    "end missing": (coordinates(end=np.nan), ["var['end']", "nan", "whole number"], {}),
    "chromosome key": (lambda a: a, ["adata.var has no entry 'chrm'"], {"chrom_key": "chrm"}),
    # keys
    "layer missing": (layer(np.array), ["layers has no entry 'count'", "Did you mean 'counts'"], {"layer": "count"}),
    "batch missing": (lambda a: a, ["obs has no entry 'bacth'", "Did you mean 'batch'"], {"batch_key": "bacth"}),
    "labels missing": (lambda a: a, ["no entry 'celltype'", "'cell_type'"], {"labels_key": "celltype"}),
    "depth missing": (lambda a: a, ["no entry 'deepth'", "Did you mean 'depth'"], {"depth_key": "deepth"}),
    "category missing": (lambda a: a, ["no entry 'dono'", "'donor'"], {"categorical_covariate_keys": ["dono"]}),
    "number missing": (lambda a: a, ["no entry 'agee'", "'age'"], {"continuous_covariate_keys": ["agee"]}),
    "keys as text": (lambda a: a, ["list of keys", "'age'"], {"continuous_covariate_keys": "age"}),
    "key of another type": (lambda a: a, ["must be a string", "3 (int)"], {"batch_key": 3}),
    "key twice": (lambda a: a, ["'donor' is used twice"], {"categorical_covariate_keys": ["donor", "donor"]}),
    "key in two roles": (
        lambda a: a,
        ["'batch' is used twice", "batch_key", "categorical_covariate_keys"],
        {"batch_key": "batch", "categorical_covariate_keys": ["batch"]},
    ),
    "unknown argument": (lambda a: a, ["'batch_kye'", "Did you mean 'batch_key'"], {"batch_kye": "batch"}),
    # columns
    "batch nan": (
        column("batch", with_missing("batch")),
        ["obs['batch']", "1 missing", "'c5'"],
        {"batch_key": "batch"},
    ),
    "batch none": (
        column("batch", with_missing("batch", None)),
        ["obs['batch']", "1 missing", "'c5'"],
        {"batch_key": "batch"},
    ),
    "batch of two types": (column("batch", mixed), ["mixes types", "int, str"], {"batch_key": "batch"}),
    "batch continuous": (lambda a: a, ["obs['age']", "looks continuous"], {"batch_key": "age"}),
    "labels nan": (
        column("cell_type", with_missing("cell_type")),
        ["obs['cell_type']", "1 missing", "'c5'"],
        {"labels_key": "cell_type"},
    ),
    "covariate nan": (
        column("age", lambda f: f["age"].where(f.index != "c5")),
        ["obs['age']", "cell 'c5' (row 5)", "nan"],
        {"continuous_covariate_keys": ["age"]},
    ),
    "covariate inf": (
        column("age", lambda f: f["age"].where(f.index != "c5", np.inf)),
        ["obs['age']", "cell 'c5' (row 5)", "inf"],
        {"continuous_covariate_keys": ["age"]},
    ),
    "covariate in words": (
        lambda a: a,
        ["obs['batch']", "numbers are needed"],
        {"continuous_covariate_keys": ["batch"]},
    ),
    "covariate bool": (
        column("flag", lambda f: f["batch"] == "b0"),
        ["obs['flag']", "bool", "numbers are needed"],
        {"continuous_covariate_keys": ["flag"]},
    ),
    "category nan": (
        column("donor", with_missing("donor")),
        ["obs['donor']", "1 missing"],
        {"categorical_covariate_keys": ["donor"]},
    ),
    "depth zero": (
        column("depth", lambda f: f["depth"].where(f.index != "c5", 0.0)),
        ["obs['depth']", "cell 'c5' (row 5) is 0", "above zero"],
        {"depth_key": "depth"},
    ),
    "depth negative": (
        column("depth", lambda f: -f["depth"]),
        ["obs['depth']", "cell 'c0'", "above zero"],
        {"depth_key": "depth"},
    ),
    "depth nan": (
        column("depth", lambda f: f["depth"].where(f.index != "c5")),
        ["obs['depth']", "cell 'c5' (row 5) is nan", "finite"],
        {"depth_key": "depth"},
    ),
    "depth in words": (lambda a: a, ["obs['batch']", "numbers are needed"], {"depth_key": "batch"}),
}


def fit(route, data, setup, quiet):
    """Set up, build and train, as a user would."""
    if route == "sailer":
        epivi.SAILER.setup_anndata(data, **setup)
        epivi.SAILER(data).train(max_epochs=1, **quiet)
        return
    if route == "sailerx_anndata":
        epivi.SAILERX.setup_anndata(data, **({"reference_key": "X_ref"} | setup))
    else:
        renaming = {"layer": "atac_layer"}
        setup = {renaming.get(key, key): value for key, value in setup.items()}
        epivi.SAILERX.setup_mudata(data, **setup)
    epivi.SAILERX(data).train(max_epochs=1, **quiet)


def refused(run, data, words, entries_of):
    """Run what must be refused with a message of these words, and check that the data are as they were."""
    before = entries_of(data)
    with pytest.raises((EpiviError, ValueError)) as caught:
        run()
    assert isinstance(caught.value, EpiviError)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert entries_of(data) == before


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CASES)
def test_data_that_cannot_be_used_are_refused(route, name, make_peaks, make_multiome, entries_of, quiet, no_training):
    change, words, setup = CASES[name]
    if route == "sailerx_mudata":
        data = make_multiome()
        data.mod["atac"] = atac = change(data.mod["atac"])
        if atac.obs_names.equals(data.obs_names):
            data.obs[list(atac.obs)] = atac.obs
        words = [word.replace("adata.", "mdata['atac'].").replace("mdata['atac'].var", "adata.var") for word in words]
        words = [word.replace("mdata['atac'].obs", "obs") for word in words]
    else:
        data = change(make_peaks())
    refused(lambda: fit(route, data, setup, quiet), data, words, entries_of)


def test_there_are_enough_cases():
    assert len(CASES) >= 50


WRONG = {
    "frame": (lambda a: a.to_df(), "pandas.*DataFrame"),
    "array": (lambda a: a.X.toarray(), "numpy.ndarray"),
    "sparse": (lambda a: a.X, "csr_matrix"),
    "file name": (lambda a: "cells.h5ad", "file name"),
    "nothing at all": (lambda a: None, "NoneType|needs data"),
    "list": (lambda a: [a], "list"),
    "view": (lambda a: a[:20], "view"),
    "no matrix": (lambda a: ad.AnnData(obs=a.obs, var=a.var), "neither X nor layers"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", WRONG)
def test_something_else_than_data_is_refused(route, name, make_peaks, quiet, no_training):
    make, match = WRONG[name]
    if route == "sailerx_mudata":
        match = "takes a MuData"
    with pytest.raises(EpiviError, match=match):
        fit(route, make(make_peaks()), {}, quiet)


def test_a_mudata_is_no_anndata_and_the_other_way_round(make_peaks, make_multiome, quiet, no_training):
    for route in ("sailer", "sailerx_anndata"):
        with pytest.raises(EpiviError, match=r"is a MuData.*'atac', 'rna'"):
            fit(route, make_multiome(), {}, quiet)
    with pytest.raises(EpiviError, match="takes a MuData, found AnnData"):
        fit("sailerx_mudata", make_peaks(), {}, quiet)
    with pytest.raises(EpiviError, match="takes an AnnData, found a MuData"):
        epivi.SAILER(make_multiome())
