"""Overlapping pairs and the share by chance, against loops, enumeration and closed forms."""

from __future__ import annotations

import time

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings

from epivi._errors import DataError
from epivi.pp import overlaps
from epivi.pp.genome.pairs import chance_share, overlap_pairs

interval = st.tuples(st.sampled_from(["chr1", "chr2", "HLA-A*01"]), st.integers(0, 25), st.integers(1, 20))


def table(intervals):
    chrom, start, width = zip(*intervals, strict=True) if intervals else ((), (), ())
    start, width = np.array(start, dtype=np.int64), np.array(width, dtype=np.int64)
    return pd.DataFrame({"chrom": np.array(chrom, dtype=object), "start": start, "end": start + width})


def loop(first, second):
    found = []
    for i, (chrom, start, end) in enumerate(first.itertuples(index=False)):
        for j, (other, begin, stop) in enumerate(second.itertuples(index=False)):
            shared = min(end, stop) - max(start, begin)
            if chrom == other and shared > 0:
                found.append((i, j, shared))
    return found


@given(first=st.lists(interval, max_size=15), second=st.lists(interval, max_size=15))
@settings(deadline=None, max_examples=100)
def test_pairs_equal_the_loop(first, second):
    # nested, touching, equal and repeated intervals all occur among so few positions
    first, second = table(first), table(second)
    pairs = overlap_pairs(first, second)
    assert list(zip(*(entry.tolist() for entry in pairs), strict=True)) == loop(first, second)
    back = overlap_pairs(second, first)
    assert sorted(zip(back.second_m, back.first_m, back.shared_bp_m, strict=True)) == loop(first, second)
    assert all(entry.dtype == np.int64 for entry in pairs)


def test_pairs_agree_with_overlaps_and_are_quick():
    rng = np.random.default_rng(0)
    n = 100_000
    tables = []
    for _ in range(2):
        start = rng.integers(0, 10**8, n)
        width = rng.integers(200, 2000, n)
        width[0] = 10**7  # one interval over thousands of others costs no more than its pairs
        tables.append(pd.DataFrame({"chrom": rng.choice(list("abcdefgh"), n), "start": start, "end": start + width}))
    begin = time.perf_counter()
    pairs = overlap_pairs(*tables)
    assert time.perf_counter() - begin < 3  # 0.1 s on an idle machine
    np.testing.assert_array_equal(np.bincount(pairs.first_m, minlength=n) > 0, overlaps(*tables))
    assert (pairs.shared_bp_m > 0).all()


def test_positions_beyond_any_genome_are_refused():
    far = pd.DataFrame({"chrom": [f"c{i}" for i in range(2000)], "start": 0, "end": 2**52})
    with pytest.raises(DataError, match="2000 chromosomes and positions up to 4503599627370496 bp"):
        overlap_pairs(far, far)


@given(first=st.lists(interval, min_size=1, max_size=8), second=st.lists(interval, max_size=8))
@settings(deadline=None, max_examples=60)
def test_chance_equals_enumeration(first, second):
    first, second = table([(chrom, start, 5) for chrom, start, _ in first]), table(second)
    sizes = {"chr1": 60, "chr2": 50}
    shares = []
    for chrom in first["chrom"]:
        length = sizes.get(chrom) or max(frame["end"][frame["chrom"] == chrom].max() for frame in (first, second[:0]))
        if chrom not in sizes and (second["chrom"] == chrom).any():
            length = max(length, second["end"][second["chrom"] == chrom].max())
        places = table([(chrom, start, 5) for start in range(length - 4)])
        shares.append(overlaps(places, second).mean() if (second["chrom"] == chrom).any() else 0.0)
    np.testing.assert_allclose(chance_share(first, second, sizes), np.mean(shares), atol=1e-12)


def test_chance_of_simple_genomes():
    first = table([("chr1", 0, 10)])
    # 100 bp and 9 more places before them, of 991
    assert chance_share(first, table([("chr1", 100, 100)]), {"chr1": 1000}) == pytest.approx(109 / 991)
    assert chance_share(first, table([("chr1", 0, 500), ("chr1", 500, 500)]), {"chr1": 1000}) == 1
    assert chance_share(first, table([("chr2", 0, 500)]), {"chr1": 1000}) == 0
