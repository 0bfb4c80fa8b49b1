"""Count matrices: valid ones are summarised exactly, each malformed one is refused with its cause."""

from __future__ import annotations

import dataclasses

import h5py
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData, read_h5ad
from hypothesis import given, settings

from epivi import _validate_counts
from epivi._errors import DataError
from epivi._validate import check_anndata, check_counts

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
