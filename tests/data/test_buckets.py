from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi._errors import ConfigError
from epivi.data.buckets import FACTOR, TokenBudgetSampler, fixed_batches
from epivi.data.splits import EpochSampler
from epivi.data.tokens import Drawn, TokenDataset

lengths_of_cells = st.one_of(
    st.lists(st.integers(0, 300), min_size=2, max_size=120),
    st.lists(st.sampled_from([1, 5, 100]), min_size=2, max_size=120),
)


def rows_of(batches):
    return sorted(row for drawn in batches for row in drawn.rows.tolist())


def padded(drawn, lengths):
    """Places of a padded minibatch; a row without tokens takes one."""
    return drawn.rows.size * max(int(lengths[drawn.rows].max()), 1)


def plain(batches):
    return [(drawn.rows.tolist(), drawn.draw) for drawn in batches]


@settings(deadline=None, max_examples=100)
@given(lengths_of_cells, st.integers(2, 20), st.integers(1, 2000), st.integers(0, 50))
def test_every_cell_is_drawn_once_within_the_budget(lengths, batch_size, budget, seed):
    lengths = np.array(lengths)
    # the data have cells that are not trained on
    indices = np.flatnonzero(np.random.default_rng(seed).random(lengths.size) < 0.8)
    if indices.size < 2:
        indices = np.arange(2)
    sampler = TokenBudgetSampler(indices, lengths, batch_size, budget, seed)
    sizes = set()
    for epoch in range(4):
        batches = sampler.batches(epoch)
        assert rows_of(batches) == sorted(indices.tolist())
        assert len(batches) == sampler.n_batches
        assert {drawn.draw for drawn in batches} == {epoch}
        for drawn in batches:
            assert 1 <= drawn.rows.size <= batch_size
            assert padded(drawn, lengths) <= budget or drawn.rows.size == 1
        sizes.add(tuple(sorted(drawn.rows.size for drawn in batches)))
    assert len(sizes) == 1, "sizes of the minibatches must not depend on the epoch"


