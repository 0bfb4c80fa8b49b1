"""Multiomes and reference embeddings that cannot be used: refused before training, with cause, place and remedy."""

from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import epivi
from epivi._errors import EpiviError


def reference(change, key="X_pca"):
    """Change the reference embedding of the RNA, or of an AnnData."""

    def apply(data):
        holder = data.mod["rna"] if hasattr(data, "mod") else data
        holder.obsm[key] = change(np.array(holder.obsm[key]))
        return data

    return apply


def set_rows(rows, value, columns=slice(None)):
    def change(values):
        values[rows, columns] = value
        return values

    return change


def rna(change):
    def apply(mdata):
        change(mdata.mod["rna"])
        return mdata

    return apply


def counts_of_genes(value):
    def change(genes):
        del genes.obsm["X_pca"]
        values = genes.X.toarray()
        values[4, 2] = value
        genes.X = sparse.csr_matrix(values)

    return rna(change)


def without(modality):
    def apply(mdata):
        return md.MuData({name: part for name, part in mdata.mod.items() if name != modality})

    return apply


def fewer_atac(mdata):
    return md.MuData({"atac": mdata.mod["atac"][8:].copy(), "rna": mdata.mod["rna"]})


def no_common_cell(mdata):
    genes = mdata.mod["rna"].copy()
    genes.obs_names = [f"other{i}" for i in range(genes.n_obs)]
    return md.MuData({"atac": mdata.mod["atac"], "rna": genes})


def few_common_cells(mdata):
    genes = mdata.mod["rna"].copy()
    genes.obsm["X_pca"][1:] = np.nan
    return md.MuData({"atac": mdata.mod["atac"], "rna": genes})


def sparse_reference(data):
    holder = data.mod["rna"]
    holder.obsm["X_pca"] = sparse.csr_matrix(holder.obsm["X_pca"])
    return data


def words_reference(data):
    holder = data.mod["rna"]
    holder.obsm["X_pca"] = np.full((holder.n_obs, 2), "x")
    return data


def shuffled_frame(data):
    holder = data.mod["rna"]
    frame = pd.DataFrame(holder.obsm["X_pca"], index=holder.obs_names)
    holder.obsm["X_pca"] = frame
    frame.index = list(frame.index[::-1])
    return data


def rna_depth(value):
    def change(genes):
        genes.obs["rna_depth"] = genes.obs["rna_depth"].where(genes.obs_names != "c3", value)

    return rna(change)


def same(data):
    return data


def refused(data, setup, words, entries_of, quiet):
    """Set up, build and train; check the message, and that the data are as they were."""

    def fit():
        (epivi.SAILERX.setup_mudata if hasattr(data, "mod") else epivi.SAILERX.setup_anndata)(data, **setup)
        epivi.SAILERX(data).train(max_epochs=1, **quiet)

    before = entries_of(data)
    with pytest.raises(EpiviError) as caught:
        fit()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert entries_of(data) == before


