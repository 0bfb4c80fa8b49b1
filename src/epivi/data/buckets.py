"""Minibatches of cells of similar length that fill a budget of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from epivi._errors import ConfigError
from epivi._validate import check_number
from epivi.data.splits import EpochSampler
from epivi.data.tokens import Drawn

if TYPE_CHECKING:
    from collections.abc import Iterator

# a stratum holds the lengths from one power of this factor up to the next
FACTOR = 1.25


class TokenBudgetSampler(EpochSampler):
    """Minibatches of cells of similar length, random in each epoch, each within a budget of padded tokens.

    Lengths fall into strata that grow by a factor of 1.25. In every epoch the cells of each stratum are permuted and
    cut into minibatches of ``min(batch_size, token_budget // longest of the stratum)`` cells; what is left over joins
    the next longer stratum, and the last one is cut evenly. The order of the minibatches is permuted too. How many
    there are, and of which sizes, is the same in every epoch.

    Parameters
    ----------
    indices
        Rows to draw from.
    lengths
        Tokens of every observation of the data, by row number, with leading tokens counted.
    batch_size
        Most cells of a minibatch, on each process.
    token_budget
        Most padded tokens of a minibatch, cells times the longest of them. A cell that is longer is a minibatch alone.
    seed
        Seed of all orders.
    rank, world_size
        Number of this process and of all. Every process gets the same number of minibatches, at each step of similar
        lengths: some minibatches are halved until the number divides. Only where minibatches of single cells cannot
        be halved, some are left out, others in each epoch.

    Raises
    ------
    ConfigError
        If ``batch_size`` is below two, ``token_budget`` below one, a process would get fewer than two cells, or
        ``lengths`` are not whole numbers of each observation.

    Examples
    --------
    >>> sampler = TokenBudgetSampler(np.arange(5), np.array([9, 3, 3, 9, 3]), 3, 18, seed=0)
    >>> sorted(sorted(drawn.rows.tolist()) for drawn in sampler)
    [[0, 3], [1, 2, 4]]

    Notes
    -----
    ``start``, ``epoch``, ``first_batch`` and ``set_epoch`` are those of :class:`epivi.data.splits.EpochSampler`. The
    number of the draw is the epoch, counted over all processes that a run was resumed in.
    """

    def __init__(
        self,
        indices: np.ndarray,
        lengths: np.ndarray,
        batch_size: int,
        token_budget: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(indices, batch_size, seed, rank=rank, world_size=world_size)
        check_number(token_budget, "token_budget", low=1, integer=True)
        self.token_budget = int(token_budget)
        lengths_n = _lengths(self.indices, lengths)
        powers = FACTOR ** np.arange(np.log(lengths_n.max()) / np.log(FACTOR) + 2)
        self._stratum_n = np.searchsorted(powers, lengths_n, side="right")
        sizes = self._cut(lengths_n)
        self._sizes = _halved(sizes, -(-len(sizes) // world_size) * world_size)

    def _cut(self, lengths_n: np.ndarray) -> list[int]:
        """Return the sizes of the minibatches, in order of length."""
        sizes: list[int] = []
        full, rest, size = 0, 0, 1
        for stratum in np.unique(self._stratum_n).tolist():
            mine = lengths_n[self._stratum_n == stratum]
            size = int(np.clip(self.token_budget // mine.max(), 1, self.batch_size))
            full, rest = divmod(rest + mine.size, size)
            sizes += [size] * full
        if rest:
            # the longest cells are cut evenly, so that no minibatch has but a few of those that would fit
            even, n_more = divmod(full * size + rest, full + 1)
            sizes[len(sizes) - full :] = [even + 1] * n_more + [even] * (full + 1 - n_more)
        return sizes

    @property
    def n_batches(self) -> int:
        """Minibatches in a full epoch, of this process."""
        return len(self._sizes) // self.world_size

    def batches(self, epoch: int) -> list[Drawn]:  # type: ignore[override]
        """Return the minibatches of an epoch for this process."""
        rng = np.random.default_rng([self.seed, epoch])
        # strata follow one another, so that what is left of one stands before the next
        order = np.lexsort((rng.random(self.indices.size), self._stratum_n))
        parts = np.split(self.indices[order], np.cumsum(self._sizes)[:-1])
        left_out = rng.permutation(len(parts))[: len(parts) % self.world_size]
        # processes share a step with minibatches that follow one another, and take turns at the longest
        steps = np.delete(np.arange(len(parts)), left_out).reshape(-1, self.world_size)
        steps = rng.permuted(steps[rng.permutation(len(steps))], axis=1)
        return [Drawn(parts[i], epoch) for i in steps[:, self.rank].tolist()]

    def __iter__(self) -> Iterator[Drawn]:  # type: ignore[override]
        yield from self.batches(self.start + self.epoch)[self.first_batch :]


def fixed_batches(
    rows: np.ndarray,
    lengths: np.ndarray,
    batch_size: int,
    token_budget: int,
    *,
    world_size: int = 1,
    draw: int = 0,
) -> list[Drawn]:
    """Cut rows into minibatches by length, the longest first, always the same: for validation and inference.

    Parameters
    ----------
    rows
        Row numbers; the caller puts results back into their order.
    lengths
        Tokens of every observation of the data, by row number.
    batch_size
        Most cells of a minibatch.
    token_budget
        Most padded tokens of a minibatch, cells times the longest of them; a cell that is longer is alone.
    world_size
        Number of processes, which take every ``world_size``-th minibatch: their numbers are equal where there are
        cells enough, and no process is without.
    draw
        Number of the draw.

    Raises
    ------
    ConfigError
        If ``batch_size`` or ``token_budget`` is below one, ``lengths`` are not whole numbers of each observation, or
        there are fewer rows than processes.

    Examples
    --------
    >>> [part.rows.tolist() for part in fixed_batches(np.arange(4), np.array([2, 9, 3, 8]), 3, 18)]
    [[1, 3], [2, 0]]
    """
    check_number(batch_size, "batch_size", low=1, integer=True)
    check_number(token_budget, "token_budget", low=1, integer=True)
    rows = np.asarray(rows)
    if not rows.size:
        return []
    if rows.size < world_size:
        message = (
            f"{rows.size} cells are too few for {world_size} processes: each needs one. "
            "Take more cells or fewer processes; in training, lower train_size or set validation_size=0."
        )
        raise ConfigError(message)
    lengths_n = _lengths(rows, lengths)
    order = np.argsort(-lengths_n, kind="stable")
    sizes: list[int] = []
    start = 0
    while start < rows.size:
        fits = max(token_budget // int(lengths_n[order[start]]), 1)
        sizes.append(min(fits, batch_size, rows.size - start))
        start += sizes[-1]
    sizes = _halved(sizes, -(-len(sizes) // world_size) * world_size)
    return [Drawn(part, draw) for part in np.split(rows[order], np.cumsum(sizes)[:-1])]


def _lengths(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the lengths of the rows, at least 1: a row without tokens takes a place too."""
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer) or rows.max() >= lengths.size:
        message = (
            f"lengths has shape {lengths.shape} and type {lengths.dtype}; whole numbers are needed, one for each "
            f"observation of the data, of which row {rows.max()} is drawn."
        )
        raise ConfigError(message)
    return np.maximum(lengths[rows].astype(np.int64), 1)


def _halved(sizes: list[int], n: int) -> list[int]:
    """Halve the largest parts until there are n, or all have size 1."""
    sizes = list(sizes)
    while len(sizes) < n and (largest := max(sizes)) > 1:
        at = sizes.index(largest)
        sizes[at : at + 1] = [largest - largest // 2, largest // 2]
    return sizes
