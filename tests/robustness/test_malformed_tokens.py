"""Peaks and genes that EpiFoundation cannot use: refused before training, with cause, place and remedy."""

from __future__ import annotations

import mudata as md
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import epivi
from epivi._errors import EpiviError


def put(modality, row, column, value):
    """One value at one place."""

    def apply(mdata):
        part = mdata.mod[modality]
        values = part.X.toarray().astype(np.float32)
        values[row, column] = value
        part.X = sparse.csr_matrix(values)
        return mdata

    return apply


def emptied(mdata):
    part = mdata.mod["atac"]
    values = part.X.toarray()
    values[[3, 7]] = 0
    part.X = sparse.csr_matrix(values)
    return mdata


def renamed(modality, axis, change):
    def apply(mdata):
        part = mdata.mod[modality].copy()
        names = list(getattr(part, axis))
        change(names)
        setattr(part, axis, names)
        return md.MuData(dict(mdata.mod) | {modality: part})

    return apply


def first_is(value):
    def change(names):
        names[0] = names[1] if value is None else value

    return change


def at(modality, **values):
    """Columns chrom, start and end with one wrong value in row 7."""

    def apply(mdata):
        var = mdata.mod[modality].var
        n = len(var)
        for key, default in {"chrom": ["chr1"] * n, "start": np.arange(n), "end": np.arange(n) + 9}.items():
            column = pd.Series(default, index=var.index, dtype=object)
            if key in values:
                column.iloc[7] = values[key]
            var[key] = column
        return mdata

    return apply


def damaged(mdata):
    mdata.mod["atac"].X.indices[3] = 10**6
    return mdata


def one_gene(mdata):
    return md.MuData({"atac": mdata["atac"], "rna": mdata["rna"][:, :1].copy()})


def without_cells_of_peaks(mdata):
    return md.MuData({"atac": mdata["atac"][5:].copy(), "rna": mdata["rna"]})


def without_rna(mdata):
    return md.MuData({"atac": mdata["atac"]})


def gap(mdata):
    column = mdata.obs["batch"].astype(object)
    column.iloc[5] = np.nan
    mdata.obs["batch"] = column
    return mdata


# what the case is called: (change of the data, words of the message, arguments of the setup)
CASES = {
    "negative peak": (put("atac", 3, 4, -1), ["mdata['atac'].X", "cell 'c3'", "column 4", "negative"], {}),
    "nan peak": (put("atac", 3, 4, np.nan), ["mdata['atac'].X", "cell 'c3'", "NaN"], {}),
    "infinite peak": (put("atac", 3, 4, np.inf), ["mdata['atac'].X", "infinite"], {}),
    "fractional peak": (put("atac", 3, 4, 0.5), ["mdata['atac'].X", "not a whole number"], {}),
    "damaged rows": (damaged, ["mdata['atac'].X", "index lies outside"], {}),
    "negative gene": (put("rna", 3, 4, -2), ["mdata['rna'].X", "column 4", "negative"], {}),
    "fractional gene": (put("rna", 3, 4, 1.5), ["mdata['rna'].X", "1.5", "not a whole number"], {}),
    "nan gene": (put("rna", 3, 4, np.nan), ["mdata['rna'].X", "NaN"], {}),
    "negative lognorm": (put("rna", 3, 4, -0.5), ["mdata['rna'].X", "-0.5", "at least 0"], {"rna_kind": "lognorm"}),
    "nan lognorm": (put("rna", 3, 4, np.nan), ["mdata['rna'].X", "not finite"], {"rna_kind": "lognorm"}),
    "empty cells": (emptied, ["2 of 40 cells", "no open peak", "'c3', 'c7'", "empty_cells='zero'"], {}),
    "peaks twice": (renamed("atac", "var_names", first_is(None)), ["chr1:1000-1500"], {}),
    "genes twice": (renamed("rna", "var_names", first_is(None)), ["'g1'"], {}),
    "name reversed": (renamed("atac", "var_names", first_is("chr1:90-10")), ["'chr1:90-10'", "below its end"], {}),
    "name empty": (renamed("atac", "var_names", first_is("chr1:90-90")), ["below its end"], {}),
    "some names parse": (renamed("atac", "var_names", first_is("peak")), ["95 of 96", "'peak' cannot"], {}),
    "start behind end": (at("atac", start=500), ["start", "end"], {}),
    "start missing": (at("atac", start=None), ["start"], {}),
    "one gene": (one_gene, ["1 genes", "at least 2"], {}),
    "no peaks of some cells": (without_cells_of_peaks, ["5 of 40 cells have no 'atac'", "'c4'"], {}),
    "no rna": (without_rna, ["no modality 'rna'", "modalities="], {}),
    "missing batch": (gap, ["'batch'", "1 missing"], {}),
    "unknown batch column": (lambda mdata: mdata, ["'bacth'", "'batch'"], {"batch_key": "bacth"}),
    "unknown layer": (lambda mdata: mdata, ["mdata['atac'].layers", "'counts'"], {"atac_layer": "counts"}),
    "unknown kind": (lambda mdata: mdata, ["rna_kind", "'lognorm'"], {"rna_kind": "log"}),
    "unlabeled without labels": (lambda mdata: mdata, ["needs labels_key"], {"unlabeled_category": "x"}),
    "unlabeled unknown": (
        lambda mdata: mdata,
        ["unlabeled_category='z'", "cell_type"],
        {"unlabeled_category": "z", "labels_key": "cell_type"},
    ),
}


