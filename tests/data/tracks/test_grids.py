from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epivi._errors import ConfigError, DataError
from epivi.data.tracks.grids import TrackGrid, TrackLayout, nested, segments
from epivi.train._encoding import decode, encode


def frame(*bins):
    return pd.DataFrame(bins, columns=["chrom", "start", "end"])


def grid(*bins, size=None):
    return TrackGrid.from_frame(frame(*bins), where="bins", bin_size_bp=size)


def tiles(sizes, width):
    return [
        (chrom, start, min(start + width, size)) for chrom, size in sizes.items() for start in range(0, size, width)
    ]


GOOD = [("chr1", 0, 10), ("chr1", 10, 20), ("chr1", 40, 50), ("chr2", 0, 10), ("chr2", 10, 14)]


def test_segments_end_at_chromosomes_and_gaps():
    bins = grid(*GOOD)
    assert segments(bins, "none") == [5]
    assert segments(bins, "chromosome") == [3, 2]
    assert segments(bins, "gap") == [2, 1, 2]
    assert segments(bins) == [3, 2]
    # touching positions on two chromosomes are no run
    assert segments(grid(("a", 0, 10), ("b", 10, 20)), "gap") == [1, 1]
    assert segments(grid(("a", 0, 10)), "gap") == [1]
    with pytest.raises(ConfigError, match=r"boundaries='gaps' is not valid. Did you mean 'gap'"):
        segments(bins, "gaps")


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=30))
def test_segments_agree_with_a_loop(steps):
    bins, chrom, start = [], 0, 0
    for new_chrom, has_gap in steps:
        chrom, start = (chrom + 1, 0) if new_chrom == 0 else (chrom, start + (10 if has_gap else 0))
        bins.append((f"c{chrom}", start, start + 10))
        start += 10
    for boundaries in ("chromosome", "gap"):
        expected = [1]
        for last, this in pairwise(bins):
            joined = last[0] == this[0] and (boundaries == "chromosome" or last[2] == this[1])
            if joined:
                expected[-1] += 1
            else:
                expected.append(1)
        assert segments(grid(*bins), boundaries) == expected


def test_a_grid_survives_its_state_as_json():
    bins = grid(*GOOD, size=10)
    state = decode(encode(bins.state()))
    again = TrackGrid.from_state(state)
    assert bins.first_difference(again) is None
    assert again.bin_size_bp == 10
    assert state["hash"] == again.state()["hash"] != grid(*GOOD[:-1]).state()["hash"]
    pd.testing.assert_frame_equal(again.frame().reset_index(drop=True), frame(*GOOD), check_dtype=False)
    assert again.frame().index[-1] == again.name(4) == "chr2:10-14"


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("what", range(3))
def test_the_first_difference_is_found_in_every_column(at, what):
    changed = [list(row) for row in GOOD]
    changed[at][what] = "chrX" if what == 0 else changed[at][what] + 1
    columns = list(zip(*changed, strict=True))
    other = TrackGrid(np.array(columns[0]), np.array(columns[1]), np.array(columns[2]), 10)
    assert grid(*GOOD).first_difference(other) == at
    assert grid(*GOOD).first_difference(grid(*GOOD[:3])) == 3


def test_a_layout_concatenates_channels_of_several_grids():
    layout = TrackLayout(("a", "b", "c"), (grid(*GOOD), grid(*GOOD[:2])), (0, 1, 0), "hg38")
    assert layout.n_bins == [5, 2, 5]
    assert layout.offsets.tolist() == [0, 5, 7, 12]
    again = TrackLayout.from_state(decode(encode(layout.state())))
    assert (again.channels, again.grid_of_channel, again.genome) == (layout.channels, (0, 1, 0), "hg38")
    assert [again.grid(i).n_bins for i in range(3)] == [5, 2, 5]


