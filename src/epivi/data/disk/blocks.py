"""Minibatches of data on disk: chunks of rows come in random order, cells are shuffled within blocks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from epivi._validate import check_number
from epivi.data.buckets import TokenBudgetSampler, fixed_batches
from epivi.data.splits import MIN_CELLS, EpochSampler
from epivi.data.tokens import Drawn, TokenDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from epivi.data.disk.rows import DiskRows

# rows that lie together on disk, and that are read together
CHUNK_ROWS = 256
_ORDER = 0xB10C


class Held(NamedTuple):
    """A minibatch of rows of a block that is held in memory.

    Attributes
    ----------
    rows
        Row numbers of the minibatch.
    draw
        Number of the draw, such as the epoch.
    block
        Increasing row numbers of the block.
    """

    rows: np.ndarray
    draw: int
    block: np.ndarray


class BlockDataset(TokenDataset):
    """Minibatches of tokens from blocks of rows: a block is read once, and its minibatches are taken from memory.

    Parameters
    ----------
    source, encode
        As in :class:`epivi.data.tokens.TokenDataset`.
    matrix
        What the source reads rows of.
    """

    def __init__(self, source: Any, encode: Callable[[Any, int], dict[str, Tensor]], matrix: DiskRows) -> None:
        super().__init__(source, encode)
        self.matrix = matrix

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        """Return the encoded minibatch; its block is read if it is not the one in memory."""
        if isinstance(index, Held):
            self.matrix.hold(index.block)
            index = Drawn(index.rows, index.draw)
        return super().__getitem__(index)


def cut_blocks(rows: np.ndarray, block_size: int, least: int) -> list[np.ndarray]:
    """Cut rows into blocks of one size; the last one takes the rest along if that is less than ``least``.

    Examples
    --------
    >>> [part.size for part in cut_blocks(np.arange(11), 4, 2)], [part.size for part in cut_blocks(np.arange(9), 4, 2)]
    ([4, 4, 3], [4, 5])
    """
    full, rest = divmod(rows.size, block_size)
    n = max(full + (rest >= max(least, 1)), 1)
    return np.split(rows, block_size * np.arange(1, n))


class BlockSampler(EpochSampler):
    """Minibatches from blocks of rows: random chunks make a block, and cells of similar length in it a minibatch.

    In every epoch the chunks of neighbouring rows come in a new order, and the rows in that order are cut into blocks
    of one size. Within a block minibatches are drawn as by :class:`epivi.data.buckets.TokenBudgetSampler`. The number
    of minibatches is the same in every epoch.

    Parameters
    ----------
    indices
        Rows to draw from.
    lengths
        Tokens of every observation of the data, by row number.
    batch_size
        Most cells of a minibatch, on each process.
    seed
        Seed of all orders.
    block_size
        Rows of a block, which are held in memory.
    chunk_size
        Neighbouring rows that stay together in a block.
    rank, world_size
        As in :class:`epivi.data.buckets.TokenBudgetSampler`; every process reads all blocks.

    Raises
    ------
    ConfigError
        If a size is below its least, or a process would get fewer than two cells.

    Examples
    --------
    >>> sampler = BlockSampler(np.arange(8), np.full(8, 3), 2, seed=0, block_size=4, chunk_size=2)
    >>> [held.rows.size for held in sampler], sorted(row for held in sampler for row in held.rows.tolist())
    ([2, 2, 2, 2], [0, 1, 2, 3, 4, 5, 6, 7])
    """

    def __init__(
        self,
        indices: np.ndarray,
        lengths: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        block_size: int,
        chunk_size: int = CHUNK_ROWS,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(np.sort(np.asarray(indices)), batch_size, seed, rank=rank, world_size=world_size)
        check_number(block_size, "block_size", low=MIN_CELLS, integer=True)
        check_number(chunk_size, "chunk_size", low=1, integer=True)
        self.lengths = np.asarray(lengths)
        self.block_size = max(int(block_size), MIN_CELLS * world_size)
        _, self._chunk_n = np.unique(self.indices // chunk_size, return_inverse=True)
        # how many cells a block has tells how many minibatches: the budget below never binds
        self._n_batches = sum(self._of_block(block, 0).n_batches for block in self._cut(self.indices))

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        return cut_blocks(rows, self.block_size, max(self.batch_size, MIN_CELLS) * self.world_size)

    def _of_block(self, block: np.ndarray, number: int) -> TokenBudgetSampler:
        budget = self.batch_size * max(int(self.lengths.max()), 1)
        seed = self.seed + _ORDER * (number + 1)
        return TokenBudgetSampler(
            block, self.lengths, self.batch_size, budget, seed, rank=self.rank, world_size=self.world_size
        )

    @property
    def n_batches(self) -> int:
        """Minibatches in a full epoch, of this process."""
        return self._n_batches

    def batches(self, epoch: int) -> list[Held]:  # type: ignore[override]
        """Return the minibatches of an epoch for this process, block by block."""
        rng = np.random.default_rng([self.seed, epoch, _ORDER])
        place_c = rng.permutation(self._chunk_n[-1] + 1)
        rows = self.indices[np.argsort(place_c[self._chunk_n], kind="stable")]
        found = []
        for number, block in enumerate(map(np.sort, self._cut(rows))):
            drawn = self._of_block(block, number).batches(epoch)
            found += [Held(part.rows, part.draw, block) for part in drawn]
        return found

    def __iter__(self) -> Iterator[Held]:  # type: ignore[override]
        yield from self.batches(self.start + self.epoch)[self.first_batch :]


def block_batches(
    rows: np.ndarray,
    lengths: np.ndarray,
    batch_size: int,
    token_budget: int,
    *,
    block_size: int,
    world_size: int = 1,
) -> list[Held]:
    """Cut rows into minibatches by length within blocks of neighbouring rows, always the same: for validation.

    Parameters
    ----------
    rows
        Row numbers.
    lengths, batch_size, token_budget, world_size
        As in :func:`epivi.data.buckets.fixed_batches`.
    block_size
        Rows of a block, which are held in memory.

    Raises
    ------
    ConfigError
        As there.

    Examples
    --------
    >>> held = block_batches(np.arange(6), np.full(6, 2), 2, 8, block_size=4)
    >>> [(part.rows.tolist(), part.block.tolist()) for part in held]
    [([0, 1], [0, 1, 2, 3]), ([2, 3], [0, 1, 2, 3]), ([4, 5], [4, 5])]
    """
    found: list[Held] = []
    for block in cut_blocks(np.sort(np.asarray(rows)), max(block_size, world_size), world_size):
        drawn = fixed_batches(block, lengths, batch_size, token_budget, world_size=world_size)
        found += [Held(part.rows, part.draw, block) for part in drawn]
    return found
