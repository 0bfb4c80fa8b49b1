"""The input gate: valid input passes and is summarised exactly, each malformed input is refused with its cause."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import h5py
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData, read_h5ad
from hypothesis import given, settings
from mudata import MuData

from epivi import _validate_counts
from epivi._errors import ConfigError, DataError
from epivi._validate import (
    check_anndata,
    check_categorical,
    check_choice,
    check_continuous,
    check_counts,
    check_key,
    check_keys_distinct,
    check_number,
    check_reference,
    check_same_features,
)

# anndata 0.13 asks pandas 3 for options that pandas deprecates; not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")

NAN, INF = np.nan, np.inf
CONTAINERS = [np.asarray, sp.csr_matrix, sp.csr_array, sp.csc_matrix, sp.csc_array]


def assert_summary(summary, dense):
    """Compare a summary with what numpy says of the dense matrix."""
    np.testing.assert_array_equal(summary.row_sums, dense.astype(float).sum(axis=1))
    np.testing.assert_array_equal(summary.n_open, (dense != 0).sum(axis=1))
    np.testing.assert_array_equal(summary.col_open, (dense != 0).sum(axis=0))
    assert summary.max_value == dense.max()
    assert summary.nnz == (dense != 0).sum()
    assert summary.is_binary == bool((dense[dense != 0] == 1).all())


# ---------------------------------------------------------------- check_counts: what is valid


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "uint16", "float32", "float64"])
def test_counts_summary_equals_numpy(container, dtype):
    dense = np.random.default_rng(0).poisson(0.4, (23, 11)).astype(dtype)
    dense[4] = 0  # a cell without counts is valid
    dense[:, 2] = 0
    assert_summary(check_counts(container(dense), where="X", chunk_rows=5), dense)


@given(
    dense=hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 4)).filter(
        np.any
    ),
    container=st.sampled_from(CONTAINERS),
    chunk_rows=st.integers(1, 10),
    max_entries=st.integers(1, 20),
)
@settings(max_examples=150, deadline=None)
def test_counts_summary_does_not_depend_on_chunks(dense, container, chunk_rows, max_entries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_validate_counts, "_MAX_ENTRIES", max_entries)
        assert_summary(check_counts(container(dense), where="X", chunk_rows=chunk_rows), dense)


@given(
    dense=hnp.arrays(np.float64, (6, 5), elements=st.sampled_from([0.0, 0.0, 1.0, 2.0, -1.0, 0.5, NAN, INF])),
    container=st.sampled_from(CONTAINERS),
    chunk_rows=st.integers(1, 7),
)
@settings(max_examples=150, deadline=None)
def test_counts_first_offender_equals_brute_force(dense, container, chunk_rows):
    bad = [(i, j) for i in range(6) for j in range(5) if not (dense[i, j] >= 0 and float(dense[i, j]).is_integer())]
    if not bad and dense.any():
        assert_summary(check_counts(container(dense), where="X", chunk_rows=chunk_rows), dense)
        return
    needed = f"row {bad[0][0]}, column {bad[0][1]} holds " if bad else "no value above zero"
    with pytest.raises(DataError, match=needed):
        check_counts(container(dense), where="X", chunk_rows=chunk_rows)


@pytest.mark.parametrize("container", [sp.csr_array, sp.csc_array])
def test_counts_explicit_zeros_and_duplicates(container):
    coo = sp.coo_array(([1.0, 2.0, 0.0, 5.0], ([0, 0, 1, 2], [1, 1, 0, 2])), shape=(3, 3))
    fmt = "csr" if container is sp.csr_array else "csc"
    indptr = np.array([0, 2, 3, 4]) if fmt == "csr" else np.array([0, 1, 3, 4])
    order = np.arange(4) if fmt == "csr" else np.array([2, 0, 1, 3])
    index = coo.coords[1 if fmt == "csr" else 0][order]
    matrix = container((coo.data[order], index, indptr), shape=(3, 3))
    before = matrix.data.copy(), matrix.indices.copy()
    assert_summary(check_counts(matrix, where="X"), np.array([[0, 3, 0], [0, 0, 0], [0, 0, 5]]))
    np.testing.assert_array_equal(matrix.data, before[0])  # the user's matrix stays as it is
    np.testing.assert_array_equal(matrix.indices, before[1])


def test_counts_unsorted_indices():
    matrix = sp.csr_array((np.array([3, 1]), np.array([2, 0]), np.array([0, 2, 2])), shape=(2, 3))
    assert_summary(check_counts(matrix, where="X"), np.array([[1, 0, 3], [0, 0, 0]]))
    assert matrix.indices.tolist() == [2, 0]


@pytest.mark.parametrize("container", CONTAINERS)
def test_counts_backed(container, tmp_path, monkeypatch):
    dense = np.random.default_rng(1).poisson(0.5, (17, 6)).astype("float32")
    AnnData(container(dense)).write_h5ad(tmp_path / "a.h5ad")
    for max_entries in (1 << 22, 7):
        monkeypatch.setattr(_validate_counts, "_MAX_ENTRIES", max_entries)
        backed = read_h5ad(tmp_path / "a.h5ad", backed="r")
        assert_summary(check_counts(backed.X, where="X", chunk_rows=4), dense)
        check_anndata(backed)
        backed.file.close()


def test_counts_backed_bad_value(tmp_path):
    dense = np.zeros((9, 4), dtype="float32")
    dense[7, 3], dense[2, 3] = -1, 0.5
    for container in CONTAINERS:
        AnnData(container(dense)).write_h5ad(tmp_path / "a.h5ad")
        backed = read_h5ad(tmp_path / "a.h5ad", backed="r")
        with pytest.raises(DataError, match=r"row 2, column 3 holds 0.5, not a whole number"):
            check_counts(backed.X, where="X", chunk_rows=2)
        backed.file.close()


def test_counts_h5py_dataset(tmp_path):
    dense = np.eye(5, dtype="int16")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        assert_summary(check_counts(file.create_dataset("x", data=dense), where="X", chunk_rows=2), dense)


def test_counts_view_and_extremes():
    adata = AnnData(sp.csr_matrix(np.arange(12).reshape(4, 3)))
    assert_summary(check_counts(adata[1:3].X, where="X"), np.arange(12).reshape(4, 3)[1:3])
    assert_summary(check_counts(np.array([[1]]), where="X"), np.array([[1]]))
    big = np.array([[2**40, 1]])
    assert_summary(check_counts(big, where="X"), big)


def test_summary_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        check_counts(np.eye(2), where="X").nnz = 3


# ---------------------------------------------------------------- check_counts: what is refused


class FakeDask:
    """Stands for a dask array: only the module of the type is looked at."""

    shape, dtype, ndim = (3, 3), np.dtype(float), 2


FakeDask.__module__ = "dask.array.core"

GOOD = np.ones((3, 3))


def with_value(value, at=(1, 2)):
    dense = np.ones((3, 3))
    dense[at] = value
    return dense


BAD_COUNTS = {
    "nan": (with_value(NAN), "cell 'b' .row 1., column 2 holds NaN, a missing value"),
    "inf": (with_value(INF), "holds inf, an infinite value"),
    "minus inf": (with_value(-INF), "holds -inf, an infinite value"),
    "negative": (with_value(-2), "cell 'b' .row 1., column 2 holds -2, a negative value"),
    "negative int": (with_value(-2).astype(int), "holds -2, a negative value"),
    "log": (np.log1p(with_value(4)), "cell 'a' .row 0., column 0 holds 0.693.*log-normalised.*layer='counts'"),
    "sparse nan": (sp.csr_matrix(with_value(NAN)), "NaN"),
    "csc half": (sp.csc_array(with_value(0.5)), "cell 'b' .row 1., column 2 holds 0.5, not a whole number"),
    "zeros": (np.zeros((3, 3)), "no value above zero"),
    "sparse zeros": (sp.csr_matrix((3, 3)), "no value above zero"),
    "object": (GOOD.astype(object), "dtype object"),
    "text": (GOOD.astype(str), "dtype <U.*cannot hold counts"),
    "complex": (GOOD.astype(complex), "dtype complex128"),
    "dates": (np.zeros((3, 3), "datetime64[s]"), "dtype datetime64"),
    "records": (np.zeros((3, 3), [("x", float)]), "cannot hold counts"),
    "1-d": (np.ones(3), r"1 axes, shape \(3,\)"),
    "3-d": (np.ones((3, 3, 1)), r"3 axes, shape \(3, 3, 1\)"),
    "no features": (np.ones((3, 0)), "zero features"),
    "no cells": (np.ones((0, 3)), "zero cells"),
    "coo": (sp.coo_matrix(GOOD), r"format 'coo'. Convert it with .tocsr\(\)"),
    "dask": (FakeDask(), r"dask array .*\.compute\(\)"),
    "frame": (pd.DataFrame(GOOD), r"pandas DataFrame.*to_numpy"),
    "masked": (np.ma.masked_equal(GOOD, 0), r"masked array.*\.filled\(0\)"),
    "none": (None, "is empty .None."),
    "list": ([[1, 2]], "has type builtins.list"),
    "empty dataset": (h5py.Empty("f4"), "has type h5py.*which is no matrix"),
    "names": (np.ones((2, 3)), "2 rows and there are 3 cell names"),
}


@pytest.mark.parametrize("case", BAD_COUNTS)
def test_counts_refused(case):
    matrix, words = BAD_COUNTS[case]
    with pytest.raises(DataError, match=rf"(?s)^adata\.X.*{words}"):
        check_counts(matrix, where="adata.X", obs_names=["a", "b", "c"])


def test_counts_damaged_sparse_matrices():
    outside = sp.csr_array(GOOD)
    outside.indices[4] = 7
    with pytest.raises(DataError, match="index lies outside its shape"):
        check_counts(outside, where="X")
    outside.indices[4] = -1
    with pytest.raises(DataError, match="index lies outside its shape"):
        check_counts(outside, where="X")
    for at, value in ((1, 8), (3, 99), (0, 1)):
        jumping = sp.csr_array(GOOD)
        jumping.indptr[at] = value
        with pytest.raises(DataError, match="indptr does not fit"):
            check_counts(jumping, where="X")


def test_counts_names_alternatives():
    layers = {"counts": GOOD, "scaled": -GOOD, "fragments": sp.csr_matrix(GOOD)}
    with pytest.raises(DataError, match=r"Whole numbers are in: 'counts', 'fragments'\."):
        check_counts(np.log1p(GOOD), where="X", alternatives=layers)
    with pytest.raises(DataError, match=r"Whole numbers are in: 'counts', 'fragments'\."):
        check_counts(0 * GOOD, where="X", alternatives=layers)
    with pytest.raises(DataError, match=r"layer='counts'.$"):
        check_counts(np.log1p(GOOD), where="X", alternatives={"scaled": -GOOD})


def test_counts_memory_is_bounded(monkeypatch):
    seen = []

    class Wide(np.ndarray):
        def __getitem__(self, item):
            part = super().__getitem__(item)
            if isinstance(item, slice):
                seen.append(part.shape[0])
            return part

    monkeypatch.setattr(_validate_counts, "_MAX_ENTRIES", 100)
    dense = np.ones((12, 30))
    assert_summary(check_counts(dense.view(Wide), where="X"), dense)
    assert max(seen) == 3  # 3 x 30 entries at once


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