@given(
    st.dictionaries(st.sampled_from(["1", "2", "X"]), st.integers(1, 90), min_size=1),
    st.integers(1, 7),
    st.integers(1, 6),
)
def test_nested_bins_agree_with_arithmetic(sizes, width, ratio):
    fine, coarse = grid(*tiles(sizes, width), size=width), grid(*tiles(sizes, width * ratio), size=width * ratio)
    parent, slot, n_slots = nested(coarse, fine)
    assert n_slots == ratio
    expected = [
        next(
            i
            for i, other in enumerate(tiles(sizes, width * ratio))
            if other[0] == row[0] and other[1] <= row[1] < other[2]
        )
        for row in tiles(sizes, width)
    ]
    assert parent.tolist() == expected
    assert slot.tolist() == [row[1] // width % ratio for row in tiles(sizes, width)]
    assert len(set(zip(parent, slot, strict=True))) == fine.n_bins


def test_nested_works_on_selected_bins():
    coarse = grid(("1", 100, 200), ("1", 500, 600), ("2", 0, 100))
    fine = grid(("1", 150, 200), ("1", 500, 550), ("2", 50, 100))
    assert [part.tolist() for part in nested(coarse, fine)[:2]] == [[0, 1, 2], [1, 0, 1]]


@pytest.mark.parametrize(
    ("fine", "message"),
    [
        ([("1", 100, 130)], r"Bins of 30 bp do not divide bins of 100 bp"),
        ([("1", 100, 150), ("1", 300, 350)], r"Fine bin 1 \(1:300-350\) does not lie inside one coarse bin; 1 of 2"),
        ([("1", 0, 50)], r"Fine bin 0 \(1:0-50\) does not lie inside"),
        ([("1", 180, 230)], r"Fine bin 0 \(1:180-230\) does not lie inside"),
        ([("3", 100, 150)], r"Fine bin 0 \(3:100-150\) does not lie inside"),
        ([("1", 125, 175)], r"Fine bin 0 \(1:125-175\) does not begin a multiple of 50 bp after its coarse bin"),
    ],
)
def test_bins_that_are_not_nested_are_named(fine, message):
    with pytest.raises(DataError, match=message):
        nested(grid(("1", 100, 200), ("1", 200, 300), ("2", 0, 100)), grid(*fine))


@pytest.mark.parametrize(
    ("bins", "size", "message"),
    [
        (frame(), None, "bins has no row"),
        (frame(("1", 0, 10)).drop(columns="end"), None, "bins has no entry 'end'"),
        ({"chrom": ["1"]}, None, "bins is a dict: give a DataFrame"),
        (frame(("1", 0, 10), (None, 10, 20)), None, r"bins\['chrom'\] has no chromosome in row 1"),
        (frame(("1", 0, 10), ("1", 10.5, 20)), None, r"bins\['start'\] is .*10.5.* in row 1; a whole number"),
        (frame(("1", 0, "x")), None, r"bins\['end'\] is 'x' in row 0"),
        (frame(("1", -1, 10)), None, r"bin 0 \(1:-1-10\) starts below zero"),
        (frame(("1", 0, 10), ("1", 20, 20)), None, r"bin 1 \(1:20-20\) does not end after its start"),
        (frame(("1", 0, 10), ("1", 30, 20)), None, r"bin 1 \(1:30-20\) does not end after its start"),
        (frame(("1", 0, 9), ("2", 0, 9), ("1", 9, 18), ("2", 9, 18)), None, r"bin 2 \(1:9-18\).*interleaved.*; 2 bins"),
        (frame(("1", 0, 10), ("1", 20, 30), ("1", 10, 20)), None, r"bin 2 \(1:10-20\) starts before.*Sort the bins"),
        (frame(("1", 0, 10), ("1", 9, 19)), None, r"bin 1 \(1:9-19\) overlaps the bin in front of it"),
        (frame(("1", 0, 10), ("1", 0, 10)), None, r"bin 1 \(1:0-10\) overlaps"),
        (frame(("1", 0, 10), ("1", 10, 30)), 10, r"bin 1 \(1:10-30\) is wider than bin_size_bp=10"),
        (frame(("1", 0, 10)), 0, "The bin_size_bp of bins is 0; a whole number"),
        (frame(("1", 0, 10)), "10", "The bin_size_bp of bins is '10'"),
    ],
)
def test_bins_that_cannot_be_used_are_named(bins, size, message):
    with pytest.raises(DataError, match=re.compile(message)):
        TrackGrid.from_frame(bins, where="bins", bin_size_bp=size)


def test_chromosomes_may_come_in_any_order_and_as_categories():
    bins = frame(("chr10", 0, 10), ("chr2", 0, 10))
    bins["chrom"] = bins["chrom"].astype("category")
    bins["start"] = bins["start"].astype(float)
    found = TrackGrid.from_frame(bins, where="bins", bin_size_bp=np.int64(10))
    assert found.chrom.tolist() == ["chr10", "chr2"]
    assert found.start.dtype == np.int64
