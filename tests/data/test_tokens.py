from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from torch.utils.data import DataLoader

from epivi._errors import ConfigError, DataError
from epivi.data.sparse import BatchDataset, SparseReader
from epivi.data.tokens import (
    Drawn,
    TokenDataset,
    balanced_sample,
    keep_limited,
    name_keys,
    pad_rows,
    rank_levels,
    take,
    token_hash,
)

MASK = 2**64 - 1
ragged = given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 3)
)


def finalise(x):
    """The finaliser of splitmix64 in whole numbers of Python."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def one_hash(key, token, seed, draw):
    state = finalise(key ^ finalise((finalise(seed & MASK) + draw) & MASK))
    return finalise((state + (token + 1) * 0x9E3779B97F4A7C15) & MASK)


def rows_of(lengths, seed, n_features=40):
    """Ragged rows with columns in no order."""
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(n_features)[:n] for n in lengths]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return indptr, np.concatenate([np.empty(0, dtype=np.int64), *parts])


def split(indptr, array):
    return np.split(array, indptr[1:-1])


def test_keys_are_digests_of_the_names():
    names = ["AAAC-1", "ÄÖ", 7, ""]
    keys = name_keys(names)
    assert keys.dtype == np.uint64
    for name, key in zip(names, keys.tolist(), strict=True):
        assert key == int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=8).digest(), "little")
    # golden: draws of saved models must not change
    assert name_keys(["cell"]).tolist() == [4589785136723539555]
    assert name_keys([]).shape == (0,)
    assert name_keys(np.array(names[:1]))[0] == keys[0]


def test_the_oracle_gives_the_published_numbers_of_splitmix64():
    states = [(1234567 + (i + 1) * 0x9E3779B97F4A7C15) & MASK for i in range(3)]
    assert [finalise(x) for x in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(0, MASK), st.integers(0, 2**40), st.integers(-5, 2**40), st.integers(0, 2**33))
def test_hashes_equal_those_of_whole_numbers(key, token, seed, draw):
    found = token_hash(np.array([key], dtype=np.uint64), np.array([token]), seed=seed, draw=draw)
    assert found.dtype == np.uint64
    assert found.tolist() == [one_hash(key, token, seed, draw)]


def test_hashes_are_broadcast_in_blocks_and_leave_the_arguments():
    keys, tokens = name_keys("abc"), np.arange(10_000, dtype=np.int32)
    before = keys.copy(), tokens.copy()
    hash_bt = token_hash(keys[:, None], tokens, seed=3, draw=2)
    assert hash_bt.shape == (3, 10_000)
    for b, t in ((0, 0), (1, 8191), (1, 8192), (2, 9999)):
        assert int(hash_bt[b, t]) == one_hash(int(keys[b]), t, 3, 2)
    np.testing.assert_array_equal(keys, before[0])
    np.testing.assert_array_equal(tokens, before[1])
    assert np.unique(hash_bt).size == hash_bt.size
    assert int(token_hash(keys[0], tokens[5], seed=3, draw=2)[0]) == one_hash(int(keys[0]), 5, 3, 2)


def test_hashes_are_uniform_and_those_of_other_draws_independent():
    keys, tokens = name_keys(range(50))[:, None], np.arange(1000)
    a, b = (token_hash(keys, tokens, seed=0, draw=draw).ravel() for draw in (0, 1))
    other = token_hash(keys, tokens, seed=1, draw=0).ravel()
    for shift in (0, 28, 60):
        assert stats.chisquare(np.bincount((a >> np.uint64(shift)).astype(np.int64) & 15)).pvalue > 1e-3
    for second in (b, other, np.roll(a.reshape(50, 1000), 1, axis=0).ravel(), np.roll(a, 1)):
        table = np.zeros((8, 8))
        np.add.at(table, ((a >> np.uint64(61)).astype(int), (second >> np.uint64(61)).astype(int)), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3
    # one changed bit changes half of the bits
    flipped = token_hash(keys ^ np.uint64(1), tokens, seed=0, draw=0).ravel()
    assert abs(np.bitwise_count(a ^ flipped).mean() - 32) < 0.1


@settings(deadline=None, max_examples=60)
@ragged
def test_kept_tokens_are_those_of_smallest_hash(lengths, seed, limit, draw):
    indptr, indices = rows_of(lengths, seed)
    keys = name_keys(range(len(lengths)))
    keep = keep_limited(indptr, indices, keys, limit, seed=seed, draw=draw)
    assert keep.dtype == bool
    for key, columns, kept in zip(keys.tolist(), split(indptr, indices), split(indptr, keep), strict=True):
        order = sorted(columns.tolist(), key=lambda token: one_hash(key, token, seed, draw))
        assert set(columns[kept].tolist()) == set(order[:limit])


@settings(deadline=None, max_examples=60)
@ragged
def test_what_is_kept_depends_on_the_cell_alone(lengths, seed, limit, draw):
    indptr, indices = rows_of(lengths, seed)
    keys = name_keys(range(len(lengths)))
    options = {"seed": 1, "draw": draw}
    kept = keep_limited(indptr, indices, keys, limit, **options)
    sets = [frozenset(c[k].tolist()) for c, k in zip(split(indptr, indices), split(indptr, kept), strict=True)]
    rng = np.random.default_rng(seed)
    # other order of rows, other cells, other order and type of columns
    chosen = rng.permutation(len(lengths))[: rng.integers(1, len(lengths) + 1)]
    parts = [rng.permutation(split(indptr, indices)[row]) for row in chosen]
    ends = np.concatenate([[0], np.cumsum([part.size for part in parts])]).astype(np.int32)
    moved = np.concatenate(parts).astype(np.int32)
    again = keep_limited(ends, moved, keys[chosen], limit, **options)
    assert [frozenset(c[k].tolist()) for c, k in zip(split(ends, moved), split(ends, again), strict=True)] == [
        sets[row] for row in chosen
    ]
    # a token that falls out at one limit is not back at a smaller one
    assert not (keep_limited(indptr, indices, keys, max(limit - 1, 1), **options) & ~kept).any()


@pytest.mark.parametrize(("n", "n_kept"), [(0, 0), (1, 1), (9, 9), (10, 10), (11, 10), (40, 10)])
def test_cells_at_the_limit(n, n_kept):
    indptr, indices = rows_of([n, 3, n], 0)
    keep = keep_limited(indptr, indices, name_keys("abc"), 10, seed=0)
    assert [part.sum() for part in split(indptr, keep)] == [n_kept, 3, n_kept]


def test_draws_differ_and_keep_every_token_as_often():
    n, limit, n_draws = 30, 10, 600
    indptr, indices = rows_of([n] * 4, 0)
    keys = name_keys("abcd")
    kept = np.stack([keep_limited(indptr, indices, keys, limit, seed=5, draw=draw) for draw in range(n_draws)])
    assert np.unique(kept, axis=0).shape[0] == n_draws
    assert (kept.sum(1) == 4 * limit).all()
    # hypergeometric: the statistic of n counts, each with variance draws * p * (1 - p), over n - 1 degrees
    for count_t in np.split(kept.sum(0), 4):
        p = limit / n
        statistic = ((count_t - n_draws * p) ** 2).sum() / (n_draws * p * (1 - p)) * (n - 1) / n
        assert 1e-3 < stats.chi2(n - 1).sf(statistic) < 1 - 1e-3
    # two cells with the same columns keep different ones, and so do two seeds
    columns = [frozenset(c[k].tolist()) for c, k in zip(split(indptr, indices), split(indptr, kept[0]), strict=True)]
    assert len(set(columns)) == 4
    assert not np.array_equal(kept[0], keep_limited(indptr, indices, keys, limit, seed=6))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), max_size=7), st.sampled_from([None, 1, -7]), st.sampled_from([0, -1]))
def test_padding_against_a_loop(lengths, lead, fill):
    indptr, values = rows_of(lengths, 1)
    padded, length = pad_rows(indptr, values, fill=fill, lead=lead)
    rows = [([] if lead is None else [lead]) + part.tolist() for part in split(indptr, values)][: len(lengths)]
    longest = max(map(len, rows), default=0 if lead is None else 1)
    assert padded.shape == (len(lengths), longest)
    assert padded.tolist() == [row + [fill] * (longest - len(row)) for row in rows]
    assert length.tolist() == [len(row) for row in rows]
    assert (padded.dtype, length.dtype) == (values.dtype, np.int64)


def test_padding_keeps_the_type_of_the_values():
    padded, _ = pad_rows(np.array([0, 1, 3]), np.array([0.5, 1.5, 2.5], dtype=np.float32), fill=-1, lead=9)
    assert padded.dtype == np.float32
    assert padded.tolist() == [[9, 0.5, -1], [9, 1.5, 2.5]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(0, 1000))
def test_taking_against_a_loop(lengths, seed):
    indptr, indices = rows_of(lengths, seed)
    keep = np.random.default_rng(seed).random(indices.size) < 0.5
    values = indices * 0.5
    ends, tokens, halves = take(indptr, keep, indices, values)
    assert ends.dtype == np.int64
    for row, (columns, kept) in enumerate(zip(split(indptr, indices), split(indptr, keep), strict=True)):
        assert tokens[ends[row] : ends[row + 1]].tolist() == columns[kept].tolist()
        assert halves[ends[row] : ends[row + 1]].tolist() == (columns[kept] * 0.5).tolist()
    assert len(take(indptr, keep)) == 1


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=6), st.integers(0, 10_000), st.integers(2, 40), st.integers(0, 3)
)
def test_balanced_samples_against_a_loop(lengths, seed, limit, draw):
    n_features = 25
    indptr, indices = rows_of(lengths, seed, n_features)
    keys = name_keys(range(len(lengths)))
    sample, member = balanced_sample(indptr, indices, n_features, keys, limit, seed=seed, draw=draw)
    assert (sample.dtype, member.dtype, sample.shape) == (np.int64, bool, member.shape)
    widest = 0
    for row, (key, columns) in enumerate(zip(keys.tolist(), split(indptr, indices), strict=True)):
        order = sorted(range(n_features), key=lambda token, key=key: one_hash(key, token, seed, draw))
        stored = set(columns.tolist())
        half = min(limit // 2, len(stored), n_features - len(stored))
        inside = [token for token in order if token in stored][:half]
        outside = [token for token in order if token not in stored][:half]
        widest = max(widest, 2 * half)
        assert sample[row, : 2 * half].tolist() == sorted(inside + outside)
        assert member[row, : 2 * half].tolist() == [token in stored for token in sorted(inside + outside)]
        assert (sample[row, 2 * half :] == -1).all()
        assert not member[row, 2 * half :].any()
    assert sample.shape == (len(lengths), widest)


def test_balanced_samples_depend_on_the_cell_alone_and_differ_by_draw():
    indptr, indices = rows_of([12, 20, 0, 40, 15], 3)
    keys = name_keys("abcde")
    sample, member = balanced_sample(indptr, indices, 40, keys, 10, seed=0)
    assert (sample[[2, 3]] == -1).all(), "rows with one kind of column only"
    shuffled = np.concatenate([part[::-1] for part in split(indptr, indices)])
    np.testing.assert_array_equal(balanced_sample(indptr, shuffled, 40, keys, 10, seed=0)[0], sample)
    for row in (0, 1, 4):
        part = split(indptr, indices)[row].astype(np.int32)
        ends = np.array([0, part.size], dtype=np.int32)
        alone, alone_member = balanced_sample(ends, part, 40, keys[[row]], 10, seed=0)
        np.testing.assert_array_equal(alone[0], sample[row])
        np.testing.assert_array_equal(alone_member[0], member[row])
    others = [balanced_sample(indptr, indices, 40, keys, 10, seed=0, draw=draw)[0][0].tolist() for draw in range(20)]
    assert len({tuple(other) for other in others}) == 20
    # the stored half is what a limit would keep
    keep = keep_limited(indptr, indices, keys, 5, seed=0)
    for row in (0, 1, 4):
        kept = split(indptr, indices)[row][split(indptr, keep)[row]]
        assert sorted(kept.tolist()) == sample[row][member[row]].tolist()


def test_every_column_is_as_often_in_a_balanced_sample():
    n_features, n_stored, half, n_draws = 30, 12, 4, 600
    indptr, indices = np.array([0, n_stored]), np.arange(n_stored)
    count = np.zeros(n_features)
    for draw in range(n_draws):
        sample, _ = balanced_sample(indptr, indices, n_features, name_keys("a"), 2 * half, seed=2, draw=draw)
        count[sample[0]] += 1
    for count_t in (count[:n_stored], count[n_stored:]):
        n, p = count_t.size, half / count_t.size
        statistic = ((count_t - n_draws * p) ** 2).sum() / (n_draws * p * (1 - p)) * (n - 1) / n
        assert 1e-3 < stats.chi2(n - 1).sf(statistic) < 1 - 1e-3


def quantile_levels(indptr, values, n_bins):
    levels = []
    for part in split(indptr, values):
        if part.size:
            edges = np.quantile(part, np.linspace(0, 1, n_bins - 1))
            levels.append(np.searchsorted(edges, part, side="right"))
    return np.concatenate([np.empty(0, dtype=np.int64), *levels])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.integers(2, 52),
    st.sampled_from([np.float32, np.float64, np.int64]),
    st.sampled_from([2, 5, 1000]),
    st.integers(0, 10_000),
)
def test_levels_equal_numpy_quantiles_with_ties(lengths, n_bins, dtype, n_values, seed):
    rng = np.random.default_rng(seed)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    counts = rng.integers(1, n_values + 1, indptr[-1])
    values = counts if dtype is np.int64 else np.log1p(counts / 3).astype(dtype)
    before = values.copy()
    levels = rank_levels(indptr, values, n_bins)
    np.testing.assert_array_equal(values, before)
    np.testing.assert_array_equal(levels, quantile_levels(indptr, values, n_bins))
    assert levels.dtype == np.int64
    if levels.size:
        assert 1 <= levels.min() <= levels.max() <= n_bins - 1


def test_levels_of_long_rows_equal_numpy_quantiles():
    rng = np.random.default_rng(0)
    indptr = np.array([0, 5000, 5000, 9000])
    for values in (rng.lognormal(size=9000).astype(np.float32), np.log1p(rng.poisson(2, 9000) + 1.0)):
        np.testing.assert_array_equal(rank_levels(indptr, values, 10), quantile_levels(indptr, values, 10))


def test_levels_of_cells_made_by_hand():
    # edges 1, 2, 3 and 4, 4, 4
    indptr = np.array([0, 5, 8, 9])
    values = np.array([3.0, 1.0, 2.0, 2.0, 1.5, 4.0, 4.0, 4.0, 0.1])
    assert rank_levels(indptr, values, 4).tolist() == [3, 1, 2, 2, 1, 3, 3, 3, 3]
    assert rank_levels(indptr, values, 2).tolist() == [1] * 9
    # ranks do not see a monotone change of scale where no edge is between two values
    assert rank_levels(indptr, np.exp(values), 4).tolist() == rank_levels(indptr, values, 4).tolist()
    assert rank_levels(np.array([0, 0]), np.empty(0), 4).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: keep_limited(np.array([0, 1]), np.array([0]), name_keys("a"), 0, seed=0), ConfigError, "limit=0"),
        (
            lambda: keep_limited(np.array([0, 1]), np.array([0]), name_keys("ab"), 1, seed=0),
            DataError,
            "keys_b has 2 keys for 1 rows: give one for each row",
        ),
        (
            lambda: balanced_sample(np.array([0, 1]), np.array([0]), 4, name_keys(""), 2, seed=0),
            DataError,
            "keys_b has 0 keys for 1 rows",
        ),
        (
            lambda: balanced_sample(np.array([0, 1]), np.array([0]), 4, name_keys("a"), 1, seed=0),
            ConfigError,
            "limit=1",
        ),
        (
            lambda: balanced_sample(np.array([0, 1]), np.array([0]), 0, name_keys("a"), 2, seed=0),
            ConfigError,
            "n_features=0",
        ),
        (
            lambda: balanced_sample(np.array([0, 2]), np.array([1, 4]), 4, name_keys("a"), 2, seed=0),
            DataError,
            "Columns 1 to 4 are stored; the rows have 4 columns",
        ),
        (lambda: rank_levels(np.array([0, 1]), np.array([0.5]), 1), ConfigError, "n_bins=1"),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_encodes_each_minibatch_with_its_draw(num_workers):
    counts = sparse.random_array((9, 20), density=0.5, rng=np.random.default_rng(0), format="csr")
    keys = name_keys(range(9))

    def encode(batch, draw):
        indptr, indices = batch["x_indptr"].numpy(), batch["x_indices"].numpy()
        keep = keep_limited(indptr, indices, keys[batch["rows"].numpy()], 4, seed=0, draw=draw)
        padded, length = pad_rows(*take(indptr, keep, indices + 2), lead=1)
        return {"tokens": torch.from_numpy(padded), "length": torch.from_numpy(length), "draw": draw}

    data = TokenDataset(BatchDataset([SparseReader(counts)], 9), encode)
    assert len(data) == 9
    drawn = [Drawn(np.array([3, 1, 8]), 5), Drawn(np.array([0, 2]), 6)]
    loader = DataLoader(data, sampler=drawn, batch_size=None, num_workers=num_workers)
    for asked, batch in zip(drawn, loader, strict=True):
        assert batch["draw"] == asked.draw
        for row, tokens, length in zip(asked.rows, batch["tokens"], batch["length"], strict=True):
            alone = data[Drawn(np.array([row]), asked.draw)]
            assert set(tokens[:length].tolist()) == set(alone["tokens"][0].tolist())
    plain = data[np.array([3, 1, 8])]
    assert plain["draw"] == 0
    assert not torch.equal(plain["tokens"], data[drawn[0]]["tokens"])
    assert torch.equal(plain["tokens"], data[[3, 1, 8]]["tokens"])
