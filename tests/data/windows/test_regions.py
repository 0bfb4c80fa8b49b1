from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi._errors import ConfigError, DataError
from epivi.data.tracks.grids import TrackGrid
from epivi.data.windows import Run, Runs, runs, split_chromosomes, tile


def table(*parts, width=10):
    rows = [(c, s + width * i, s + width * (i + 1)) for c, s, n in parts for i in range(n)]
    return pd.DataFrame(rows, columns=["chrom", "start", "end"])


def brute_runs(bins):
    found = []
    for i, (chrom, start, end) in enumerate(bins.itertuples(index=False)):
        if found and found[-1][0] == chrom and found[-1][4] == start:
            found[-1][2] += 1
            found[-1][4] = end
        else:
            found.append([chrom, i, 1, start, end])
    return [tuple(run[:4]) for run in found]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=5))
def test_runs_are_those_of_a_walk_over_the_bins(parts):
    start, rows = 0, []
    for number, (n, gap) in enumerate(parts):
        chrom = f"chr{number // 2}"
        start = gap if number % 2 == 0 else start + gap
        rows.append((chrom, start, n))
        start += 10 * n
    bins = table(*rows)
    for form in (bins, bins.astype({"chrom": "category", "start": "int32", "end": "int32"})):
        assert [tuple(run) for run in runs(form)] == brute_runs(bins)
    assert [tuple(run) for run in runs(TrackGrid.from_frame(bins, where=""))] == brute_runs(bins)
    again = Runs.from_state(runs(bins).state())
    assert [tuple(run) for run in again] == brute_runs(bins)
    of = again.of(np.arange(-1, len(bins) + 1))
    assert of[0] == of[-1] == -1
    for at in range(len(bins)):
        assert again.name(at) == "{}:{}-{}".format(*bins.iloc[at])


def test_the_hash_changes_with_the_bins():
    hashes = {
        runs(bins).state()["hash"]
        for bins in (table(("1", 0, 3)), table(("1", 0, 4)), table(("1", 5, 3)), table(("2", 0, 3)))
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        ([1], "is a list"),
        (table(), "has no row"),
        (table(("1", 0, 2)).drop(columns="end"), "no entry 'end'"),
        (table(("1", 0, 2)).assign(chrom=["1", None]), "no chromosome in row 1"),
        (table(("1", 0, 2)).assign(start=[0, 10.5]), "whole number"),
        (table(("1", 20, 1), ("1", 0, 1)), "bin 1 .1:0-10. starts before the bin in front"),
        (table(("1", 0, 1), ("1", 5, 1)), "bin 1 .1:5-15. overlaps"),
        (table(("1", 0, 1), ("2", 0, 1), ("1", 10, 1)), "bin 2 .1:10-20. lies on a chromosome that ended"),
        (table(("1", 0, 2)).assign(end=[10, 10]), "does not end after its start"),
        (table(("1", -10, 2)), "starts below zero"),
        (table(("1", 0, 3)).assign(end=[10, 20, 25]), r"bin 2 \(1:20-25\) is 5 bp wide, the first bin 10 bp; 1 bins"),
    ],
)
def test_bad_bins_are_refused(bins, message):
    with pytest.raises(DataError, match=message):
        runs(bins, where="bins")


def test_regions_of_runs():
    found = runs(table(("1", 0, 5), ("1", 100, 3), ("2", 3, 4)))
    assert [tuple(r) for r in found.region("1:15-111")] == [("1", 1, 4, 10), ("1", 5, 2, 100)]
    assert [tuple(r) for r in found.region(("2", 13, 14))] == [("2", 9, 1, 13)]
    assert found.region("2").total == 4
    with pytest.raises(DataError, match=r"No bin overlaps 1:60-90.*'1', '2'"):
        found.region("1:60-90")
    with pytest.raises(ConfigError, match="cannot be read"):
        found.region("nowhere")


def test_the_smallest_chromosomes_with_room_validate_by_default(caplog):
    found = runs(table(("1", 0, 60), ("2", 0, 35), ("3", 0, 4), ("4", 0, 6), ("5", 0, 1)))
    with caplog.at_level(logging.INFO, logger="epivi"):
        parts = split_chromosomes(found, 4)
    # '5' has no room for a window; '3' and '4' hold 10 of 106 bins, too few, so that '2' follows
    assert parts.validation.chromosomes == ["2", "3", "4"]
    assert parts.train.chromosomes == ["1", "5"]
    assert len(parts.test) == 0
    assert "Validation on ['3', '4', '2']: 42.5 %" in caplog.text


