"""The input gate: valid input passes, each malformed input is refused with its cause."""

from __future__ import annotations

import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given
from mudata import MuData

from epivi._errors import ConfigError, DataError
from epivi._validate import (
    check_anndata,
    check_categorical,
    check_choice,
    check_continuous,
    check_key,
    check_keys_distinct,
    check_number,
    check_reference,
    check_same_features,
)

# anndata 0.13 asks pandas 3 for options that pandas deprecates; not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")

NAN, INF = np.nan, np.inf


# ---------------------------------------------------------------- check_anndata


def adata_with(**names):
    adata = AnnData(np.ones((3, 2)))
    for key, value in names.items():
        setattr(adata, key, value)
    return adata


BAD_ANNDATA = {
    "mudata": (lambda: MuData({"atac": AnnData(np.ones((3, 2)))}), "is a MuData.*'atac'"),
    "array": (lambda: np.ones((2, 2)), r"is a numpy.ndarray.*Wrap it: anndata.AnnData"),
    "sparse": (lambda: sp.csr_matrix((2, 2)), "Wrap it"),
    "frame": (pd.DataFrame, "Wrap it"),
    "path": (lambda: "a.h5ad", "is a file name .'a.h5ad'.*read_h5ad"),
    "none": (lambda: None, "is a builtins.NoneType, an AnnData is needed"),
    "one cell": (lambda: AnnData(np.ones((1, 2))), "has 1 cells"),
    "zero cells": (lambda: AnnData(np.ones((0, 2))), "has 0 cells"),
    "zero features": (lambda: AnnData(np.ones((3, 0))), "zero features"),
    "cells twice": (lambda: adata_with(obs_names=["a", "b", "a"]), r"obs_names are not unique.*'a'.*_make_unique\(\)"),
    "peaks twice": (lambda: adata_with(var_names=["p", "p"]), r"var_names are not unique.*'p'"),
    "no matrix": (
        lambda: AnnData(obs=pd.DataFrame(index=["a", "b"]), var=pd.DataFrame(index=["p"])),
        "neither X nor layers",
    ),
}


@pytest.mark.parametrize("case", BAD_ANNDATA)
@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")
@pytest.mark.filterwarnings("ignore:The inplace keyword:DeprecationWarning")  # mudata 0.4 with pandas 3
def test_anndata_refused(case):
    make, words = BAD_ANNDATA[case]
    with pytest.raises(DataError, match=f"^query.*{words}"):
        check_anndata(make(), where="query")


def test_anndata_valid():
    adata = AnnData(np.ones((4, 1)))
    check_anndata(adata)
    check_anndata(adata[1:3])
    only_layer = AnnData(obs=pd.DataFrame(index=["a", "b"]), var=pd.DataFrame(index=["p"]))
    only_layer.layers["counts"] = np.ones((2, 1))
    check_anndata(only_layer)


# ---------------------------------------------------------------- columns of obs


def obs_with(values, dtype=None):
    index = [f"c{i}" for i in range(len(values))]
    return pd.DataFrame({"key": pd.Series(values, dtype=dtype, index=index)})


def test_key():
    frame = pd.DataFrame([[1, 2, 3]], columns=["batch", "x", "x"])
    check_key(frame, "batch", where="adata.obs")
    with pytest.raises(DataError, match=r"adata.obs has no entry 'bacth'. Did you mean 'batch'?"):
        check_key(frame, "bacth", where="adata.obs")
    with pytest.raises(DataError, match="2 columns named 'x'"):
        check_key(frame, "x", where="adata.obs")
    with pytest.raises(ConfigError, match=r"must be a string, found \['batch'\] \(list\)"):
        check_key(frame, ["batch"], where="adata.obs")
    layers = AnnData(np.ones((2, 2)), layers={"counts": np.ones((2, 2))}).layers
    check_key(layers, "counts", where="adata.layers")
    with pytest.raises(DataError, match=r"no entry 'count'. Did you mean 'counts'?"):
        check_key(layers, "count", where="adata.layers")


GOOD_CATEGORIES = [
    obs_with(["a", "b", "a"]),
    obs_with(["a", "b", "a"], dtype="category"),
    obs_with([0, 1, 1]),
    obs_with([True, False, True]),
    obs_with([0.0, 1.0] * 20),
    obs_with(np.linspace(0, 1, 20)),  # few rows: all different is no evidence
    obs_with([f"d{i}" for i in range(30)]),
    obs_with(["one"] * 5),
    obs_with([np.str_("a"), "b"], dtype=object),
]


@pytest.mark.parametrize("frame", GOOD_CATEGORIES)
def test_categorical_valid(frame):
    check_categorical(frame, "key", where="adata.obs")


