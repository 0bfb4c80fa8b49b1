from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from epivi._errors import ConfigError
from epivi.data.splits import EpochSampler, NeighborSampler, StratifiedSampler, split_cells, split_groups

ROWS = np.arange(100, 137)  # 37 rows that are not 0..36
shapes = given(
    n=st.integers(2, 200), batch_size=st.integers(2, 40), world_size=st.integers(1, 4), epoch=st.integers(0, 5)
)


def epoch_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def flat(batches):
    return [row for rows in batches for row in rows]


@settings(max_examples=200)
@given(
    n=st.integers(3, 500),
    train_size=st.floats(0.01, 1),
    validation_size=st.none() | st.floats(0, 0.99),
    seed=st.integers(0, 5),
)
def test_splits_are_a_partition_with_the_shares_asked(n, train_size, validation_size, seed):
    assume(train_size + (validation_size or 0) <= 1)
    assume(train_size * n > 1.01)
    splits = split_cells(n, train_size, validation_size, seed)
    assert list(splits) == ["train", "validation", "test"]
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(n))
    for rows in splits.values():
        assert (np.diff(rows) > 0).all()
    assert abs(splits["train"].size - train_size * n) < 1
    if validation_size is None:
        assert splits["test"].size == 0
    else:
        assert abs(splits["validation"].size - validation_size * n) < 1


@pytest.mark.parametrize(
    ("n", "train_size", "validation_size", "sizes"),
    [
        (10, 0.9, None, (9, 1, 0)),
        (1000, 0.9, None, (900, 100, 0)),
        (1000, 0.7, 0.1, (700, 100, 200)),
        (1000, 0.9, 0.1, (900, 100, 0)),
        (11, 0.5, None, (6, 5, 0)),
        (10, 1.0, None, (10, 0, 0)),
        (10, 0.8, 0.0, (8, 0, 2)),
    ],
)
def test_golden_sizes(n, train_size, validation_size, sizes):
    assert tuple(rows.size for rows in split_cells(n, train_size, validation_size, 0).values()) == sizes