WHERE = "mdata['rna']"
DEPTH = {"rna_depth_key": "rna_depth"}
CASES = {
    # modalities
    "atac missing": (without("atac"), ["no modality 'atac' for 'atac'", "modalities={'atac'"], {}),
    "rna missing": (without("rna"), ["no modality 'rna' for 'rna'", "modalities={'rna'"], {}),
    "atac misnamed": (same, ["no modality 'atc'", "Did you mean 'atac'"], {"modalities": {"atac": "atc"}}),
    "rna misnamed": (same, ["no modality 'rrna'", "Did you mean 'rna'"], {"modalities": {"rna": "rrna"}}),
    "unknown entry": (same, ["unknown entry 'protein'", "'atac', 'rna'"], {"modalities": {"protein": "rna"}}),
    "nearly an entry": (same, ["unknown entry 'atca'", "Did you mean 'atac'"], {"modalities": {"atca": "atac"}}),
    "one modality twice": (same, ["'rna' twice", "two modalities"], {"modalities": {"atac": "rna"}}),
    "modalities as a list": (same, ["modalities", "dict", "list"], {"modalities": ["atac", "rna"]}),
    "modalities as text": (same, ["modalities", "dict", "str"], {"modalities": "atac"}),
    "name of another type": (same, ["no modality '3'"], {"modalities": {"rna": 3}}),
    "cells without atac": (fewer_atac, ["8 of 40 cells have no 'atac'", "'c7'", ".copy()"], {}),
    "no common cell": (no_common_cell, ["have no 'atac'", "'other0'"], {}),
    # reference
    "reference key missing": (same, [f"{WHERE}.obsm", "no entry 'X_pcs'", "'X_pca'"], {"reference_key": "X_pcs"}),
    "reference key of another type": (same, [f"{WHERE}.obsm", "must be a string"], {"reference_key": 3}),
    "partly nan": (reference(set_rows(4, np.nan, 2)), [WHERE, "1 cells, 'c25'", "partly NaN"], {}),
    "infinite": (reference(set_rows([4, 5], np.inf)), [WHERE, "2 cells, 'c25', 'c24'", "infinite"], {}),
    "zero rows": (reference(set_rows([4, 5], 0.0)), [WHERE, "2 cells, 'c25', 'c24'", "only zeros", "NaN"], {}),
    "all nan": (reference(set_rows(slice(None), np.nan)), [WHERE, "0 of 30 cells have a reference"], {}),
    "one referenced cell": (few_common_cells, [WHERE, "1 of 30 cells have a reference", "at least 2"], {}),
    "sparse reference": (sparse_reference, [WHERE, "sparse"], {}),
    "reference in words": (words_reference, [WHERE, "dtype <U1"], {}),
    "complex reference": (reference(lambda v: v.astype(complex)), [WHERE, "dtype complex128"], {}),
    "reference of three axes": (reference(lambda v: v[:, :, None]), [WHERE, "shape (30, 5, 1)"], {}),
    "no dimensions": (reference(lambda v: v[:, :0]), [WHERE, "shape (30, 0)"], {}),
    "reference of other cells": (shuffled_frame, ["another order", ".loc"], {}),
    # counts of RNA
    "rna depth missing": (same, [f"{WHERE}.obs", "no entry 'depthr'"], {"rna_depth_key": "depthr"}),
    "rna depth zero": (
        rna_depth(0.0),
        [f"{WHERE}.obs['rna_depth']", "'c3'", "above zero"],
        {"rna_depth_key": "rna_depth"},
    ),
    "rna depth nan": (rna_depth(np.nan), [f"{WHERE}.obs['rna_depth']", "'c3'", "nan"], {"rna_depth_key": "rna_depth"}),
    "rna layer missing": (same, [f"{WHERE}.layers", "no entry 'spliced'"], {"rna_layer": "spliced"}),
    "rna negative": (counts_of_genes(-2), [f"{WHERE}.X", "cell 'c25' (row 4)", "negative"], {}),
    "rna fractional": (counts_of_genes(0.5), [f"{WHERE}.X", "cell 'c25' (row 4)", "not a whole number"], {}),
    "rna nan": (counts_of_genes(np.nan), [f"{WHERE}.X", "cell 'c25' (row 4)", "NaN"], {}),
    # keys
    "batch missing": (same, ["mdata.obs", "no entry 'bacth'", "Did you mean 'batch'"], {"batch_key": "bacth"}),
    "unknown argument": (same, ["'reference'", "Did you mean 'reference_key'"], {"reference": "X_pca"}),
    "keys of two tables": (same, ["no entry 'depth'", "mdata.obs"], {"batch_key": "batch", "labels_key": "depth"}),
}


@pytest.mark.parametrize("name", CASES)
def test_multiomes_that_cannot_be_used_are_refused(name, make_multiome, entries_of, quiet, no_training):
    change, words, setup = CASES[name]
    mdata = change(make_multiome())
    if name == "keys of two tables":
        del mdata.mod["atac"].obs["batch"]
    refused(mdata, setup, words, entries_of, quiet)


ANNDATA = {
    "no key": (same, ["needs reference_key="], {}),
    "key missing": (same, ["adata.obsm", "no entry 'X_refs'", "'X_ref'"], {"reference_key": "X_refs"}),
    "partly nan": (reference(set_rows(4, np.nan, 2), "X_ref"), ["'c4'", "partly NaN"], {"reference_key": "X_ref"}),
    "infinite": (reference(set_rows(4, np.inf), "X_ref"), ["'c4'", "infinite"], {"reference_key": "X_ref"}),
    "zero rows": (reference(set_rows(4, 0), "X_ref"), ["'c4'", "only zeros"], {"reference_key": "X_ref"}),
    "one cell": (
        reference(set_rows(slice(1, None), np.nan), "X_ref"),
        ["1 of 40 cells have a reference"],
        {"reference_key": "X_ref"},
    ),
    "depth of words": (same, ["obs['batch']", "numbers"], {"reference_key": "X_ref", "rna_depth_key": "batch"}),
}


@pytest.mark.parametrize("name", ANNDATA)
def test_a_reference_in_an_anndata_is_checked_too(name, make_peaks, entries_of, quiet, no_training):
    change, words, setup = ANNDATA[name]
    refused(change(make_peaks()), setup, words, entries_of, quiet)


def test_a_reference_of_one_axis_or_of_other_cells_cannot_even_be_stored(make_peaks):
    adata = make_peaks()
    with pytest.raises(ValueError, match="shape"):
        adata.obsm["X_ref"] = np.ones(7)
    with pytest.raises(EpiviError, match="needed is"):
        epivi._validate.check_reference(np.ones(40), where="ref", obs_names=adata.obs_names)


def test_empty_rna_without_a_reference_is_refused(make_multiome, no_training):
    mdata = make_multiome()
    genes = ad.AnnData(sparse.csr_matrix((30, 0), dtype=np.float32), obs=mdata.mod["rna"].obs[[]])
    with pytest.raises(EpiviError, match="no counts"):
        epivi.SAILERX.setup_mudata(md.MuData({"atac": mdata.mod["atac"], "rna": genes}))