BAD_CATEGORIES = {
    "none": (obs_with(["a", None, "b", None]), r"2 missing values, in 'c1', 'c3'.*fillna"),
    "nan category": (obs_with(["a", None], dtype="category"), "1 missing values, in 'c1'"),
    "many nan": (obs_with([NAN] * 9), "9 missing values, in 'c0', 'c1', 'c2', 'c3', 'c4' and 4 more"),
    "float": (obs_with(np.linspace(0, 1, 21)), "looks continuous: float64 with 21 different values in 21 rows"),
    "half": (obs_with(list(range(11)) + [0.0] * 9), None),
    "depth": (obs_with(list(range(11)) + [0] * 10), "looks continuous: int64 with 11 different values in 21 rows"),
    "mixed": (obs_with(["a", 1], dtype=object), r"mixes types: int, str.*astype\(str\)"),
}


@pytest.mark.parametrize("case", BAD_CATEGORIES)
def test_categorical_refused(case):
    frame, words = BAD_CATEGORIES[case]
    if words is None:  # 20 rows: the bound itself passes
        check_categorical(frame, "key", where="adata.obs")
        return
    with pytest.raises(DataError, match=rf"^adata.obs\['key'\].*{words}"):
        check_categorical(frame, "key", where="adata.obs")


@pytest.mark.parametrize("check", [check_categorical, check_continuous])
def test_columns_missing(check):
    with pytest.raises(DataError, match=r"Did you mean 'key'?"):
        check(obs_with([1]), "kye", where="adata.obs")


def test_continuous_valid():
    for values, dtype in (([1, 2], "int32"), ([0.5, -1], "float32"), ([1, 2], "Int64"), ([1, 2], "uint8")):
        check_continuous(obs_with(values, dtype=dtype), "key", where="adata.obs")
    check_continuous(obs_with([1e-9, 5]), "key", where="adata.obs", positive=True)


BAD_CONTINUOUS = {
    "nan": (obs_with([1, NAN, NAN]), r"'c1' .row 1. is nan; every value must be finite, 2 are not"),
    "nullable": (obs_with([1, None], dtype="Int64"), r"'c1' .row 1. is nan"),
    "inf": (obs_with([1, 2, INF]), r"'c2' .row 2. is inf"),
    "zero": (obs_with([1, 0, 2]), r"'c1' .row 1. is 0; every value must be above zero, 1 are not"),
    "negative": (obs_with([1, -3]), r"'c1' .row 1. is -3"),
    "text": (obs_with(["1", "2"]), r"dtype str, numbers are needed.*astype\(float\)"),
    "object": (obs_with([1, 2], dtype=object), "dtype object"),
    "category": (obs_with([1, 2], dtype="category"), "dtype category"),
    "bool": (obs_with([True, False]), "dtype bool"),
    "complex": (obs_with([1j, 2]), "dtype complex128"),
}


@pytest.mark.parametrize("case", BAD_CONTINUOUS)
def test_continuous_refused(case):
    frame, words = BAD_CONTINUOUS[case]
    with pytest.raises(DataError, match=rf"^adata.obs\['key'\].*{words}"):
        check_continuous(frame, "key", where="adata.obs", positive=True)


def test_keys_distinct():
    check_keys_distinct(None, None, None)
    check_keys_distinct("batch", ["donor", "sex"], ["age"])
    with pytest.raises(ConfigError, match="'batch' is used twice, in batch_key and in categorical_covariate_keys"):
        check_keys_distinct("batch", ["donor", "batch"], None)
    with pytest.raises(ConfigError, match=r"'age' is used twice, in categorical.*continuous_covariate_keys"):
        check_keys_distinct(None, ["age"], ["age"])
    with pytest.raises(ConfigError, match="'d' is used twice, in categorical_covariate_keys and in categorical_"):
        check_keys_distinct(None, ["d", "d"], None)
    with pytest.raises(ConfigError, match=r"must be a list of keys, found the string 'donor'. Write \['donor'\]"):
        check_keys_distinct("batch", "donor", None)


# ---------------------------------------------------------------- reference and features

CELLS = ["a", "b", "c"]


def test_reference_valid():
    values = np.array([[1, 2], [NAN, NAN], [0, 3]], dtype="float32")
    for form in (values, values.tolist(), pd.DataFrame(values, index=CELLS), pd.DataFrame(values)):
        mask = check_reference(form, where="ref", obs_names=CELLS)
        assert mask.dtype == bool
        assert mask.tolist() == [True, False, True]
    assert check_reference(np.eye(3, dtype=int), where="ref", obs_names=pd.Index(CELLS)).all()


