from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi._errors import ConfigError, DataError
from epivi.data.windows import Blacklist, TrainingWindows, runs, split_chromosomes, training_starts


def table(*parts, width=10):
    rows = [(c, s + width * i, s + width * (i + 1)) for c, s, n in parts for i in range(n)]
    return pd.DataFrame(rows, columns=["chrom", "start", "end"])


def bed(*rows):
    return pd.DataFrame(rows, columns=["chrom", "start", "end"])


intervals = st.lists(st.tuples(st.sampled_from("12"), st.integers(0, 450), st.integers(1, 90)), min_size=1, max_size=12)
BINS = table(("1", 0, 20), ("1", 300, 10), ("2", 50, 30))


@settings(deadline=None, max_examples=60)
@given(intervals, st.integers(0, 59), st.integers(1, 12))
def test_blacklisted_shares_are_those_of_single_bases(rows, first, n):
    found = runs(BINS)
    bad = bed(*((c, s, s + w) for c, s, w in rows))
    bases = {chrom: np.zeros(600, dtype=bool) for chrom in "12"}
    for chrom, start, width in rows:
        bases[chrom][start : start + width] = True
    starts = BINS["start"].to_numpy()
    covered = np.concatenate([bases[c][s : s + 10] for c, s in zip(BINS["chrom"], starts, strict=True)])
    stop = min(first + n, int(found.stop[found.of(np.array([first]))[0]]))
    share = Blacklist(bad, found).share(np.array([first]), np.array([stop]))[0]
    assert share == pytest.approx(covered[10 * first : 10 * stop].mean())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.integers(1, 15),
    st.integers(0, 1000),
    st.booleans(),
)
def test_no_training_window_touches_what_is_held_out(sizes, window, seed, with_loci):
    found = runs(table(*((f"c{i // 2}", 1000 * i, n) for i, n in enumerate(sizes)), width=10))
    if found.total == 1:
        return
    parts = split_chromosomes(found, window)
    held = np.zeros(found.total + window, dtype=bool)
    for run in parts.validation:
        held[run.first : run.stop] = True
    loci = bed(*((f"c{i // 2}", 1000 * i + 3, 1000 * i + 25) for i in range(len(sizes)))) if with_loci else "uniform"
    law = TrainingWindows(parts.train, window, loci=loci)
    starts = law.draw(np.random.default_rng(seed))
    assert starts.size == law.count
    run = parts.train.of(starts)
    assert (run >= 0).all()
    inside = parts.train.n_bins[run] >= window
    assert (starts + window <= parts.train.stop[run])[inside].all()
    assert (starts == parts.train.first[run])[~inside].all()
    for at, short in zip(starts, ~inside, strict=True):
        stop = parts.train.stop[parts.train.of(np.array([at]))[0]] if short else at + window
        assert not held[at:stop].any()
    if not with_loci:
        ordered = np.sort(starts)
        assert (np.diff(ordered) >= np.minimum(window, parts.train.n_bins[parts.train.of(ordered[:-1])])).all()


def test_a_tiling_sees_every_bin_about_equally_often():
    law = TrainingWindows(runs(table(("1", 0, 100))), 10)
    assert law.count == 9
    rng = np.random.default_rng(0)
    seen = np.zeros(100)
    offsets = set()
    for _ in range(2000):
        starts = law.draw(rng)
        offsets |= set((starts % 10).tolist())
        for start in starts:
            seen[start : start + 10] += 1
    assert offsets == set(range(10))
    inner = seen[10:-10] / 2000
    assert inner.min() > 0.85
    # both ends alike: mirrored tilings
    assert abs(seen[:10].sum() / seen[-10:].sum() - 1) < 0.1


def test_loci_lie_at_random_places_inside_their_windows():
    law = TrainingWindows(runs(table(("1", 0, 200))), 20, loci=bed(("1", 1003, 1018), ("9", 0, 5), ("1", 990, 1600)))
    assert law.count == 2
    rng = np.random.default_rng(0)
    short, long = set(), set()
    for _ in range(1500):
        for start in law.draw(rng).tolist():
            (short if start <= 100 else long).add(start)
            assert 82 <= start <= 140
    # the bins 100 and 101 lie in the window wherever it begins; of the long locus only a part
    assert set(range(82, 99)) <= short
    assert set(range(101, 141)) == long


def test_a_locus_at_the_edge_keeps_the_window_inside():
    law = TrainingWindows(runs(table(("1", 0, 30))), 20, loci=bed(("1", 0, 5), ("1", 295, 400)))
    rng = np.random.default_rng(0)
    assert {tuple(sorted(law.draw(rng).tolist())) for _ in range(50)} == {(0, 10)}


def test_blacklisted_windows_are_dropped_and_their_number_is_kept():
    found = runs(table(("1", 0, 100)))
    bad = bed(("1", 0, 500))
    law = TrainingWindows(found, 10, blacklist=bad)
    rng = np.random.default_rng(0)
    for _ in range(50):
        starts = law.draw(rng)
        assert starts.size == law.count
        assert (starts >= 49).all()  # at most a tenth of the window, its first bin
    assert (TrainingWindows(found, 10, blacklist=bad, max_blacklisted=0).draw(rng) >= 50).all()
    assert training_starts(found, 10, seed=1, epoch=2).tolist() == training_starts(found, 10, seed=1, epoch=2).tolist()
    assert training_starts(found, 10, seed=1, epoch=2).tolist() != training_starts(found, 10, seed=1, epoch=3).tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loci": "ccre"}, ConfigError, "loci='ccre' is not valid: give 'uniform', or a DataFrame"),
        ({"loci": [1]}, DataError, "loci is a list"),
        ({"loci": pd.DataFrame({"chrom": []})}, DataError, "loci has no entry 'start'"),
        ({"loci": bed(("1", 5, 5))}, DataError, r"loci: row 0 \(1:5-5\) does not end after its start"),
        ({"loci": bed(("chr1", 5, 9))}, DataError, "loci and the bins share no chromosome: 'chr1' there, '1' here"),
        ({"loci": bed(("1", 5000, 5009))}, DataError, "None of the 1 loci lies on the bins to train on, '1'"),
        ({"blacklist": bed(("chr1", 5, 9))}, DataError, "blacklist and the bins share no chromosome"),
        ({"blacklist": bed(("1", 0, 1000))}, ConfigError, "More than 10% of every training window is blacklisted"),
        ({"max_blacklisted": 2}, ConfigError, "max_blacklisted=2"),
        ({"window": 0}, ConfigError, "window=0"),
        ({"runs": runs(table(("1", 0, 3))).take(np.array([], dtype=int))}, ConfigError, "There is no bin to train on"),
    ],
)
def test_bad_laws_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TrainingWindows(**({"runs": runs(table(("1", 0, 30))), "window": 5} | options))


def test_a_law_that_hardly_ever_gives_a_window_says_so():
    law = TrainingWindows(runs(table(("1", 0, 30))), 5)
    object.__setattr__(law, "_bad", Blacklist(bed(("1", 0, 300)), law.runs))
    with pytest.raises(ConfigError, match="Nearly all training windows are blacklisted by more than 10%"):
        law.draw(np.random.default_rng(0))
