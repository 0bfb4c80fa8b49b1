from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData

from epivi._errors import DataError
from epivi.data.windows._covariates import moments, read_levels, read_numbers, reference_depth

ALL = np.ones((2, 2), dtype=bool)


def holder(values, categories=None):
    uns = {} if categories is None else {"categories": categories}
    return AnnData(np.ones((2, 2)), obsm={"x": np.asarray(values)}, uns=uns)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((2, 3)), r"obsm\['x'\] has the shape \(2, 3\), needed is \(2, 2\)"),
        (np.array([["a", "b"], ["c", "d"]]), r"obsm\['x'\] has dtype <U1: give numbers"),
    ],
)
def test_bad_numbers_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        read_numbers(holder(values), ["x"], ALL, where="adata")
    with pytest.raises(DataError, match=r"adata\.obsm has no entry 'y'"):
        read_numbers(holder(values), ["y"], ALL, where="adata")


@pytest.mark.parametrize(
    ("values", "categories", "message"),
    [
        (np.ones((2, 3), int), {"x": ["a", "b"]}, r"has the shape \(2, 3\)"),
        (np.ones((2, 2)), {"x": ["a", "b"]}, "has dtype float64: give the codes"),
        (np.full((2, 2), -2), {"x": ["a", "b"]}, "is -2 for biosample '0', assay '0'; 4 such values"),
        (np.ones((2, 2), int), {"y": ["a", "b"]}, r"adata.uns\['categories'\] has no entry 'x'"),
        (np.ones((2, 2), int), {"x": ["a", "a"]}, "each level must be named once"),
        (np.ones((2, 2), int), "ab", r"uns\['categories'\] is a str: a dict"),
    ],
)
def test_bad_levels_are_refused(values, categories, message):
    with pytest.raises(DataError, match=message):
        read_levels(holder(values, categories), ["x"], ALL, where="adata")


def test_moments_and_medians_pass_over_what_is_unknown():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [8.0, np.nan]])
    assert moments(values) == {"mean": 4.0, "sd": pytest.approx(np.std([1, 3, 8]))}
    assert moments(np.full((2, 2), np.nan)) == {"mean": 0.0, "sd": 1.0}
    assert moments(np.full((2, 2), 7.0)) == {"mean": 7.0, "sd": 1.0}
    np.testing.assert_array_equal(reference_depth(values), [3, np.nan])
