"""The gate for predicted distributions."""

import numpy as np
import pytest

from epivi._errors import DataError
from epivi.metrics.calibration._arrays import as_counts, as_numbers, together


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (["a"], {}, r"mean cannot be read as numbers"),
        ([1.0, np.nan], {}, r"mean holds 1 values that are not finite numbers, the first is nan at 1\. Leave out"),
        ([[0.0, 1.0], [-2.0, -3.0]], {"low": 0}, r"holds 2 values .* of at least 0, the first is -2 at \(1, 0\)"),
        (0.0, {"low": 0, "above": True}, r"holds 1 values that are not finite numbers above 0, the first is 0\. "),
        ([0.5, 1.5], {"low": 0, "high": 1}, r"not finite numbers between 0 and 1, the first is 1.5 at 1"),
        ([np.inf], {"low": 0}, r"the first is inf"),
    ],
)
def test_bad_numbers_are_refused(values, options, message):
    with pytest.raises(DataError, match=message):
        as_numbers(values, "mean", **options)


def test_bounds_themselves_are_good():
    assert as_numbers([0, 1], "level", low=0, high=1).tolist() == [0.0, 1.0]


def test_fractions_are_no_counts():
    with pytest.raises(DataError, match=r"counts holds 2 values that are not whole numbers, the first is 1\.5"):
        as_counts([[1, 1.5], [0.1, 2]])
    with pytest.raises(DataError, match="of at least 0, the first is -1"):
        as_counts([-1])


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(DataError, match=r"mean \(2,\), variance \(3,\)\. Give one shape"):
        together(mean=np.ones(2), variance=np.ones(3))