@settings(deadline=None, max_examples=100)
@given(lengths_of_cells, st.integers(2, 20), st.integers(1, 2000), st.integers(1, 4))
def test_processes_divide_one_order(lengths, batch_size, budget, world_size):
    lengths = np.array(lengths)
    indices = np.arange(lengths.size)
    if indices.size // world_size < 2:
        return
    parts = [
        TokenBudgetSampler(indices, lengths, batch_size, budget, 1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in (0, 3):
        shares = [part.batches(epoch) for part in parts]
        assert {len(share) for share in shares} == {parts[0].n_batches}
        assert parts[0].n_batches >= 1
        together = rows_of(drawn for share in shares for drawn in share)
        assert len(set(together)) == len(together)
        batches = [drawn for share in shares for drawn in share]
        assert all(padded(drawn, lengths) <= budget or drawn.rows.size == 1 for drawn in batches)
        if len(together) < indices.size:
            # only minibatches of single cells are ever left out, fewer than there are processes
            assert indices.size - len(together) < world_size
            assert all(drawn.rows.size == 1 for drawn in batches)


def test_cells_that_cannot_be_divided_take_turns_in_being_left_out():
    lengths = np.full(5, 10)
    left_out = set()
    for epoch in range(60):
        shares = [
            TokenBudgetSampler(np.arange(5), lengths, 4, 10, 0, rank=rank, world_size=2).batches(epoch)
            for rank in (0, 1)
        ]
        assert [len(share) for share in shares] == [2, 2]
        left_out |= set(range(5)) - set(rows_of(shares[0] + shares[1]))
    assert left_out == set(range(5))


def test_processes_share_each_step_with_similar_lengths_and_take_turns_at_the_longest():
    lengths = np.repeat([10, 100, 1000, 10_000], 16)
    parts = [TokenBudgetSampler(np.arange(64), lengths, 4, 40_000, 0, rank=r, world_size=2) for r in (0, 1)]
    for one, other in zip(*(part.batches(0) for part in parts), strict=True):
        assert lengths[one.rows].max() == lengths[other.rows].max()
    # distinct lengths: who has the longer minibatch changes from step to step
    lengths = np.arange(1000, 1064)
    shares = [TokenBudgetSampler(np.arange(64), lengths, 4, 40_000, 0, rank=r, world_size=2) for r in (0, 1)]
    longer = [
        int(lengths[a.rows].max() > lengths[b.rows].max())
        for epoch in range(5)
        for a, b in zip(*(share.batches(epoch) for share in shares), strict=True)
    ]
    assert 0.2 < np.mean(longer) < 0.8


def test_little_is_padded_and_few_minibatches_are_needed():
    lengths = np.random.default_rng(0).lognormal(7, 0.6, 3000).astype(int)
    budget = 48_000
    batches = TokenBudgetSampler(np.arange(3000), lengths, 64, budget, 0).batches(2)
    places = sum(padded(drawn, lengths) for drawn in batches)
    assert places / lengths.sum() < 1.2
    random = EpochSampler(np.arange(3000), 32, 0).batches(2)
    assert sum(rows.size * lengths[rows].max() for rows in random) / lengths.sum() > 2
    # no minibatch could be larger: bound by the budget at the factor of the strata, or by 64 cells
    assert len(batches) < 1.1 * FACTOR * np.maximum(lengths / budget, 1 / 64).sum() + 2


def test_the_longest_cells_are_cut_evenly():
    batches = TokenBudgetSampler(np.arange(33), np.full(33, 7), 16, 1000, 0).batches(0)
    assert sorted(drawn.rows.size for drawn in batches) == [11, 11, 11]
    # two short cells join the longer ones, of which four fit
    lengths = np.array([10] * 2 + [100] * 5)
    batches = TokenBudgetSampler(np.arange(7), lengths, 16, 400, 0).batches(0)
    assert sorted((sorted(lengths[d.rows].tolist()) for d in batches), key=len) == [[100] * 3, [10, 10, 100, 100]]


def test_orders_are_a_function_of_seed_and_epoch_and_differ():
    lengths = np.random.default_rng(1).integers(5, 50, 60)
    make = [TokenBudgetSampler(np.arange(60), lengths, 8, 200, seed) for seed in (3, 3, 4)]
    assert plain(make[0].batches(2)) == plain(make[1].batches(2))
    sets = [{frozenset(d.rows.tolist()) for d in s.batches(e)} for s, e in ((make[0], 2), (make[0], 1), (make[2], 2))]
    assert sets[0] != sets[1]
    assert sets[0] != sets[2]
    # cells of one length meet, and minibatches come, in random order
    same = TokenBudgetSampler(np.arange(60), np.full(60, 9), 6, 54, 0)
    first = [same.batches(epoch)[0].rows[0] for epoch in range(300)]
    assert np.bincount(first, minlength=60).max() < 20
    mixed = TokenBudgetSampler(np.arange(60), np.repeat([1, 100], 30), 6, 600, 0)
    is_long = [bool(drawn.rows[0] >= 30) for epoch in range(40) for drawn in mixed.batches(epoch)[:1]]
    assert 8 < sum(is_long) < 32


def test_a_run_goes_on_where_it_stopped():
    lengths = np.random.default_rng(1).integers(5, 50, 60)
    whole, resumed = (TokenBudgetSampler(np.arange(60), lengths, 8, 200, 3) for _ in range(2))
    epochs = []
    for epoch in range(4):
        whole.set_epoch(epoch)
        assert len(whole) == whole.n_batches
        epochs.append(plain(whole))
    assert epochs[2] == plain(whole.batches(2))
    resumed.start, resumed.first_batch = 2, 3
    assert len(resumed) == whole.n_batches - 3
    assert plain(resumed) == epochs[2][3:]
    resumed.first_batch = 0
    resumed.set_epoch(1)
    assert plain(resumed) == epochs[3]


def test_a_dataset_reads_what_the_sampler_yields():
    lengths = np.arange(1, 21)
    sampler = TokenBudgetSampler(np.arange(20), lengths, 4, 60, 0)
    sampler.set_epoch(6)
    data = TokenDataset(np.arange(100, 120), lambda rows, draw: (sorted(rows.tolist()), draw))
    for drawn in sampler:
        assert isinstance(drawn, Drawn)
        assert data[drawn] == (sorted((drawn.rows + 100).tolist()), 6)


@settings(deadline=None, max_examples=100)
@given(lengths_of_cells, st.integers(1, 20), st.integers(1, 2000), st.integers(1, 4))
def test_fixed_minibatches_hold_every_row_once_within_the_budget(lengths, batch_size, budget, world_size):
    lengths = np.array(lengths)
    rows = np.random.default_rng(lengths.size).permutation(lengths.size)[: max(lengths.size - 3, 1)]
    if rows.size < world_size:
        return
    batches = fixed_batches(rows, lengths, batch_size, budget, world_size=world_size, draw=7)
    assert plain(batches) == plain(fixed_batches(rows, lengths, batch_size, budget, world_size=world_size, draw=7))
    assert rows_of(batches) == sorted(rows.tolist())
    assert {drawn.draw for drawn in batches} == {7}
    assert len(batches) % world_size == 0 or all(drawn.rows.size == 1 for drawn in batches)
    assert len(batches) >= world_size
    for drawn in batches:
        assert 1 <= drawn.rows.size <= batch_size
        assert padded(drawn, lengths) <= budget or drawn.rows.size == 1
    order = np.concatenate([lengths[drawn.rows] for drawn in batches])
    assert (np.diff(np.maximum(order, 1)) <= 0).all(), "the longest first"
    # greedy by falling length needs the fewest minibatches that hold rows of adjacent lengths
    if world_size == 1:
        for drawn, following in pairwise(batches):
            more = np.append(drawn.rows, following.rows[0])
            assert more.size > batch_size or more.size * max(lengths[more].max(), 1) > budget


def test_no_rows_give_no_fixed_minibatches():
    assert fixed_batches(np.empty(0, dtype=int), np.array([3]), 4, 10, world_size=2) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenBudgetSampler(np.arange(4), np.ones(4, int), 1, 10, 0), "batch_size=1"),
        (lambda: TokenBudgetSampler(np.arange(4), np.ones(4, int), 2, 0, 0), "token_budget=0"),
        (lambda: TokenBudgetSampler(np.arange(3), np.ones(3, int), 2, 9, 0, world_size=2), "3 cells for 2 processes"),
        (
            lambda: TokenBudgetSampler(np.arange(4), np.ones(3, int), 2, 9, 0),
            r"lengths has shape \(3,\) and type int64; .* of which row 3 is drawn",
        ),
        (lambda: TokenBudgetSampler(np.arange(4), np.ones(4), 2, 9, 0), "type float64; whole numbers are needed"),
        (lambda: fixed_batches(np.arange(4), np.ones((4, 1), int), 2, 9), r"lengths has shape \(4, 1\)"),
        (lambda: fixed_batches(np.arange(4), np.ones(4, int), 0, 9), "batch_size=0"),
        (lambda: fixed_batches(np.arange(4), np.ones(4, int), 2, 0), "token_budget=0"),
        (lambda: fixed_batches(np.arange(4), np.ones(4, int), 2, 9, world_size=5), "4 cells are too few for 5 proc"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
