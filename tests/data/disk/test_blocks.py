"""Minibatches from blocks: every cell once an epoch, bounded blocks, one order for each seed and epoch."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi._errors import ConfigError
from epivi.data.disk import BlockDataset, BlockSampler, Held, block_batches, cut_blocks


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(8, 120),
    share=st.integers(1, 3),
    batch_size=st.integers(2, 9),
    block_size=st.integers(2, 50),
    chunk_size=st.integers(1, 20),
    world=st.integers(1, 2),
)
def test_every_cell_once_an_epoch_in_blocks_of_bounded_size(
    n, share, batch_size, block_size, chunk_size, world
) -> None:
    rows = np.arange(0, n * share, share)
    lengths = np.random.default_rng(n).integers(0, 40, n * share)
    options = {"seed": 3, "block_size": block_size, "chunk_size": chunk_size, "world_size": world}
    samplers = [BlockSampler(rows, lengths, batch_size, rank=rank, **options) for rank in range(world)]
    for epoch in (0, 5):
        parts = [sampler.batches(epoch) for sampler in samplers]
        assert {len(part) for part in parts} == {samplers[0].n_batches}
        drawn = [held for part in parts for held in part]
        every = np.concatenate([held.rows for held in drawn])
        assert np.unique(every).size == every.size
        if world == 1:  # processes leave out cells where their numbers do not divide
            assert sorted(every) == rows.tolist()
        most = max(block_size, 2 * world) + max(batch_size, 2) * world
        for held in drawn:
            assert held.rows.size <= batch_size + 1
            assert held.block.size < most
            assert np.isin(held.rows, held.block).all()
            assert (np.diff(held.block) > 0).all()
            assert held.draw == epoch


def test_blocks_follow_one_another_and_epochs_differ() -> None:
    sampler = BlockSampler(np.arange(100), np.full(100, 5), 4, seed=1, block_size=20, chunk_size=5)
    one, two = sampler.batches(0), sampler.batches(1)
    firsts = [held.block[0] for held in one]
    assert len({held.block.tobytes() for held in one}) == 5
    assert sum(a != b for a, b in pairwise(firsts)) <= 4  # a block is read once
    assert {held.block.tobytes() for held in one} != {held.block.tobytes() for held in two}
    # chunks stay together
    assert all(len(np.unique(held.block // 5)) == 4 for held in one)
    again = BlockSampler(np.arange(100), np.full(100, 5), 4, seed=1, block_size=20, chunk_size=5).batches(0)
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(one, again, strict=True))


def test_a_resumed_epoch_goes_on_where_it_was() -> None:
    sampler = BlockSampler(np.arange(60), np.arange(60), 4, seed=2, block_size=16, chunk_size=4)
    whole = sampler.batches(3)
    sampler.start, sampler.first_batch = 3, 7
    rest = list(sampler)
    assert len(rest) == len(sampler) == len(whole) - 7
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(rest, whole[7:], strict=True))


def test_bad_sizes_are_refused() -> None:
    rows, lengths = np.arange(20), np.full(20, 3)
    with pytest.raises(ConfigError, match="block_size"):
        BlockSampler(rows, lengths, 4, seed=0, block_size=1)
    with pytest.raises(ConfigError, match="chunk_size"):
        BlockSampler(rows, lengths, 4, seed=0, block_size=8, chunk_size=0)
    with pytest.raises(ConfigError, match="batch_size"):
        BlockSampler(rows, lengths, 1, seed=0, block_size=8)


def test_blocks_take_small_rests_along() -> None:
    assert [part.size for part in cut_blocks(np.arange(10), 4, 3)] == [4, 6]
    assert [part.size for part in cut_blocks(np.arange(11), 4, 3)] == [4, 4, 3]
    assert [part.size for part in cut_blocks(np.arange(2), 4, 3)] == [2]


@pytest.mark.parametrize("world", [1, 3])
def test_validation_reads_every_cell_once_in_fixed_order(world) -> None:
    rows = np.random.default_rng(0).permutation(90)[:50]
    lengths = np.random.default_rng(1).integers(1, 30, 90)
    held = block_batches(rows, lengths, 8, 100, block_size=16, world_size=world)
    assert sorted(np.concatenate([part.rows for part in held])) == sorted(rows)
    assert len(held) % world == 0
    assert all(part.rows.size * lengths[part.rows].max() <= 100 or part.rows.size == 1 for part in held)
    assert max(part.block.size for part in held) < 16 + world
    assert block_batches(np.zeros(0, dtype=int), lengths, 8, 100, block_size=16) == []


def test_a_dataset_holds_the_block_before_it_reads() -> None:
    log = []

    class Matrix:
        def hold(self, rows):
            log.append(("hold", rows.tolist()))

    class Source:
        def __len__(self):
            return 9

        def __getitem__(self, rows):
            log.append(("read", np.asarray(rows).tolist()))
            return rows

    data = BlockDataset(Source(), lambda rows, draw: (rows.tolist(), draw), Matrix())
    assert data[Held(np.array([4, 2]), 6, np.array([2, 3, 4]))] == ([4, 2], 6)
    assert data[np.array([1])] == ([1], 0)
    assert log == [("hold", [2, 3, 4]), ("read", [4, 2]), ("read", [1])]
    assert len(data) == 9