@pytest.mark.filterwarnings("ignore:.*not unique:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_data_that_cannot_be_used_are_refused(name, make_multiome, entries_of, no_training):
    change, words, arguments = CASES[name]
    data = change(make_multiome(n_rna=40))
    columns, before = [*data.obs], entries_of(data)
    with pytest.raises(EpiviError) as caught:
        epivi.EpiFoundation.setup_mudata(data, **({"batch_key": "batch"} | arguments))
    for word in words:
        assert word in str(caught.value)
    assert [*data.obs] == columns
    assert not any(key.startswith("_") for part in data.mod.values() for key in part.obs)
    assert entries_of(data) == before


def test_a_view_is_refused(make_peaks):
    with pytest.raises(EpiviError, match=r"adata is a view of another AnnData: call .copy\(\)"):
        epivi.EpiFoundation.setup_anndata(make_peaks()[:30])


@pytest.mark.parametrize("data", [None, 3, "file.h5ad", np.ones((4, 4)), pd.DataFrame()])
def test_something_else_than_data_is_refused(data, no_training):
    for setup in (epivi.EpiFoundation.setup_anndata, epivi.EpiFoundation.setup_mudata):
        with pytest.raises(EpiviError):
            setup(data)


@pytest.fixture(scope="module")
def trained(make_multiome, quiet):
    mdata = make_multiome(n_rna=40)
    epivi.EpiFoundation.setup_mudata(mdata, batch_key="batch", labels_key="cell_type")
    model = epivi.EpiFoundation(mdata, size="test", n_layers=1, seed=1)
    model.train(max_epochs=1, batch_size=16, **quiet)
    return model


def fewer_peaks(mdata):
    return md.MuData({"atac": mdata["atac"][:, :90].copy(), "rna": mdata["rna"]})


def fewer_genes(mdata):
    return md.MuData({"atac": mdata["atac"], "rna": mdata["rna"][:, :10].copy()})


QUERIES = {
    "fewer peaks": (fewer_peaks, ["90 of the 96 peaks", "project_peaks"]),
    "no peak in common": (
        renamed("atac", "var_names", lambda names: names.__setitem__(slice(None), [f"p{i}" for i in range(96)])),
        ["0 of the 96 peaks", "'p0'", "project_peaks"],
    ),
    "fewer genes": (fewer_genes, ["mdata['rna']", "'g10'"]),
    "negative peak": (put("atac", 3, 4, -1), ["mdata['atac'].X", "'c3'", "negative"]),
    "fractional gene": (put("rna", 3, 4, 1.5), ["mdata['rna'].X", "not a whole number"]),
    "empty cells": (emptied, ["2 of 40 cells", "no open peak"]),
    "no peaks of some cells": (without_cells_of_peaks, ["5 of 40 cells have no 'atac'"]),
}


@pytest.mark.parametrize("name", QUERIES)
def test_queries_that_cannot_be_read_are_refused_and_the_model_stays(trained, name, make_multiome):
    change, words = QUERIES[name]
    latent = trained.get_latent_representation()
    data = change(make_multiome(n_rna=40))
    columns = [*data.obs]
    with pytest.raises(EpiviError) as caught:
        trained.get_latent_representation(data)
    for word in words:
        assert word in str(caught.value)
    assert [*data.obs] == columns
    np.testing.assert_array_equal(trained.get_latent_representation(), latent)


def test_a_query_without_anything_but_peaks_is_read(trained, make_multiome):
    latent = trained.get_latent_representation()
    atac = make_multiome(n_rna=40)["atac"]
    bare = type(atac)(atac.X.copy(), obs=pd.DataFrame(index=atac.obs_names), var=pd.DataFrame(index=atac.var_names))
    np.testing.assert_array_equal(trained.get_latent_representation(bare), latent)
    assert [key for key in bare.obs if not key.startswith("_")] == []
