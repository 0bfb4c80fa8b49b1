"""Which windows of which biosamples make a minibatch: every order is a pure function of (seed, epoch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from epivi._errors import ConfigError
from epivi._validate import check_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from epivi.data.windows.loci import TrainingWindows
    from epivi.data.windows.regions import Runs


# biosamples that a mixture needs
MIN_PAIRED = 2


class WindowSampler:
    """Minibatches of random (biosample, window) pairs, one epoch after the other.

    Each epoch draws its windows from a :class:`TrainingWindows` and pairs each of them with each biosample; of these
    pairs, ``windows_per_epoch`` are visited in random order, each at most once.

    Parameters
    ----------
    rows
        Biosamples to train on.
    windows
        The law of the windows.
    batch_size
        Pairs of a minibatch, on each process; with ``same_locus`` the number of ``rows`` takes its place.
    seed
        Seed of all orders.
    windows_per_epoch
        Most pairs of an epoch, over all processes; all pairs if ``None``.
    same_locus
        Whether a minibatch is one window in all biosamples.
    paired
        Whether each sample is followed by the same window in another biosample, drawn at random: places 2i and 2i + 1
        of a minibatch belong together. There are as many samples as without.
    rank, world_size
        Number of this process and of all; every process gets the same number of minibatches of the same sizes.

    Raises
    ------
    ConfigError
        If an argument is not valid, there is no biosample, or a process would get no minibatch.

    Examples
    --------
    >>> import pandas as pd
    >>> from epivi.data.windows import TrainingWindows, runs
    >>> bins = pd.DataFrame({"chrom": ["1"] * 11, "start": range(11), "end": range(1, 12)})
    >>> sampler = WindowSampler([0, 1], TrainingWindows(runs(bins), 4), 3, seed=0)
    >>> [items.shape for items in sampler]
    [(3, 2), (1, 2)]

    Notes
    -----
    ``start``, ``epoch``, ``first_batch`` and ``set_epoch`` are those of :class:`epivi.data.splits.EpochSampler`.
    """

    def __init__(  # noqa: PLR0913
        self,
        rows: Sequence[int] | np.ndarray,
        windows: TrainingWindows,
        batch_size: int,
        seed: int,
        *,
        windows_per_epoch: int | None = None,
        same_locus: bool = False,
        paired: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_number(batch_size, "batch_size", low=1, integer=True)
        if windows_per_epoch is not None:
            check_number(windows_per_epoch, "windows_per_epoch", low=1, integer=True)
        self.rows = np.unique(np.asarray(rows, dtype=np.int64))
        if not self.rows.size:
            message = "There is no biosample to train on. Check the split of the biosamples."
            raise ConfigError(message)
        if paired and self.rows.size < MIN_PAIRED:
            message = "mixup and swap_rate need two training biosamples or more; there is one. Leave them at 0."
            raise ConfigError(message)
        if paired and same_locus:
            message = "same_locus=True cannot be combined with mixup or swap_rate: choose one."
            raise ConfigError(message)
        self.windows = windows
        self.same_locus, self.paired = same_locus, paired
        self.batch_size = self.rows.size if same_locus else int(batch_size)
        self.seed = int(seed)
        self.rank, self.world_size = rank, world_size
        self.start = 0
        self.epoch = 0
        self.first_batch = 0
        # what is drawn: loci with same_locus, else pairs
        per_draw = self.rows.size if same_locus else 1
        n_all = windows.count * (self.rows.size // per_draw)
        if windows_per_epoch is not None:
            n_all = min(n_all, max(windows_per_epoch // per_draw, 1))
        if paired:
            n_all = max(n_all // 2, 1)
            self.batch_size = max(self.batch_size // 2, 1) * 2
        # drawn in any number of processes, so that these divide what one process visits
        self._n_all, self._n_drawn = n_all, n_all // world_size
        if self._n_drawn == 0:
            message = (
                f"{n_all} {'loci' if same_locus else 'windows'} for {world_size} processes are too few. Train on more, "
                "or on fewer processes."
            )
            raise ConfigError(message)

    def set_epoch(self, epoch: int) -> None:
        """Take the number of the epoch, counted from the start of this process."""
        self.epoch = epoch

    @property
    def n_batches(self) -> int:
        """Minibatches in a full epoch."""
        return self._n_drawn if self.same_locus else -(-self._n_drawn // (self.batch_size // (1 + self.paired)))

    def __len__(self) -> int:
        return self.n_batches - self.first_batch

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the minibatches of an epoch for this process, each int64 (b, 2) = (biosample row, first bin)."""
        rng = np.random.default_rng([self.seed, epoch])
        starts = self.windows.draw(rng)
        n_all = self._n_drawn * self.world_size
        mine = slice(self.rank, n_all, self.world_size)
        if self.same_locus:
            rows = np.tile(self.rows, (self._n_drawn, 1))
            return list(np.stack([rows, np.broadcast_to(starts[mine][:, None], rows.shape)], axis=-1))
        pairs = rng.choice(starts.size * self.rows.size, size=self._n_all, replace=False)
        own, first = pairs % self.rows.size, starts[pairs // self.rows.size]
        items = np.stack([self.rows[own], first], axis=1)
        if self.paired:
            other = (own + rng.integers(1, self.rows.size, size=self._n_all)) % self.rows.size
            items = np.stack([items, np.stack([self.rows[other], first], axis=1)], axis=1)
        items = items[mine].reshape(-1, 2)
        return np.split(items, np.arange(1, self.n_batches) * self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from self.batches(self.start + self.epoch)[self.first_batch :]


def validation_windows(
    runs: Runs, rows: Sequence[int] | np.ndarray, window: int, *, max_windows: int | None = None
) -> np.ndarray:
    """Return fixed (biosample, window) pairs to validate on: windows that do not overlap, in all biosamples.

    Parameters
    ----------
    runs
        Bins to validate on. What is left at the end of a run and shorter than a window is passed over; a run that is
        shorter than a window is one padded window.
    rows
        Biosamples: those of validation, or all training ones on chromosomes that are held out.
    window
        Bins of a window.
    max_windows
        Most pairs; fewer windows, evenly spaced, are taken in all biosamples, or one in evenly spaced biosamples.

    Returns
    -------
    int64 (pairs, 2) = (biosample row, first bin); the biosamples of one window follow one another.

    Raises
    ------
    ConfigError
        If a number is not positive.

    Examples
    --------
    >>> import pandas as pd
    >>> from epivi.data.windows import runs
    >>> bins = pd.DataFrame({"chrom": ["1"] * 9, "start": range(9), "end": range(1, 10)})
    >>> validation_windows(runs(bins), [0, 2], 4).tolist()
    [[0, 0], [2, 0], [0, 4], [2, 4]]
    """
    check_number(window, "window", low=1, integer=True)
    parts = [run.first + window * np.arange(max(run.n_bins // window, 1), dtype=np.int64) for run in runs]
    starts = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    rows = np.asarray(rows, dtype=np.int64)
    if max_windows is not None:
        check_number(max_windows, "max_windows", low=1, integer=True)
        starts = _spaced(starts, max(max_windows // max(rows.size, 1), 1))
        rows = _spaced(rows, max_windows)
    return np.stack([np.tile(rows, starts.size), np.repeat(starts, rows.size)], axis=1)


def _spaced(values: np.ndarray, n: int) -> np.ndarray:
    """Return at most n values, evenly spaced."""
    if values.size <= n:
        return values
    return values[np.floor((np.arange(n) + 0.5) * values.size / n).astype(np.int64)]