def test_the_split_depends_on_the_seed_alone():
    one, again, other = (split_cells(100, 0.8, None, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one["train"], again["train"])
    assert not np.array_equal(one["train"], other["train"])
    state = np.random.get_state()[1]  # noqa: NPY002 - the global generator must be left alone
    split_cells(100, 0.8, None, 1)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_every_cell_is_as_likely_to_train():
    counts = np.bincount(np.concatenate([split_cells(20, 0.5, None, seed)["train"] for seed in range(400)]))
    # 400 draws of 1/2 each: six standard deviations
    assert (abs(counts - 200) < 6 * math.sqrt(400 * 0.25)).all()


@pytest.mark.parametrize(
    ("train_size", "validation_size", "message"),
    [
        (0.0, None, "train_size=0.0 is out of range"),
        (1.2, None, "train_size=1.2 is out of range"),
        (float("nan"), None, "train_size=nan is not valid"),
        (0.5, -0.1, "validation_size=-0.1 is out of range"),
        (0.5, 1.0, "validation_size=1.0 is out of range"),
        (0.9, 0.2, r"train_size \(0.9\) \+ validation_size \(0.2\) exceed 1: lower one of them"),
        (0.05, None, "train_size=0.05 leaves 1 of 20 cells to train on; at least 2 are needed"),
    ],
)
def test_splits_that_cannot_be_made_are_refused(train_size, validation_size, message):
    with pytest.raises(ConfigError, match=message):
        split_cells(20, train_size, validation_size, 0)


@settings(deadline=None, max_examples=200)
@shapes
def test_all_processes_get_as_many_batches_of_disjoint_rows_and_none_of_one_cell(n, batch_size, world_size, epoch):
    assume(n // world_size >= 2)
    rows = np.arange(n) * 3
    ranks = []
    for rank in range(world_size):
        sampler = EpochSampler(rows, batch_size, 7, rank=rank, world_size=world_size)
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler) == sampler.n_batches
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        least = max(2, batch_size // 8)
        assert min(least, n // world_size) <= len(batches[-1]) < batch_size + least
        ranks.append(batches)
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    seen = flat(flat(ranks))
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(rows.tolist())
    assert len(seen) == n - n % world_size  # what does not divide waits for another epoch


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [
        (9, 4, [4, 5]),
        (10, 4, [4, 4, 2]),
        (66, 64, [66]),  # two cells alone would train the batch normalisation
        (135, 64, [64, 71]),
        (136, 64, [64, 64, 8]),
        (5, 64, [5]),
    ],
)
def test_a_small_rest_joins_the_minibatch_before(n, batch_size, sizes):
    sampler = EpochSampler(np.arange(n), batch_size, 0)
    assert [len(batch) for batch in sampler] == sizes
    assert len(sampler) == sampler.n_batches == len(sizes)
    # a resumed run skips what it had done
    sampler.first_batch = len(sizes) - 1
    assert [len(batch) for batch in sampler] == sizes[-1:]
    assert [len(batch) for batch in EpochSampler(np.arange(2), 4, 0)] == [2]


@pytest.mark.parametrize(
    "make",
    [
        EpochSampler,
        lambda *args, **kwargs: StratifiedSampler(*args, group=np.arange(137) < 105, minimum=3, **kwargs),
        lambda *args, **kwargs: NeighborSampler(
            *args, neighbors=100 + np.random.default_rng(0).integers(0, 37, (137, 4)), **kwargs
        ),
    ],
    ids=["plain", "stratified", "neighbours"],
)
class TestAnySampler:
    def test_the_order_is_a_pure_function_of_seed_and_epoch(self, make):
        sampler = make(ROWS, 8, 5)
        later = [epoch_of(sampler, epoch) for epoch in (3, 0, 3)]
        assert later[0] == later[2] == epoch_of(make(ROWS, 8, 5), 3)
        assert later[0] != later[1]
        assert later[0] != epoch_of(make(ROWS, 8, 6), 3)

    def test_a_resumed_run_goes_on_with_the_same_minibatches(self, make):
        whole = epoch_of(make(ROWS, 8, 5), 4)
        resumed = make(ROWS, 8, 5)
        resumed.start, resumed.first_batch = 4, 2
        assert len(resumed) == len(whole) - 2
        assert epoch_of(resumed, 0) == whole[2:]
        resumed.first_batch = 0
        assert epoch_of(resumed, 1) == epoch_of(make(ROWS, 8, 5), 5)

    def test_batches_are_plain_integers(self, make):
        assert {type(row) for row in flat(make(ROWS, 8, 5))} == {int}

    def test_rows_stay_within_those_given(self, make):
        for epoch in range(3):
            assert set(flat(epoch_of(make(ROWS, 8, 5), epoch))) <= set(ROWS.tolist())

    def test_processes_get_different_minibatches_of_the_same_sizes(self, make):
        one, other = (epoch_of(make(ROWS, 8, 5, rank=rank, world_size=2), 1) for rank in (0, 1))
        assert [len(rows) for rows in one] == [len(rows) for rows in other]
        assert one != other


def test_an_epoch_holds_every_row_once():
    assert sorted(flat(EpochSampler(ROWS, 8, 0))) == ROWS.tolist()


def test_without_shuffling_rows_keep_their_order():
    order = np.array([5, 3, 8, 1, 2])
    assert list(EpochSampler(order, 2, 0, shuffle=False)) == [[5, 3], [8, 1, 2]]


@pytest.mark.parametrize(("n", "world_size"), [(1, 1), (0, 1), (7, 4)])
def test_too_few_cells_for_the_processes_are_refused(n, world_size):
    with pytest.raises(ConfigError, match=f"{n} cells for {world_size} processes are too few: each needs at least 2"):
        EpochSampler(np.arange(n), 4, 0, world_size=world_size)


def test_a_minibatch_of_one_is_refused():
    with pytest.raises(ConfigError, match="batch_size=1 is out of range"):
        EpochSampler(ROWS, 1, 0)


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(2, 150),
    n_members=st.integers(0, 30),
    batch_size=st.integers(2, 40),
    minimum=st.integers(0, 40),
    world_size=st.integers(1, 2),
    seed=st.integers(0, 50),
)
def test_stratified_minibatches_keep_the_minimum_without_duplicates(
    n, n_members, batch_size, minimum, world_size, seed
):
    assume(n // world_size >= 2)
    n_members = min(n_members, n)
    indices = np.arange(n) + 10
    group = np.zeros(n + 30, dtype=bool)
    group[10 : 10 + n_members] = True
    group[:10] = group[n + 10 :] = True  # members outside of the rows are never drawn
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size}
        sampler = StratifiedSampler(indices, batch_size, seed, group=group, minimum=minimum, **options)
        plain = EpochSampler(indices, batch_size, seed, **options)
        expected = min(minimum, batch_size // 2, n_members)
        for rows, before in zip(epoch_of(sampler, seed % 3), epoch_of(plain, seed % 3), strict=True):
            assert len(set(rows)) == len(rows) == len(before)
            assert set(rows) <= set(indices.tolist())
            assert group[rows].sum() >= min(expected, len(rows))
            # members are never displaced, and rows stay where there were enough
            assert {row for row in before if group[row]} <= set(rows)
            if group[before].sum() >= expected:
                assert rows == before
            else:
                assert group[rows].sum() == min(expected, len(rows))


def test_scarce_members_are_drawn_evenly():
    group = np.arange(400) < 20
    sampler = StratifiedSampler(np.arange(400), 20, 0, group=group, minimum=8)
    drawn = np.array(flat(flat(epoch_of(sampler, epoch) for epoch in range(50))))
    counts = np.bincount(drawn[group[drawn]], minlength=20)
    assert counts.sum() >= 50 * 20 * 8
    assert counts.min() > 0.8 * counts.mean()


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(2, 100),
    batch_size=st.integers(2, 20),
    k=st.integers(1, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 50),
)
def test_second_half_are_neighbours_of_the_first_or_the_usual_rows(n, batch_size, k, share, seed):
    rng = np.random.default_rng(seed)
    neighbors = np.where(rng.random((n, k)) < share, rng.integers(0, n, (n, k)), -1)
    sampler = NeighborSampler(np.arange(n), batch_size, seed, neighbors=neighbors)
    for rows, usual in zip(sampler, EpochSampler(np.arange(n), batch_size, seed), strict=True):
        half = (len(usual) + 1) // 2
        assert len(rows) == len(usual)
        assert rows[:half] == usual[:half]
        for cell, partner, place in zip(rows, rows[half:], usual[half:], strict=False):
            assert partner == place or partner in neighbors[cell]
            assert partner in neighbors[cell] or (neighbors[cell] < 0).any()


def test_without_neighbours_minibatches_are_the_usual_ones():
    alone = NeighborSampler(ROWS, 7, 0, neighbors=np.full((137, 3), -1))
    assert list(alone) == list(EpochSampler(ROWS, 7, 0))


def test_neighbours_outside_of_the_rows_are_never_drawn():
    neighbors = np.tile([0, 1, 2, 110], (137, 1))  # three of the validation set, one of the training set
    drawn = flat(NeighborSampler(ROWS, 8, 0, neighbors=neighbors))
    assert set(drawn) <= set(ROWS.tolist())
    assert drawn.count(110) > 1


# ---------------------------------------------------------------- groups


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=12),
    train_size=st.floats(0.1, 0.95),
    validation_size=st.none() | st.floats(0, 0.9),
    seed=st.integers(0, 5),
)
def test_groups_are_a_partition_and_not_torn_apart(sizes, train_size, validation_size, seed):
    assume(train_size + (validation_size or 0) <= 1)
    group = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    splits = split_groups(group, train_size, validation_size, seed)
    assert list(splits) == ["train", "validation", "test"]
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(group.size))
    parts = [set(group[rows].tolist()) for rows in splits.values()]
    assert sum(map(len, parts)) == len(sizes)
    assert parts[0]
    # there is something to validate on wherever that was asked for, even where one group alone is left
    assert parts[1] or validation_size == 0
    assert not parts[2] or validation_size is not None
    for rows in splits.values():
        assert (np.diff(rows) > 0).all()
    # a group that lies across a border goes to the side of its middle
    half = max(sizes) / 2
    if parts[0] != {group[0]} and len(parts[0]) > 1:
        assert splits["train"].size <= train_size * group.size + half + 1e-9


