"""Bins of tracks along the genome: the grid of a channel, runs of neighbouring bins, grids nested in one another."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np

from epivi._errors import DataError
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi._validate import check_choice, check_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

BOUNDARIES: Final = ("none", "chromosome", "gap")


@dataclass(frozen=True, eq=False)
class TrackGrid:
    """Bins of one track, ordered along the genome; 0-based, half-open.

    Attributes
    ----------
    chrom
        Chromosome of each bin, text, shape (l,).
    start, end
        Positions in bp, shape (l,).
    bin_size_bp
        Width of a whole bin; bins at the end of a chromosome may be narrower.
    """

    chrom: np.ndarray
    start: np.ndarray
    end: np.ndarray
    bin_size_bp: int

    @classmethod
    def from_frame(cls, bins: Any, *, where: str, bin_size_bp: Any = None) -> Self:
        """Read and check a table of bins.

        Parameters
        ----------
        bins
            Table with the columns chrom, start and end, one row a bin.
        where
            How messages name it.
        bin_size_bp
            Width of a whole bin; that of the widest bin if ``None``.

        Raises
        ------
        DataError
            If it is no table, has no row, lacks a column or a value, or a position is no whole number; if a bin starts
            below zero, does not end after its start, is wider than ``bin_size_bp``, overlaps the one before, comes
            before it, or lies on a chromosome that ended already. The first such bin is named.

        Examples
        --------
        >>> import pandas as pd
        >>> bins = pd.DataFrame({"chrom": ["chr1", "chr1"], "start": [0, 100], "end": [100, 180]})
        >>> TrackGrid.from_frame(bins, where="bins").bin_size_bp
        100
        """
        if not hasattr(bins, "columns"):
            message = f"{where} is a {type(bins).__name__}: give a DataFrame with the columns chrom, start and end."
            raise DataError(message)
        for key in (VAR_CHROM, VAR_START, VAR_END):
            check_key(bins, key, where=where)
        if len(bins) == 0:
            message = f"{where} has no row: give one row for each bin."
            raise DataError(message)
        missing = bins[VAR_CHROM].isna().to_numpy()
        if missing.any():
            message = f"{where}['{VAR_CHROM}'] has no chromosome in row {int(np.argmax(missing))}. Fill or remove it."
            raise DataError(message)
        start, end = (_positions(bins, key, where) for key in (VAR_START, VAR_END))
        chrom = np.asarray(bins[VAR_CHROM].astype(str).to_numpy(dtype=object), dtype=np.str_)
        widest = int((end - start).max())
        grid = cls(chrom, start, end, widest if bin_size_bp is None else _size(bin_size_bp, where))
        grid._check_order(where)
        if widest > grid.bin_size_bp:
            at = int(np.argmax(end - start))
            message = f"{where}: bin {at} ({grid.name(at)}) is wider than bin_size_bp={grid.bin_size_bp}. Correct one."
            raise DataError(message)
        return grid

    def _check_order(self, where: str) -> None:
        same = self.chrom[1:] == self.chrom[:-1]
        runs_at = np.concatenate([[0], np.flatnonzero(~same) + 1])
        _, first = np.unique(self.chrom[runs_at], return_index=True)
        again = np.ones(runs_at.size, dtype=bool)
        again[first] = False
        for bad_at, cause in (
            (np.flatnonzero(self.start < 0), "starts below zero"),
            (np.flatnonzero(self.end <= self.start), "does not end after its start"),
            (runs_at[again], "lies on a chromosome that ended already: chromosomes are interleaved"),
            (np.flatnonzero(same & (self.start[1:] < self.start[:-1])) + 1, "starts before the bin in front of it"),
            (np.flatnonzero(same & (self.start[1:] < self.end[:-1])) + 1, "overlaps the bin in front of it"),
        ):
            if bad_at.size:
                at = int(bad_at[0])
                message = (
                    f"{where}: bin {at} ({self.name(at)}) {cause}. Bins must be sorted by chromosome and start and "
                    f"must not overlap; {bad_at.size} bins are affected. Sort the bins together with the counts."
                )
                raise DataError(message)

    @property
    def n_bins(self) -> int:
        """Number of bins."""
        return self.chrom.size

    def name(self, at: int) -> str:
        """Return ``chrom:start-end`` of one bin."""
        return f"{self.chrom[at]}:{self.start[at]}-{self.end[at]}"

    def frame(self) -> pd.DataFrame:
        """Return the bins as a table with the columns chrom, start and end, indexed by ``chrom:start-end``."""
        import pandas as pd

        columns = {VAR_CHROM: self.chrom.astype(object), VAR_START: self.start, VAR_END: self.end}
        names = [f"{c}:{s}-{e}" for c, s, e in zip(self.chrom, self.start, self.end, strict=True)]
        return pd.DataFrame(columns, index=pd.Index(names, dtype=str)).astype({VAR_CHROM: str})

    def first_difference(self, other: TrackGrid) -> int | None:
        """Return the first bin at which two grids differ, or ``None`` if they are the same."""
        n = min(self.n_bins, other.n_bins)
        differs = (
            (self.chrom[:n] != other.chrom[:n]) | (self.start[:n] != other.start[:n]) | (self.end[:n] != other.end[:n])
        )
        if differs.any():
            return int(np.argmax(differs))
        return None if self.n_bins == other.n_bins else n

    def state(self) -> dict[str, Any]:
        """Return the grid as arrays and numbers, with a hash of the bins."""
        text = "\n".join(self.chrom).encode()
        digest = sha256(text + self.start.astype("<i8").tobytes() + self.end.astype("<i8").tobytes()).hexdigest()
        return {
            VAR_CHROM: self.chrom,
            VAR_START: self.start,
            VAR_END: self.end,
            "bin_size_bp": self.bin_size_bp,
            "hash": digest,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Build the grid from what :meth:`state` returned."""
        start, end = (np.asarray(state[key], dtype=np.int64) for key in (VAR_START, VAR_END))
        return cls(np.asarray(state[VAR_CHROM], dtype=np.str_), start, end, int(state["bin_size_bp"]))


