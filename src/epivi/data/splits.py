"""Which cells train, which validate, and which cells share a minibatch.

Every order is a pure function of (seed, epoch): a run that was killed goes on with the same minibatches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from epivi import _validate
from epivi._errors import ConfigError
from epivi.train.config import check_shares

if TYPE_CHECKING:
    from collections.abc import Iterator

# batch normalisation needs two cells
MIN_CELLS = 2
# the last minibatch is joined to the one before if it has fewer cells than this part of a full one: statistics of a few
# cells would train the network as much as those of a full one, and enter the running ones just before validation
LEAST_PART = 8


def split_cells(n_obs: int, train_size: float, validation_size: float | None, seed: int) -> dict[str, np.ndarray]:
    """Split observations at random into training, validation and test sets.

    Parameters
    ----------
    n_obs
        Number of observations.
    train_size, validation_size
        Shares; validation defaults to all that is not in training.
    seed
        Seed of the split.

    Returns
    -------
    Sorted row numbers under ``"train"``, ``"validation"`` and ``"test"``.

    Raises
    ------
    ConfigError
        If a share is outside its range, their sum exceeds one, or fewer than two cells are left to train on.

    Examples
    --------
    >>> {k: v.size for k, v in split_cells(10, 0.8, None, 0).items()}
    {'train': 8, 'validation': 2, 'test': 0}
    """
    check_shares(train_size, validation_size)
    order = np.random.default_rng([seed, 0x5917]).permutation(n_obs)
    n_train = int(np.ceil(round(train_size * n_obs, 6)))
    n_validation = n_obs - n_train
    if validation_size is not None:
        n_validation = min(n_validation, int(np.floor(round(validation_size * n_obs, 6))))
    if n_train < MIN_CELLS:
        message = f"train_size={train_size} leaves {n_train} of {n_obs} cells to train on; at least 2 are needed."
        raise ConfigError(message)
    parts = np.split(order, [n_train, n_train + n_validation])
    return dict(zip(("train", "validation", "test"), (np.sort(part) for part in parts), strict=True))


def split_groups(
    group_n: np.ndarray, train_size: float, validation_size: float | None, seed: int
) -> dict[str, np.ndarray]:
    """Split observations into training, validation and test sets without tearing groups, such as donors, apart.

    Groups come in random order; each goes to the training set while that is the nearer way to its share, then to the
    validation set likewise, and else to the test set. The first group is for training; the last one is for validation
    if that is asked for and no other is.

    Parameters
    ----------
    group_n
        Group of each observation.
    train_size, validation_size, seed
        As in :func:`split_cells`.

    Returns
    -------
    Sorted row numbers under ``"train"``, ``"validation"`` and ``"test"``.

    Raises
    ------
    ConfigError
        If a share is outside its range, or there are fewer than two groups.

    Examples
    --------
    >>> parts = split_groups(np.array(["a", "a", "b", "b"]), 0.5, None, 0)
    >>> sorted(part.size for part in parts.values())
    [0, 2, 2]
    """
    check_shares(train_size, validation_size)
    names, code_n = np.unique(group_n, return_inverse=True)
    if names.size < 2:
        message = f"There is one group of observations, '{names[0]}': it cannot be split. Leave the key out."
        raise ConfigError(message)
    n = code_n.size
    wanted = np.cumsum([train_size * n, (1.0 - train_size if validation_size is None else validation_size) * n])
    order = np.random.default_rng([seed, 0x6709]).permutation(names.size)
    sizes = np.bincount(code_n)[order]
    middle = np.cumsum(sizes) - sizes / 2
    part = np.searchsorted(wanted, middle)  # 0 training, 1 validation, 2 test
    part[0] = 0
    if (validation_size is None or validation_size > 0) and not (part == 1).any():
        part[-1] = 1
    part_of_group = np.empty(names.size, dtype=int)
    part_of_group[order] = part
    found = (np.flatnonzero(part_of_group[code_n] == number) for number in range(3))
    return dict(zip(("train", "validation", "test"), found, strict=True))


class EpochSampler:
    """Minibatches of one epoch after the other, each a list of row numbers.

    Parameters
    ----------
    indices
        Rows to draw from.
    batch_size
        Rows of a minibatch, on each process. The last one of an epoch takes the rest along if that is less than two
        rows or an eighth of a minibatch.
    seed
        Seed of all orders.
    shuffle
        If false, rows come in the order of ``indices``.
    rank, world_size
        Number of this process and of all; every process gets the same number of minibatches.

    Raises
    ------
    ConfigError
        If ``batch_size`` is below two, or a process would get fewer than two rows.

    Notes
    -----
    The training loop counts its own epochs from 0 and calls ``set_epoch``; ``start`` is the epoch at which a resumed
    run goes on, and ``first_batch`` skips the minibatches that it had already done in that epoch.
    """

    def __init__(
        self,
        indices: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _validate.check_number(batch_size, "batch_size", low=MIN_CELLS, integer=True)
        self.indices = np.asarray(indices)
        if self.indices.size // world_size < MIN_CELLS:
            message = (
                f"{self.indices.size} cells for {world_size} processes are too few: each needs at least {MIN_CELLS} "
                "cells. Train on more cells or fewer processes."
            )
            raise ConfigError(message)
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.shuffle = shuffle
        self.rank, self.world_size = rank, world_size
        self.start = 0
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the number of the epoch, counted from the start of this process."""
        self.epoch = epoch

    @property
    def n_batches(self) -> int:
        """Minibatches in a full epoch."""
        full, rest = divmod(self.indices.size // self.world_size, self.batch_size)
        return max(full + (rest >= max(MIN_CELLS, self.batch_size // LEAST_PART)), 1)

    def __len__(self) -> int:
        return self.n_batches - self.first_batch

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.indices) if self.shuffle else self.indices

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the minibatches of an epoch for this process."""
        order = self._order(np.random.default_rng([self.seed, epoch]))
        n = self.indices.size // self.world_size
        if self.world_size > 1:
            order = order[: n * self.world_size][self.rank :: self.world_size]
        cuts = np.arange(1, self.n_batches) * self.batch_size
        return np.split(order, cuts)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.batches(self.start + self.epoch)[self.first_batch :]:
            yield rows.tolist()


class StratifiedSampler(EpochSampler):
    """Minibatches with at least ``minimum`` cells of a scarce group, such as those with a reference embedding.

    Parameters
    ----------
    group
        Shape (n,): whether each row of the whole data belongs to the group.
    minimum
        Fewest cells of the group in each minibatch; drawn again from the group where an epoch has too few.
    """

    def __init__(self, *args, group: np.ndarray, minimum: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.group = np.asarray(group, dtype=bool)
        self.members = self.indices[self.group[self.indices]]
        self.minimum = min(minimum, self.batch_size // 2, self.members.size)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the minibatches, the first rows outside the group giving way to members where there are too few."""
        rng = np.random.default_rng([self.seed, epoch, 1 + self.rank])
        result = []
        for drawn in super().batches(epoch):
            rows = drawn.copy()
            lacking = self.minimum - int(self.group[rows].sum())
            outside = np.flatnonzero(~self.group[rows])[: max(lacking, 0)]
            if outside.size:
                free = np.setdiff1d(self.members, rows)
                rows[outside[: free.size]] = rng.choice(free, size=min(outside.size, free.size), replace=False)
            result.append(rows)
        return result


class NeighborSampler(EpochSampler):
    """Minibatches half of which are reference neighbours of the other half, so that rare types have partners.

    Parameters
    ----------
    neighbors
        Shape (n, k): rows of the nearest neighbours of each cell in the reference, -1 where there are none. Neighbours
        that are not among ``indices`` are left out, so that no cell of the validation set is trained on.
    """

    def __init__(self, *args, neighbors: np.ndarray, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.neighbors = np.where(np.isin(neighbors, self.indices), neighbors, -1)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return minibatches of the usual number and size; where no neighbour is drawn, a row keeps its place."""
        rng = np.random.default_rng([self.seed, epoch, 1 + self.rank])
        result = []
        for rows in super().batches(epoch):
            seeds, others = np.split(rows, [(rows.size + 1) // 2])
            drawn = self.neighbors[seeds, rng.integers(self.neighbors.shape[1], size=seeds.size)][: others.size]
            result.append(np.concatenate([seeds, np.where(drawn >= 0, drawn, others)]))
        return result