@pytest.mark.parametrize(
    ("n_groups", "train_size", "validation_size", "sizes"),
    [
        (10, 0.7, 0.2, (7, 2, 1)),
        (10, 0.9, None, (9, 1, 0)),
        (10, 0.7, 0.0, (7, 0, 3)),
        (4, 0.5, None, (2, 2, 0)),
        (2, 0.9, None, (1, 1, 0)),
        (2, 0.5, 0.2, (1, 1, 0)),
        (3, 0.6, 0.2, (2, 1, 0)),
    ],
)
def test_golden_sizes_of_groups(n_groups, train_size, validation_size, sizes):
    # five observations a group
    group = np.tile([f"donor {i}" for i in range(n_groups)], 5)
    for seed in range(5):
        found = split_groups(group, train_size, validation_size, seed)
        assert tuple(rows.size // 5 for rows in found.values()) == sizes


def test_the_split_of_groups_depends_on_the_seed_alone_and_not_on_their_order():
    group = np.repeat(np.arange(20), 3)
    one, again, other = (split_groups(group, 0.8, None, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one["train"], again["train"])
    assert not np.array_equal(one["train"], other["train"])
    order = np.random.default_rng(0).permutation(60)
    moved = split_groups(group[order], 0.8, None, 1)
    assert set(group[order][moved["train"]]) == set(group[one["train"]])
    state = np.random.get_state()[1]  # noqa: NPY002 - the global generator must be left alone
    split_groups(group, 0.8, None, 1)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_every_group_is_as_likely_to_train():
    group = np.repeat(np.arange(10), 2)
    counts = np.bincount(
        np.concatenate([np.unique(group[split_groups(group, 0.5, None, seed)["train"]]) for seed in range(400)])
    )
    assert (abs(counts - 200) < 6 * math.sqrt(400 * 0.25)).all()


@pytest.mark.parametrize(
    ("group", "train_size", "validation_size", "message"),
    [
        (["a"] * 5, 0.8, None, "one group of observations, 'a': it cannot be split. Leave the key out"),
        (["a", "b"], 0.0, None, "train_size=0.0 is out of range"),
        (["a", "b"], 0.9, 0.2, "exceed 1"),
    ],
)
def test_groups_that_cannot_be_split_are_refused(group, train_size, validation_size, message):
    with pytest.raises(ConfigError, match=message):
        split_groups(np.array(group), train_size, validation_size, 0)