def test_given_chromosomes_win():
    found = runs(table(("1", 0, 60), ("2", 0, 35), ("3", 0, 20)))
    parts = split_chromosomes(found, 4, validation=["1"], test=["3"])
    assert [p.chromosomes for p in (parts.train, parts.validation, parts.test)] == [["2"], ["1"], ["3"]]
    parts = split_chromosomes(found, 4, validation=[], test=["3"])
    assert [p.chromosomes for p in (parts.train, parts.validation, parts.test)] == [["1", "2"], [], ["3"]]
    parts = split_chromosomes(found, 4, test=["3"])
    assert parts.validation.chromosomes == ["2"]


def test_one_chromosome_gives_its_last_bins(caplog):
    with caplog.at_level(logging.INFO, logger="epivi"):
        parts = split_chromosomes(runs(table(("1", 0, 80), ("1", 1000, 20))), 5)
    assert [tuple(r) for r in parts.validation] == [("1", 90, 10, 1100)]
    assert [tuple(r) for r in parts.train] == [("1", 0, 80, 0), ("1", 80, 10, 1000)]
    assert "last 10 of the 100 bins of '1'" in caplog.text
    # a gap inside the last tenth, one window where a tenth is shorter, and small chromosomes beside it
    parts = split_chromosomes(runs(table(("0", 0, 2), ("1", 0, 96), ("1", 1000, 4))), 20)
    assert [tuple(r) for r in parts.validation] == [("1", 82, 16, 800), ("1", 98, 4, 1000)]
    assert [tuple(r) for r in parts.train] == [("0", 0, 2, 0), ("1", 2, 80, 0)]
    assert split_chromosomes(runs(table(("1", 0, 30))), 20).validation.total == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": ["3"]}, "validation_chroms names '3', which has no bin"),
        ({"test": "1"}, "test_chroms='1' is not valid: give a list"),
        ({"test": [1]}, "test_chroms"),
        ({"validation": ["1"], "test": ["1"]}, "'1' is named in validation_chroms and in test_chroms"),
        ({"validation": ["1"], "test": ["2"]}, "No chromosome is left to train on"),
        ({"test": ["1", "2"]}, "No chromosome is left to train on"),
    ],
)
def test_bad_splits_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        split_chromosomes(runs(table(("1", 0, 9), ("2", 0, 9))), 2, **options)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 12), st.booleans())
def test_splits_share_no_bin_and_lose_none(sizes, window, gaps):
    rows = [(f"c{i // 2 if gaps else i}", 1000 * i, n) for i, n in enumerate(sizes)]
    found = runs(table(*rows))
    try:
        parts = split_chromosomes(found, window)
    except ConfigError:
        assert found.total == 1
        return
    bins = np.concatenate([np.arange(r.first, r.stop) for p in (parts.train, parts.validation) for r in p])
    np.testing.assert_array_equal(np.sort(bins), np.arange(found.total))
    assert parts.validation.total >= 0.1 * found.total or len(found.chromosomes) > 1


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 59), st.booleans(), st.integers(0, 500))
def test_crops_cover_each_bin_once(n, window, overlap, default, first):
    overlap = None if default else min(overlap, window - 1)
    run = Run("1", first, n, 0)
    tiling = tile(run, window, overlap)
    kept = [np.arange(a, b) for a, b in zip(tiling.crop_from, tiling.crop_to, strict=True)]
    np.testing.assert_array_equal(np.concatenate(kept), np.arange(first, first + n))
    crop = (2 * int(0.1 * window) if overlap is None else overlap) // 2
    assert (tiling.starts >= first).all()
    assert (tiling.starts + window <= max(run.stop, first + window)).all()
    assert (tiling.crop_to <= tiling.starts + window).all()
    # inner edges are cropped on both sides
    assert (tiling.crop_from[1:] - tiling.starts[1:] >= crop).all()
    assert (tiling.starts[:-1] + window - tiling.crop_to[:-1] == crop).all()


def test_the_papers_tiling():
    tiling = tile(Run("1", 0, 5000, 0), 1200)
    assert tiling.starts.tolist() == [0, 960, 1920, 2880, 3800]
    assert tiling.crop_from.tolist() == [0, 1080, 2040, 3000, 3960]
    for bad in (-1, 10):
        with pytest.raises(ConfigError, match="overlap"):
            tile(Run("1", 0, 50, 0), 10, bad)
    with pytest.raises(ConfigError, match="window"):
        tile(Run("1", 0, 50, 0), 0)
