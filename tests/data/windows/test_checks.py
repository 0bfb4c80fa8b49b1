from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from epivi._errors import DataError
from epivi.data.windows import _checks, runs
from epivi.data.windows._checks import blocks, check_availability, check_values_array, scan

BINS = runs(pd.DataFrame({"chrom": "1", "start": np.arange(30), "end": np.arange(30) + 1}))
NAMES = (["b0", "b1", "b2"], ["a0", "a1"])


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 30)), st.integers(1, 200), st.integers(0, 2**6 - 1)
)
def test_blocks_cover_each_wanted_experiment_once(chunks, most, bits):
    wanted = np.array([(bits >> i) & 1 for i in range(6)], dtype=bool).reshape(3, 2)
    array = np.arange(180).reshape(3, 2, 30)
    stored = zarr.create_array(zarr.storage.MemoryStore(), data=array, chunks=chunks)
    before, _checks.BLOCK_VALUES = _checks.BLOCK_VALUES, most
    try:
        for form in (array, stored):
            seen = np.zeros(array.shape, dtype=int)
            for row, assay, first, values in blocks(form, wanted):
                at = tuple(slice(s, s + n) for s, n in zip((row, assay, first), values.shape, strict=True))
                np.testing.assert_array_equal(values, array[at])
                seen[at] += 1
            assert (seen[wanted] == 1).all()
            assert seen.max() <= 1
    finally:
        _checks.BLOCK_VALUES = before


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_sums_are_those_of_numpy(dtype):
    array = np.random.default_rng(0).integers(0, 200, (3, 2, 30)).astype(dtype)
    available = np.array([[True, False], [True, True], [False, True]])
    for is_counts in (True, False):
        sums, squares = scan(array, available, BINS, where="x", names=NAMES, is_counts=is_counts)
        np.testing.assert_array_equal(sums, array.sum(-1, dtype=float) * available)
        np.testing.assert_array_equal(squares, (array.astype(float) ** 2).sum(-1) * available)


def test_no_value_under_an_unavailable_assay_is_judged():
    array = np.full((3, 2, 30), np.nan)
    array[0, 0] = 1
    available = np.zeros((3, 2), dtype=bool)
    available[0, 0] = True
    assert scan(array, available, BINS, where="x", names=NAMES, is_counts=True)[0].sum() == 30
    available[2, 1] = True
    with pytest.raises(DataError, match=r"x is nan for biosample 'b2', assay 'a1', bin 0 \(1:0-1\)"):
        scan(array, available, BINS, where="x", names=NAMES, is_counts=False)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (sparse.csr_matrix((3, 60)), "has type scipy.*Give a numpy, zarr or dask array of shape"),
        (pd.DataFrame(np.zeros((3, 60))), "has type pandas"),
        ([1, 2], "has type builtins.list"),
        (np.ma.zeros((3, 2, 30)), "is a masked array"),
        (np.zeros((3, 60)), r"has the shape \(3, 60\), needed is \(3, 2, 30\)"),
    ],
)
def test_strange_arrays_are_refused(array, message):
    with pytest.raises(DataError, match=message):
        check_values_array(array, where="x", shape=(3, 2, 30), is_counts=False)


def test_columns_of_a_mask_must_be_the_assays():
    with pytest.raises(DataError, match="x has the columns 'a0', 'z', needed are the assays 'a0', 'a1'"):
        check_availability(pd.DataFrame({"a0": [True], "z": [True]}), where="x", obs_names=["b"], assays=["a0", "a1"])
    with pytest.raises(DataError, match=r"x has the shape \(0, 2\): biosamples as obs"):
        _checks.check_holder(ad.AnnData(np.zeros((0, 2))), where="x")
