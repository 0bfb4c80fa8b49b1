"""Rows of zarr stores are those of the matrix in memory; what is held is bounded; what cannot be read is refused."""

import sys

import anndata as ad
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from epivi._errors import ConfigError, DataError
from epivi.data.disk import DiskRows, open_collection, rows_on_disk
from epivi.data.disk import rows as module


@pytest.fixture(scope="module")
def matrix(store):
    pytest.importorskip("annbatch", reason="annbatch is not installed (extra 'large')")
    return open_collection(store).X


def same(got, expected) -> bool:
    return got.shape == expected.shape and (got != expected).nnz == 0 and got.dtype == expected.dtype


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, 129), max_size=20), at_once=st.integers(1, 9))
def test_rows_in_any_order_are_those_in_memory(matrix, cells, rows, at_once) -> None:
    before = module.ROWS_AT_ONCE
    module.ROWS_AT_ONCE = at_once
    try:
        assert same(matrix[np.array(rows, dtype=int)], cells.X[np.array(rows, dtype=int)])
    finally:
        module.ROWS_AT_ONCE = before


def test_slices_masks_columns_and_single_rows(matrix, cells) -> None:
    keep = np.arange(130) % 3 == 0
    assert same(matrix[5:70:7], cells.X[5:70:7])
    assert same(matrix[keep], cells.X[keep])
    assert same(matrix[-1], cells.X[[129]])
    assert same(matrix[3:9, [4, 2]], cells.X[3:9][:, [4, 2]])
    assert same(matrix.to_memory(), cells.X)
    assert matrix.shape == cells.shape


def test_held_rows_are_not_read_again(matrix, cells, monkeypatch) -> None:
    asked = []
    read = DiskRows._read
    monkeypatch.setattr(DiskRows, "_read", lambda self, rows: asked.append(rows.size) or read(self, rows))
    block = np.arange(20, 60, 2)
    matrix.hold(block)
    matrix.hold(block.copy())
    assert same(matrix[np.array([58, 20, 20])], cells.X[[58, 20, 20]])
    assert asked == [20]
    assert matrix.n_held == 20
    assert same(matrix[np.array([20, 21])], cells.X[[20, 21]])
    assert asked == [20, 2]
    matrix.hold(np.array([0]))
    assert matrix.n_held == 1
    assert matrix[np.array([0])].nnz == 0


def test_small_gaps_alone_are_read_over() -> None:
    assert module._covering(np.array([0, 8, 17, 18])).tolist() == [*range(9), 17, 18]
    assert module._covering(np.array([7])).tolist() == [7]


def test_without_annbatch_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "annbatch", None)
    with pytest.raises(ConfigError, match=r"pip install epivi\[large\]"):
        DiskRows([])
    with pytest.raises(ConfigError, match=r"pip install epivi\[large\]"):
        rows_on_disk(np.zeros((2, 2)))
    with pytest.raises(ConfigError, match=r"pip install epivi\[large\]"):
        open_collection("anywhere")


def test_parts_that_cannot_be_read_are_refused(matrix, cells, tmp_path, write) -> None:
    with pytest.raises(
        DataError, match=r"Part 1 is no row-compressed matrix in a zarr store \(csr_matrix, not on disk"
    ):
        DiskRows([matrix.parts[0], sparse.csr_matrix((2, 30))])
    narrow = open_collection(write(tmp_path / "narrow.zarr", cells[:5, :7].copy()))
    with pytest.raises(DataError, match=r"2 parts have \[7, 30\] columns"):
        DiskRows([matrix.parts[0], *narrow.X.parts])
    with pytest.raises(DataError, match=r"0 parts have \[\] columns"):
        DiskRows([])


def test_only_zarr_stores_can_be_held(matrix, cells, tmp_path) -> None:
    assert rows_on_disk(matrix) is matrix
    wrapped = rows_on_disk(matrix.parts[2])
    assert same(wrapped[:], cells.X[24:36])
    with pytest.raises(ConfigError, match="the counts are in memory"):
        rows_on_disk(cells.X)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(ConfigError, match="in a file of kind hdf5"):
        rows_on_disk(backed.X)
    backed.file.close()
