"""Where training windows begin: a tiling with a random offset, or random positions around given loci."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from epivi._errors import ConfigError, DataError
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi._validate import _some, check_key, check_number

if TYPE_CHECKING:
    from epivi.data.windows.regions import Runs

UNIFORM: Final = "uniform"
MAX_BLACKLISTED: Final = 0.1

_MAX_DRAWS = 100


def project(table: Any, found: Runs, *, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the parts of intervals that lie on runs, in bp along the bins (bin i begins at i times the width).

    Parameters
    ----------
    table
        Columns chrom, start, end (bp, 0-based, half-open), in any order.
    found
        Runs.
    where
        How messages name the table.

    Returns
    -------
    Start and end of each part, and the number of its run; int64, sorted by run and start.

    Raises
    ------
    DataError
        If it is no table or lacks a column, an interval does not end after its start, or the table is not empty and
        shares no chromosome with the runs.

    Examples
    --------
    >>> import pandas as pd
    >>> from epivi.data.windows.regions import runs
    >>> bins = runs(pd.DataFrame({"chrom": ["1", "1"], "start": [100, 110], "end": [110, 120]}))
    >>> project(pd.DataFrame({"chrom": ["1"], "start": [95], "end": [105]}), bins, where="loci")[:2]
    (array([0]), array([5]))
    """
    if not hasattr(table, "columns"):
        message = f"{where} is a {type(table).__name__}: give a DataFrame with the columns chrom, start and end."
        raise DataError(message)
    for key in (VAR_CHROM, VAR_START, VAR_END):
        check_key(table, key, where=where)
    chrom = table[VAR_CHROM].astype(str).to_numpy(dtype=object)
    start, end = (table[key].to_numpy().astype(np.int64) for key in (VAR_START, VAR_END))
    if (bad := np.flatnonzero(end <= start)).size:
        message = f"{where}: row {bad[0]} ({chrom[bad[0]]}:{start[bad[0]]}-{end[bad[0]]}) does not end after its start."
        raise DataError(message)
    names = found.chromosomes
    if chrom.size and not set(chrom) & set(names):
        message = (
            f"{where} and the bins share no chromosome: {_some(dict.fromkeys(chrom))} there, {_some(names)} here. "
            "Name the chromosomes alike, or give the table of this genome."
        )
        raise DataError(message)
    width = found.bin_size_bp
    parts = []
    for name in names:
        mine, at = np.flatnonzero(chrom == name), np.flatnonzero(found.chrom == name)
        run_from, run_to = found.start_bp[at], found.start_bp[at] + found.n_bins[at] * width
        # runs of a chromosome are disjoint and sorted: an interval meets those from low up to high
        low = np.searchsorted(run_to, start[mine], side="right")
        n_met = np.maximum(np.searchsorted(run_from, end[mine], side="left") - low, 0)
        interval = np.repeat(mine, n_met)
        run = np.repeat(low, n_met) + np.arange(n_met.sum()) - np.repeat(np.cumsum(n_met) - n_met, n_met)
        shift = found.first[at[run]] * width - run_from[run]
        lower, upper = np.maximum(start[interval], run_from[run]), np.minimum(end[interval], run_to[run])
        parts.append(np.stack([lower + shift, upper + shift, at[run]]))
    joined = np.concatenate([np.empty((3, 0), dtype=np.int64), *parts], axis=1)
    low, high, run = joined[:, np.lexsort((joined[0], joined[2]))]
    return low, high, run


