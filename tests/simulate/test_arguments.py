from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epivi._errors import ConfigError
from epivi.simulate._arguments import (
    cell_table,
    check_clip,
    check_integer,
    check_keywords,
    check_number,
    per_batch,
    split_evenly,
    stream,
)


def test_streams_are_reproducible_and_apart():
    draws = {key: stream(0, *key).random() for key in [(0,), (1,), (0, 1), (1, 0)]}
    assert draws[0, 1] == stream(0, 0, 1).random()
    assert len(set(draws.values())) == 4


@given(total=st.integers(0, 1000), shares=st.lists(st.floats(0.01, 10), min_size=1, max_size=8))
def test_split_is_complete_and_within_one_of_the_exact_share(total, shares):
    shares = np.array(shares)
    parts = split_evenly(total, shares)
    assert parts.sum() == total
    assert (np.abs(parts - total * shares / shares.sum()) < 1 + 1e-9).all()


@pytest.mark.parametrize("value", [True, "3", 2.0, None, -1])
def test_no_whole_number_is_named(value):
    with pytest.raises(ConfigError, match=f"n={value!r} is not valid: give a whole number of at least 0"):
        check_integer("n", value)


@pytest.mark.parametrize("value", [True, "3", np.nan, np.inf, None, -0.1, 1.1])
def test_no_number_is_named(value):
    with pytest.raises(ConfigError, match=r"x=.* is not valid: give a finite number between 0 and 1"):
        check_number("x", value, high=1.0)


def test_numpy_scalars_are_taken():
    assert check_integer("n", np.int64(3)) == 3
    assert check_number("x", np.float32(0.5)) == 0.5


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "n_cells=5 is not valid"),
        ([], "n_cells=.* is not valid"),
        ("abc", "n_cells='abc' is not valid"),
        ([1, [2]], "mixes numbers and lists"),
        ([[1, 2], [3]], r"have \[2, 1\] types"),
        ([[], []], r"have \[0, 0\] types"),
        ([5, -1], r"n_cells\[0\]\[1\]=-1 is not valid"),
        ([[5], [2.5]], r"n_cells\[1\]\[0\]=2.5 is not valid"),
        ([0, 0], "asks for no cell"),
    ],
)
def test_bad_cell_numbers_are_named(value, words):
    with pytest.raises(ConfigError, match=words):
        cell_table(value)


def test_cell_table_takes_lists_tuples_and_arrays():
    for value in ([[1, 2], [3, 0]], ((1, 2), (3, 0)), np.array([[1, 2], [3, 0]])):
        np.testing.assert_array_equal(cell_table(value), [[1, 2], [3, 0]])


def test_per_batch_names_length_and_entry():
    with pytest.raises(ConfigError, match="rho has 3 entries for 2 batches"):
        per_batch("rho", [0.1, 0.2, 0.3], 2)
    with pytest.raises(ConfigError, match=r"rho\[1\]=2.0 is not valid"):
        per_batch("rho", [0.1, 2.0], 2, high=1.0)


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ((100, 10), r"clip=\(100, 10\) is reversed"),
        ((0, 10), r"clip=\(0, 10\) permits empty cells.*allow_empty=True"),
        ((1, np.inf), "clip=inf is not valid"),
        ((-5, 10), "clip=-5 is not valid"),
        (7, "clip=7 is not valid: give a pair"),
        ((1, 2, 3), "give a pair"),
        ([(1, 2)] * 3, "clip has 3 pairs for 2 batches"),
        ([(1, 2), (4, 3)], r"clip=\(4, 3\) is reversed"),
    ],
)
def test_bad_clips_are_named(clip, words):
    with pytest.raises(ConfigError, match=words):
        check_clip(clip, 2, allow_empty=False)


def test_clip_is_repeated_or_goes_by_batch():
    np.testing.assert_array_equal(check_clip((1, 5), 2, allow_empty=False), [[1, 5], [1, 5]])
    np.testing.assert_array_equal(check_clip([(0, 5), (1, 6)], 2, allow_empty=True), [[0, 5], [1, 6]])


def test_keywords_are_checked_by_name():
    def receiver(*, median=1, rho=2, seed=0):
        return median, rho, seed

    check_keywords("kw", {"median": 3}, receiver, taken=["seed"])
    with pytest.raises(ConfigError, match=r"kw holds the unknown keyword 'medain'\. Did you mean 'median'"):
        check_keywords("kw", {"medain": 3}, receiver)
    with pytest.raises(ConfigError, match="kw may not hold 'seed'"):
        check_keywords("kw", {"seed": 3}, receiver, taken=["seed"])
