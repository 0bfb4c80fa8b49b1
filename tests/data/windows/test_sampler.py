from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi._errors import ConfigError
from epivi.data.windows import TrainingWindows, WindowSampler, runs, validation_windows

ROWS = [0, 2, 5]


def found(*sizes):
    rows = [(f"c{i}", 10 * j, 10 * j + 10) for i, n in enumerate(sizes) for j in range(n)]
    return runs(pd.DataFrame(rows, columns=["chrom", "start", "end"]))


def law(*sizes, window=5):
    return TrainingWindows(found(*sizes), window)


def pairs(batches):
    return sorted(map(tuple, np.concatenate(batches).tolist()))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4), st.booleans(), st.one_of(st.none(), st.integers(4, 60)), st.integers(1, 7), st.integers(0, 99)
)
def test_processes_divide_what_one_process_visits(world, same_locus, cap, batch_size, seed):
    options = {"windows_per_epoch": None if cap is None else cap * 3, "same_locus": same_locus}
    windows = law(60, 31, 3)
    whole = WindowSampler(ROWS, windows, batch_size, seed, **options)
    parts = [WindowSampler(ROWS, windows, batch_size, seed, rank=r, world_size=world, **options) for r in range(world)]
    for epoch in (0, 3):
        everything = pairs(whole.batches(epoch))
        assert len(set(everything)) == len(everything)
        shares = [part.batches(epoch) for part in parts]
        assert len({tuple(len(b) for b in share) for share in shares}) == 1
        assert [len(share) for share in shares] == [part.n_batches for part in parts]
        together = sorted(pair for share in shares for pair in pairs(share))
        assert len(set(together)) == len(together)
        assert set(together) <= set(everything)
        n_lost = (len(everything) // 3 if same_locus else len(everything)) % world
        assert len(everything) - len(together) == n_lost * (3 if same_locus else 1)
        if not same_locus:
            assert all(len(b) == batch_size for b in shares[0][:-1])


def test_an_epoch_without_a_cap_pairs_all_windows_with_all_biosamples():
    windows = law(60)
    sampler = WindowSampler(ROWS, windows, 4, seed=3)
    visited = np.concatenate(sampler.batches(1))
    assert visited.dtype == np.int64
    starts = np.unique(visited[:, 1])
    assert len(visited) == 3 * windows.count == 3 * starts.size
    assert pairs([visited]) == sorted((b, s) for b in ROWS for s in starts.tolist())


def test_orders_depend_on_seed_and_epoch_alone():
    windows = law(60)
    a, b = (WindowSampler(ROWS, windows, 4, seed=3) for _ in range(2))
    np.testing.assert_array_equal(np.concatenate(a.batches(2)), np.concatenate(b.batches(2)))
    assert pairs(a.batches(2)) != pairs(a.batches(1))
    assert pairs(a.batches(2)) != pairs(WindowSampler(ROWS, windows, 4, seed=4).batches(2))
    a.set_epoch(1)
    a.start, a.first_batch = 1, 2
    assert len(a) == a.n_batches - 2
    for mine, other in zip(a, b.batches(2)[2:], strict=True):
        np.testing.assert_array_equal(mine, other)


def test_one_locus_in_all_biosamples():
    sampler = WindowSampler(ROWS, law(60), 4, seed=0, same_locus=True, windows_per_epoch=13)
    assert (sampler.batch_size, sampler.n_batches) == (3, 4)
    for items in sampler:
        assert items[:, 0].tolist() == ROWS
        assert np.unique(items[:, 1]).size == 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "There is no biosample to train on"),
        ([0], {"batch_size": 0}, "batch_size=0"),
        ([0], {"windows_per_epoch": 0}, "windows_per_epoch=0"),
        ([0], {"world_size": 3}, "2 windows for 3 processes are too few"),
        ([0, 1], {"world_size": 3, "same_locus": True}, "2 loci for 3 processes are too few"),
    ],
)
def test_bad_samplers_are_refused(rows, options, message):
    with pytest.raises(ConfigError, match=message):
        WindowSampler(rows, law(14), **({"batch_size": 2, "seed": 0} | options))


def test_validation_windows_are_fixed_spread_and_disjoint():
    validation = found(23, 3, 10)
    items = validation_windows(validation, ROWS, 5)
    assert np.unique(items[:, 1]).tolist() == [0, 5, 10, 15, 23, 26, 31]
    assert len(items) == 21
    capped = validation_windows(validation, ROWS, 5, max_windows=9)
    assert np.unique(capped[:, 1]).tolist() == [5, 15, 26]
    assert len(capped) == 9
    assert validation_windows(validation, ROWS, 5, max_windows=2).tolist() == [[0, 15], [5, 15]]
    assert validation_windows(validation.take(np.array([], dtype=int)), ROWS, 5).shape == (0, 2)
    for options in ({"window": 0}, {"window": 5, "max_windows": 0}):
        with pytest.raises(ConfigError):
            validation_windows(validation, ROWS, **options)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 5), st.integers(2, 9), st.integers(0, 99), st.integers(1, 2))
def test_paired_samples_are_two_biosamples_at_one_locus(n_rows, batch_size, seed, world_size):
    windows = law(60)
    parts = [
        WindowSampler(range(n_rows), windows, batch_size, seed, paired=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({part.n_batches for part in parts}) == 1
    for part in parts:
        batches = list(part)
        assert len(batches) == part.n_batches
        for items in batches:
            assert items.shape[0] % 2 == 0
            assert (items[::2, 1] == items[1::2, 1]).all()
            assert (items[::2, 0] != items[1::2, 0]).all()


def test_pairs_need_two_biosamples_and_no_other_order():
    windows = law(60)
    with pytest.raises(ConfigError, match="need two training biosamples"):
        WindowSampler([0], windows, 4, 0, paired=True)
    with pytest.raises(ConfigError, match="cannot be combined"):
        WindowSampler([0, 1], windows, 4, 0, paired=True, same_locus=True)