BAD_REFERENCES = {
    "partly": ([[1, 2], [NAN, 1], [1, 1]], "rows of 1 cells, 'b', are partly NaN"),
    "inf": ([[1, 2], [2, 1], [INF, 1]], "rows of 1 cells, 'c', have infinite values"),
    "zeros": ([[0, 0], [1, 2], [0, 0]], "rows of 2 cells, 'a', 'c', hold only zeros"),
    "one": ([[NAN] * 2, [1, 2], [NAN] * 2], "1 of 3 cells have a reference"),
    "none": ([[NAN] * 2] * 3, "0 of 3 cells have a reference"),
    "1-d": ([1.0, 2.0, 3.0], r"has shape \(3,\), needed is \(3 cells, dimensions\)"),
    "short": ([[1.0], [2.0]], r"has shape \(2, 1\)"),
    "no columns": (np.ones((3, 0)), r"has shape \(3, 0\)"),
    "object": (np.ones((3, 2), dtype=object), "dtype object, numbers are needed"),
    "text": (pd.DataFrame({"x": ["u", "v", "w"]}), "numbers are needed"),
    "sparse": (sp.csr_matrix(np.eye(3)), r"sparse matrix, a dense embedding.*toarray"),
    "shuffled": (pd.DataFrame(np.eye(3), index=["c", "a", "b"]), "in another order.*loc"),
}


@pytest.mark.parametrize("case", BAD_REFERENCES)
def test_reference_refused(case):
    array, words = BAD_REFERENCES[case]
    with pytest.raises(DataError, match=f"^ref.*{words}"):
        check_reference(array, where="ref", obs_names=CELLS)


@given(st.permutations(range(8)), st.integers(1, 8))
def test_same_features_reorders(order, n_trained):
    query = np.array([f"p{i}" for i in order])
    trained = [f"p{i}" for i in range(n_trained)]
    indexer = check_same_features(trained, query, where="query")
    if list(query) == trained:
        assert indexer is None
    else:
        assert query[indexer].tolist() == trained


def test_same_features_refused():
    trained = [f"p{i}" for i in range(8)]
    assert check_same_features(trained, list(trained), where="query") is None
    with pytest.raises(DataError, match=r"query lacks 6 of the 8.*'p1', 'p2', 'p3', 'p4', 'p5' and 1 more.*prepare_qu"):
        check_same_features(trained, ["p0", "p7", "extra"], where="query")
    with pytest.raises(DataError, match="No feature is shared: here the names look like 'chr1-1-2'"):
        check_same_features(["chr1:1-2"], ["chr1-1-2"], where="query")
    with pytest.raises(DataError, match="features of query are not unique: 'b'"):
        check_same_features(["a"], ["a", "b", "b"], where="query")
    with pytest.raises(DataError, match="features of the trained model are not unique"):
        check_same_features(["a", "a"], ["a"], where="query")


# ---------------------------------------------------------------- arguments


def test_choice():
    check_choice("dense", "encoder", ["dense", "chromosome"])
    check_choice(np.str_("dense"), "encoder", ["dense", "chromosome"])
    check_choice(None, "mi_bound", ["pairwise", None])
    check_choice(2, "n", [1, 2])
    with pytest.raises(ConfigError, match=r"encoder='dens' is not valid. Did you mean 'dense'?"):
        check_choice("dens", "encoder", ["dense", "chromosome"])
    for value in (True, [1], np.array([1, 2]), 3):
        with pytest.raises(ConfigError, match=r"n=.* is not valid"):
            check_choice(value, "n", [1, 2])


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.25), np.int64(0)])
def test_number_valid(value):
    check_number(value, "rate", low=0, high=1, high_inclusive=False)


def test_number_integers():
    for value in (1, np.int32(3), 10**400):
        check_number(value, "n", low=1, integer=True)


BAD_NUMBERS = {
    "high": (1.5, {}, "rate=1.5 is out of range: a number of at least 0 and below 1 is needed. The nearest end is 1"),
    "end": (1, {}, "rate=1 is out of range"),
    "low": (-1, {}, "rate=-1 is out of range.*nearest end is 0"),
    "low end": (0, {"low_inclusive": False}, "a number above 0 and below 1"),
    "most": (2, {"high_inclusive": True}, "of at most 1"),
    "nan": (NAN, {}, "rate=nan is not valid.*finite"),
    "inf": (INF, {"high": None}, "rate=inf is not valid.*finite"),
    "bool": (True, {}, "rate=True .bool. is not valid: a number"),
    "numpy bool": (np.True_, {}, "bool"),
    "text": ("0.5", {}, r"rate='0.5' \(str\) is not valid"),
    "none": (None, {}, "NoneType"),
    "complex": (1j, {}, "complex"),
    "array": (np.array([0.5]), {}, "ndarray"),
    "float": (3.0, {"integer": True, "high": 5}, "an integer of at least 0 and below 5 is needed"),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_number_refused(case):
    value, options, words = BAD_NUMBERS[case]
    with pytest.raises(ConfigError, match=words):
        check_number(value, "rate", **{"low": 0, "high": 1, "high_inclusive": False, **options})


def test_gate_imports_no_heavy_package():
    code = (
        "import sys, epivi._validate, epivi.pp; "
        "print([m for m in ('torch', 'scvi', 'anndata', 'pandas', 'scanpy', 'muon', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