@dataclass(frozen=True, eq=False)
class TrackLayout:
    """Channels of tracks and the grid of each.

    Attributes
    ----------
    channels
        Names, c of them.
    grids
        The different grids.
    grid_of_channel
        Number of the grid of each channel.
    genome
        Name of the genome, if known.
    """

    channels: tuple[str, ...]
    grids: tuple[TrackGrid, ...]
    grid_of_channel: tuple[int, ...]
    genome: str | None = None

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return len(self.channels)

    @property
    def n_bins(self) -> list[int]:
        """Number of bins of each channel."""
        return [self.grids[at].n_bins for at in self.grid_of_channel]

    @property
    def offsets(self) -> np.ndarray:
        """Where each channel begins among the concatenated bins, and their total number, shape (c + 1,)."""
        return np.concatenate([[0], np.cumsum(self.n_bins)]).astype(np.int64)

    def grid(self, channel: int) -> TrackGrid:
        """Return the grid of a channel."""
        return self.grids[self.grid_of_channel[channel]]

    def state(self) -> dict[str, Any]:
        """Return the layout as plain values and arrays, as the registry keeps it."""
        return {
            "column_names": np.array(self.channels, dtype=np.str_),
            "n_bins": self.n_bins,
            "grids": [grid.state() for grid in self.grids],
            "grid_of_channel": list(self.grid_of_channel),
            "genome": self.genome,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Build the layout from the state that a field of tracks registered."""
        return cls(
            tuple(str(name) for name in state["column_names"]),
            tuple(TrackGrid.from_state(grid) for grid in state["grids"]),
            tuple(int(at) for at in state["grid_of_channel"]),
            None if state["genome"] is None else str(state["genome"]),
        )


class Nesting(NamedTuple):
    """Where the bins of a fine grid lie in a coarse one.

    Attributes
    ----------
    parent
        Coarse bin of each fine bin, shape (l_fine,).
    slot
        Place inside the coarse bin, 0 to ``n_slots - 1``, shape (l_fine,).
    n_slots
        Fine bins to a whole coarse bin.
    """

    parent: np.ndarray
    slot: np.ndarray
    n_slots: int


def segments(grid: TrackGrid, boundaries: str = "chromosome") -> list[int]:
    """Return the lengths of the runs of bins that count as contiguous; they sum to the number of bins.

    Parameters
    ----------
    grid
        Bins.
    boundaries
        ``"none"``: one run. ``"chromosome"``: a run for each chromosome. ``"gap"``: a run also ends where the next bin
        starts more than half a bin after the end of the last; less than that is what lifting between genomes leaves.

    Raises
    ------
    ConfigError
        If ``boundaries`` is another word.

    Examples
    --------
    >>> import pandas as pd
    >>> bins = pd.DataFrame({"chrom": ["1", "1", "1", "2"], "start": [0, 10, 40, 0], "end": [10, 20, 50, 10]})
    >>> grid = TrackGrid.from_frame(bins, where="bins")
    >>> [segments(grid, boundaries) for boundaries in BOUNDARIES]
    [[4], [3, 1], [2, 1, 1]]
    """
    check_choice(boundaries, "boundaries", BOUNDARIES)
    if boundaries == "none":
        return [grid.n_bins]
    new = grid.chrom[1:] != grid.chrom[:-1]
    if boundaries == "gap":
        new |= 2 * (grid.start[1:] - grid.end[:-1]) > grid.bin_size_bp
    edges = np.concatenate([[0], np.flatnonzero(new) + 1, [grid.n_bins]])
    return [int(n) for n in np.diff(edges)]


def nested(coarse: TrackGrid, fine: TrackGrid) -> Nesting:
    """Find the coarse bin in which each fine bin lies, and its place inside.

    The place is (start of the fine bin - start of the coarse bin) / width of a fine bin.

    Raises
    ------
    DataError
        If the width of the coarse bins is no multiple of that of the fine ones; if a fine bin does not lie inside one
        coarse bin, or does not begin a whole number of fine bins after the coarse bin. The first such bin is named.

    Examples
    --------
    >>> import pandas as pd
    >>> coarse = pd.DataFrame({"chrom": ["1", "1"], "start": [0, 10], "end": [10, 20]})
    >>> fine = pd.DataFrame({"chrom": ["1", "1", "1"], "start": [0, 5, 15], "end": [5, 10, 20]})
    >>> parent, slot, n = nested(TrackGrid.from_frame(coarse, where="c"), TrackGrid.from_frame(fine, where="f"))
    >>> parent.tolist(), slot.tolist(), n
    ([0, 0, 1], [0, 1, 1], 2)
    """
    if coarse.bin_size_bp % fine.bin_size_bp:
        message = (
            f"Bins of {fine.bin_size_bp} bp do not divide bins of {coarse.bin_size_bp} bp. "
            "Count one of the modalities in bins of another width."
        )
        raise DataError(message)
    parent = np.full(fine.n_bins, -1, dtype=np.int64)
    for chrom in np.unique(fine.chrom):
        at_fine, at_coarse = np.flatnonzero(fine.chrom == chrom), np.flatnonzero(coarse.chrom == chrom)
        found = np.searchsorted(coarse.start[at_coarse], fine.start[at_fine], side="right") - 1
        at_fine, found = at_fine[found >= 0], at_coarse[found[found >= 0]]
        inside = fine.end[at_fine] <= coarse.end[found]
        parent[at_fine[inside]] = found[inside]
    shift = fine.start - coarse.start[parent]
    for bad, cause in (
        (parent < 0, "does not lie inside one coarse bin"),
        (shift % fine.bin_size_bp != 0, f"does not begin a multiple of {fine.bin_size_bp} bp after its coarse bin"),
    ):
        if bad.any():
            at = int(np.argmax(bad))
            message = (
                f"Fine bin {at} ({fine.name(at)}) {cause}; {int(bad.sum())} of {fine.n_bins} bins are affected. "
                f"Keep only bins inside those of {coarse.bin_size_bp} bp, cut from the same starts."
            )
            raise DataError(message)
    return Nesting(parent, shift // fine.bin_size_bp, coarse.bin_size_bp // fine.bin_size_bp)


def _positions(bins: pd.DataFrame, key: str, where: str) -> np.ndarray:
    """Return a column of positions as int64."""
    import pandas as pd

    values = pd.to_numeric(bins[key].astype(object), errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    # float64 holds every whole number up to 2**53, far beyond any genome
    bad = ~np.isfinite(values) | (values != np.floor(values)) | (np.abs(values) > 2**53)
    if bad.any():
        at = int(np.argmax(bad))
        message = f"{where}['{key}'] is {bins[key].iloc[at]!r} in row {at}; a whole number of bp is needed."
        raise DataError(message)
    return values.astype(np.int64)


def _size(value: Any, where: str) -> int:
    """Return the width of bins as an int."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 1:
        message = f"The bin_size_bp of {where} is {value!r}; a whole number of bp above zero is needed."
        raise DataError(message)
    return int(value)