class Blacklist:
    """Regions to keep out of training, as a function: how many bp of a stretch of bins they cover.

    Parameters
    ----------
    table
        Columns chrom, start, end; intervals may overlap one another. ``None`` covers nothing.
    found
        Runs.

    Examples
    --------
    >>> import pandas as pd
    >>> from epivi.data.windows.regions import runs
    >>> bins = runs(pd.DataFrame({"chrom": ["1", "1"], "start": [0, 10], "end": [10, 20]}))
    >>> bad = Blacklist(pd.DataFrame({"chrom": ["1", "1"], "start": [3, 5], "end": [8, 12]}), bins)
    >>> bad.share(np.array([0, 1]), np.array([1, 2])).tolist()
    [0.7, 0.2]
    """

    def __init__(self, table: Any, found: Runs) -> None:
        low = high = np.empty(0, dtype=np.int64)
        if table is not None and len(table):
            low, high, _ = project(table, found, where="blacklist")
        order = np.argsort(low, kind="stable")
        low, high = low[order], np.maximum.accumulate(high[order]) if high.size else high
        new = np.append(True, low[1:] > high[:-1])[: low.size]
        self._low = low[new]
        self._high = high[np.append(np.flatnonzero(new)[1:] - 1, low.size - 1)] if low.size else high
        self._sum = np.concatenate([[0], np.cumsum(self._high - self._low)])
        self._width = found.bin_size_bp

    def _below(self, position: np.ndarray) -> np.ndarray:
        """Return how many covered bp lie below a position."""
        at = np.searchsorted(self._low, position, side="right")
        over = np.maximum(self._high[at - 1] - position, 0) if self._low.size else 0
        return np.where(at > 0, self._sum[at] - over, 0)

    def share(self, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Return the covered share of the bins from ``first`` up to ``stop``."""
        covered = self._below(stop * self._width) - self._below(first * self._width)
        return covered / ((stop - first) * self._width)


@dataclass(frozen=True, eq=False)
class TrainingWindows:
    """The law from which each epoch draws where its windows begin.

    Parameters
    ----------
    runs
        Bins to train on; no window leaves them.
    window
        Bins of a window.
    loci
        ``"uniform"``: windows tile each run, from an offset that each epoch draws anew. Or a table with the columns
        chrom, start, end, such as cCREs or TSS: one window for each locus, the locus at a random place inside it.
        Loci outside the runs are left out.
    blacklist
        Regions (chrom, start, end) to keep out, or ``None``.
    max_blacklisted
        Windows of which a larger share is blacklisted are dropped.

    Raises
    ------
    ConfigError
        If an argument is not valid, or all windows are dropped.
    DataError
        If a table is not valid, or no locus lies on the runs.

    Examples
    --------
    >>> import pandas as pd
    >>> from epivi.data.windows.regions import runs
    >>> bins = pd.DataFrame({"chrom": ["1"] * 25, "start": range(25), "end": range(1, 26)})
    >>> TrainingWindows(runs(bins), 5).count
    4
    """

    runs: Runs
    window: int
    loci: Any = UNIFORM
    blacklist: Any = None
    max_blacklisted: float = MAX_BLACKLISTED
    _bad: Blacklist = field(init=False, repr=False)
    _ranges: tuple[np.ndarray, np.ndarray] | None = field(init=False, repr=False, default=None)
    count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Check the arguments, place loci and blacklist on the runs, and count the windows of an epoch."""
        check_number(self.window, "window", low=1, integer=True)
        check_number(self.max_blacklisted, "max_blacklisted", low=0, high=1)
        if not len(self.runs):
            message = "There is no bin to train on. Hold out fewer chromosomes."
            raise ConfigError(message)
        if isinstance(self.loci, str) and self.loci != UNIFORM:
            message = f"loci={self.loci!r} is not valid: give 'uniform', or a DataFrame with chrom, start and end."
            raise ConfigError(message)
        object.__setattr__(self, "_bad", Blacklist(self.blacklist, self.runs))
        if not isinstance(self.loci, str):
            object.__setattr__(self, "_ranges", self._around(self.loci))
        # one fixed draw says how many windows an epoch has: every epoch has the same number of minibatches
        count = self._once(np.random.default_rng(0)).size
        if self._ranges is None:
            # the fewest windows that an offset leaves, so that no epoch needs a second tiling
            fewest = np.maximum((self.runs.n_bins - self._n_offsets() + 1) // self.window, 1).sum()
            count = min(count, int(fewest))
        if count == 0:
            message = (
                f"More than {self.max_blacklisted:.0%} of every training window is blacklisted. Check the blacklist, "
                "or raise max_blacklisted."
            )
            raise ConfigError(message)
        object.__setattr__(self, "count", int(count))

    def _around(self, loci: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and highest first bin of a window around each locus."""
        low_bp, high_bp, run = project(loci, self.runs, where="loci")
        if not low_bp.size:
            message = (
                f"None of the {len(loci)} loci lies on the bins to train on, {_some(self.runs.chromosomes)}."
                " Give loci there, or 'uniform'."
            )
            raise DataError(message)
        low, high = low_bp // self.runs.bin_size_bp, -(-high_bp // self.runs.bin_size_bp)
        lowest, highest = np.minimum(low, high - self.window), np.maximum(low, high - self.window)
        first = self.runs.first[run]
        last = np.maximum(first, self.runs.stop[run] - self.window)
        return np.clip(lowest, first, last), np.clip(highest, first, last)

    def _once(self, rng: np.random.Generator) -> np.ndarray:
        """Return the first bins of one draw of all windows."""
        if self._ranges is None:
            starts = self._tiling(rng)
        else:
            starts = rng.integers(self._ranges[0], self._ranges[1], endpoint=True)
        stop = np.minimum(starts + self.window, self.runs.stop[self.runs.of(starts)])
        return starts[self._bad.share(starts, stop) <= self.max_blacklisted]

    def _tiling(self, rng: np.random.Generator) -> np.ndarray:
        n, size = self.runs.n_bins, self.window
        offset = rng.integers(0, self._n_offsets())
        mirrored = rng.random(n.size) < 0.5
        n_windows = np.maximum((n - offset) // size, 1)
        run = np.repeat(np.arange(n.size), n_windows)
        number = np.arange(run.size) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        inside = offset[run] + number * size
        # half of the runs are tiled from their other end, so that neither end is seen less often
        return self.runs.first[run] + np.where(mirrored[run], np.maximum(n - size, 0)[run] - inside, inside)

    def _n_offsets(self) -> np.ndarray:
        """Return how many offsets of the tiling each run allows."""
        return np.minimum(self.window, np.maximum(self.runs.n_bins - self.window, 0) + 1)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return the first bins of the windows of an epoch in random order, int64, shape (count,).

        Raises
        ------
        ConfigError
            If nearly all windows are blacklisted.
        """
        starts = self._once(rng)
        for _ in range(_MAX_DRAWS):
            if starts.size >= self.count:
                return rng.permutation(starts)[: self.count]
            starts = np.concatenate([starts, self._once(rng)])
        message = f"Nearly all training windows are blacklisted by more than {self.max_blacklisted:.0%}. Raise it."
        raise ConfigError(message)


def training_starts(runs: Runs, window: int, *, seed: int = 0, epoch: int = 0, **law: Any) -> np.ndarray:
    """Return where the training windows of an epoch begin, a pure function of (seed, epoch).

    Parameters
    ----------
    runs, window
        Bins to train on, and bins of a window.
    seed, epoch
        What is drawn.
    law
        ``loci``, ``blacklist`` and ``max_blacklisted`` of :class:`TrainingWindows`.

    Raises
    ------
    ConfigError
        As :class:`TrainingWindows`.
    DataError
        As :class:`TrainingWindows`.

    Examples
    --------
    >>> import pandas as pd
    >>> from epivi.data.windows.regions import runs
    >>> bins = pd.DataFrame({"chrom": ["1"] * 5, "start": range(5), "end": range(1, 6)})
    >>> training_starts(runs(bins), 5).tolist()
    [0]
    """
    return TrainingWindows(runs, window, **law).draw(np.random.default_rng([seed, epoch]))
