"""Runs of contiguous bins, their split into training and held-out parts, and the windows of inference."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np

from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi._validate import _some, check_key, check_number
from epivi._validate_regions import parse_region
from epivi.data.tracks.grids import TrackGrid

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

logger = logging.getLogger(__name__)

HELD_OUT_SHARE: Final = 0.1
CROP_SHARE: Final = 0.1


class Run(NamedTuple):
    """Bins that follow one another without a gap: ``n_bins`` bins from bin ``first``, which begins at ``start_bp``."""

    chrom: str
    first: int
    n_bins: int
    start_bp: int

    @property
    def stop(self) -> int:
        """Bin after the last one."""
        return self.first + self.n_bins


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of contiguous bins in the order of the bins.

    Attributes
    ----------
    chrom
        Chromosome of each run, text, shape (r,).
    first, n_bins
        First bin and number of bins, int64, shape (r,).
    start_bp
        Where the first bin begins, int64, shape (r,).
    bin_size_bp
        Width of every bin.
    """

    chrom: np.ndarray
    first: np.ndarray
    n_bins: np.ndarray
    start_bp: np.ndarray
    bin_size_bp: int

    def __len__(self) -> int:
        return self.first.size

    def __iter__(self) -> Iterator[Run]:
        for chrom, *numbers in zip(self.chrom, self.first, self.n_bins, self.start_bp, strict=True):
            yield Run(str(chrom), *map(int, numbers))

    @property
    def stop(self) -> np.ndarray:
        """Bin after the last one of each run, shape (r,)."""
        return self.first + self.n_bins

    @property
    def total(self) -> int:
        """Number of bins."""
        return int(self.n_bins.sum())

    @property
    def chromosomes(self) -> list[str]:
        """Names of the chromosomes, each once, in the order of the bins."""
        return list(dict.fromkeys(map(str, self.chrom)))

    def of(self, bins: np.ndarray) -> np.ndarray:
        """Return the number of the run that holds each bin, -1 where none does.

        Examples
        --------
        >>> import pandas as pd
        >>> bins = pd.DataFrame({"chrom": ["1", "1", "2"], "start": [0, 10, 0], "end": [10, 20, 10]})
        >>> runs(bins).of(np.array([0, 1, 2, 3])).tolist()
        [0, 0, 1, -1]
        """
        if not len(self):
            return np.full(np.shape(bins), -1)
        at = np.searchsorted(self.first, bins, side="right") - 1
        return np.where((at >= 0) & (bins < self.stop[at]), at, -1)

    def name(self, at: int) -> str:
        """Return ``chrom:start-end`` of one bin."""
        run = int(self.of(np.array([at]))[0])
        start = int(self.start_bp[run] + (at - self.first[run]) * self.bin_size_bp)
        return f"{self.chrom[run]}:{start}-{start + self.bin_size_bp}"

    def take(self, which: np.ndarray) -> Self:
        """Return some of the runs, chosen by a mask or by increasing numbers."""
        parts = (self.chrom[which], self.first[which], self.n_bins[which], self.start_bp[which])
        return type(self)(*parts, self.bin_size_bp)

    def between(self, low: int, high: int) -> Self:
        """Return the parts of the runs that lie within the bins from ``low`` up to ``high``."""
        first, stop = np.maximum(self.first, low), np.minimum(self.stop, high)
        start_bp = self.start_bp + (first - self.first) * self.bin_size_bp
        return type(self)(self.chrom, first, stop - first, start_bp, self.bin_size_bp).take(stop > first)

    def of_chromosomes(self, names: Sequence[str]) -> Self:
        """Return the runs of some chromosomes."""
        return self.take(np.isin(self.chrom, np.array(list(names), dtype=np.str_)))

    def region(self, region: Any) -> Self:
        """Return the parts of the runs whose bins overlap a region, such as ``chr1:1,000-2,000`` or a chromosome.

        Raises
        ------
        ConfigError
            If the region cannot be read.
        DataError
            If no bin overlaps it.
        """
        if isinstance(region, str) and region in self.chrom:
            return self.of_chromosomes([region])
        chrom, start, end = parse_region(region)
        on = self.of_chromosomes([chrom])
        low = np.maximum((start - on.start_bp) // on.bin_size_bp, 0)
        high = np.minimum(-((on.start_bp - end) // on.bin_size_bp), on.n_bins)
        keep = high > low
        if not keep.any():
            message = f"No bin overlaps {chrom}:{start}-{end}. The bins lie on {_some(self.chromosomes)}."
            raise DataError(message)
        parts = on.chrom, on.first + low, high - low, on.start_bp + low * on.bin_size_bp
        return type(self)(*parts, on.bin_size_bp).take(keep)

    def state(self) -> dict[str, Any]:
        """Return arrays and numbers, as the registry keeps them, with a hash of the bins."""
        parts = (self.first, self.n_bins, self.start_bp)
        data = b"".join(part.astype("<i8").tobytes() for part in parts)
        digest = sha256("\n".join(self.chrom).encode() + data + str(self.bin_size_bp).encode()).hexdigest()
        names = ("first", "n_bins", "start_bp")
        numbers = dict(zip(names, parts, strict=True))
        return {VAR_CHROM: self.chrom, **numbers, "bin_size_bp": self.bin_size_bp, "hash": digest}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Build the runs from what :meth:`state` returned."""
        first, n_bins, start_bp = (np.asarray(state[key], dtype=np.int64) for key in ("first", "n_bins", "start_bp"))
        return cls(np.asarray(state[VAR_CHROM], dtype=np.str_), first, n_bins, start_bp, int(state["bin_size_bp"]))


def runs(bins: Any, *, where: str = "bins") -> Runs:
    """Find the runs of contiguous bins: a run ends where its chromosome ends, and at a gap.

    Parameters
    ----------
    bins
        Table with the columns chrom, start, end (bp, 0-based, half-open), all bins of one width. A grid of tracks
        (:class:`epivi.data.tracks.grids.TrackGrid`) is taken too.
    where
        How messages name it.

    Raises
    ------
    DataError
        If it is no valid table of bins (see :meth:`epivi.data.tracks.grids.TrackGrid.from_frame`), or widths differ;
        the first such bin is named.

    Examples
    --------
    >>> import pandas as pd
    >>> bins = pd.DataFrame({"chrom": ["1", "1", "1", "2"], "start": [0, 10, 40, 0], "end": [10, 20, 50, 10]})
    >>> [(run.chrom, run.first, run.n_bins) for run in runs(bins)]
    [('1', 0, 2), ('1', 2, 1), ('2', 3, 1)]
    """
    import pandas as pd

    if isinstance(bins, TrackGrid):
        bins = pd.DataFrame({VAR_CHROM: bins.chrom.astype(object), VAR_START: bins.start, VAR_END: bins.end})
    if not hasattr(bins, "columns") or len(bins) == 0:
        TrackGrid.from_frame(bins, where=where)
    for key in (VAR_CHROM, VAR_START, VAR_END):
        check_key(bins, key, where=where)
    if any(bins[key].dtype.kind not in "iu" for key in (VAR_START, VAR_END)) or bins[VAR_CHROM].isna().any():
        grid = TrackGrid.from_frame(bins, where=where)
        bins = pd.DataFrame({VAR_CHROM: bins[VAR_CHROM], VAR_START: grid.start, VAR_END: grid.end})
    start, end = (bins[key].to_numpy().astype(np.int64, copy=False) for key in (VAR_START, VAR_END))
    # names of chromosomes as numbers: a table of a whole genome has 10^8 rows
    code, names = pd.factorize(bins[VAR_CHROM])
    other = code[1:] != code[:-1]
    head = np.concatenate([[0], np.flatnonzero(other) + 1])
    in_order = (start[1:] >= end[:-1]) | other
    if head.size > len(names) or not in_order.all() or (start < 0).any() or (end <= start).any():
        TrackGrid.from_frame(bins, where=where)
    width = int(end[0] - start[0])
    odd = (end - start) != width
    if odd.any():
        at = int(np.argmax(odd))
        message = (
            f"{where}: bin {at} ({bins[VAR_CHROM].iloc[at]}:{start[at]}-{end[at]}) is {end[at] - start[at]} bp wide, "
            f"the first bin {width} bp; {int(odd.sum())} bins differ. All bins need one width: leave out the narrower "
            "rests at the ends of chromosomes together with their values."
        )
        raise DataError(message)
    first = np.concatenate([[0], np.flatnonzero(other | (start[1:] != end[:-1])) + 1]).astype(np.int64)
    chrom = np.array([str(names[at]) for at in code[first]], dtype=np.str_)
    return Runs(chrom, first, np.diff(np.append(first, start.size)), start[first], width)


@dataclass(frozen=True)
class GenomeSplit:
    """The bins to train on, to validate on and to leave for tests; no run belongs to two of them."""

    train: Runs
    validation: Runs
    test: Runs


def split_chromosomes(
    found: Runs, window: int, *, validation: Sequence[str] | None = None, test: Sequence[str] | None = None
) -> GenomeSplit:
    """Split bins into those for training, validation and tests, by chromosome.

    Chromosomes that are given win. By default none is for tests, and for validation the smallest chromosomes with
    room for a window are held out until they hold 10 % of the bins that are not for tests. Where only one
    chromosome has that room, its last 10 % of bins are held out, or one window if that is more and half of the
    chromosome or less. What was chosen is logged.

    Parameters
    ----------
    found
        All runs.
    window
        Bins of a window.
    validation, test
        Names of chromosomes; an empty list holds none out.

    Raises
    ------
    ConfigError
        If a name is unknown, named for both, or nothing is left to train on.

    Examples
    --------
    >>> import pandas as pd
    >>> bins = pd.DataFrame({"chrom": ["1"] * 18 + ["2"] * 2, "start": [*range(18), 0, 1]})
    >>> parts = split_chromosomes(runs(bins.assign(end=bins["start"] + 1)), 2)
    >>> parts.train.chromosomes, parts.validation.chromosomes
    (['1'], ['2'])
    """
    names = found.chromosomes
    given = {"validation_chroms": validation, "test_chroms": test}
    for name, chosen in given.items():
        check_chromosomes(chosen, names, name=name)
    if both := sorted(set(validation or ()) & set(test or ())):
        message = f"{_some(both)} is named in validation_chroms and in test_chroms. Name each chromosome once."
        raise ConfigError(message)
    tested = found.of_chromosomes(test or ())
    rest = found.of_chromosomes([name for name in names if name not in (test or ())])
    if validation is not None:
        held = rest.of_chromosomes(validation)
        train = rest.of_chromosomes([name for name in rest.chromosomes if name not in validation])
    elif len(rest):
        train, held = _hold_out(rest, window)
    else:
        train = held = rest
    if not len(train):
        message = f"No chromosome is left to train on: the bins lie on {_some(names)}. Hold out fewer of them."
        raise ConfigError(message)
    return GenomeSplit(train, held, tested)


def _hold_out(rest: Runs, window: int) -> tuple[Runs, Runs]:
    """Return the default training and validation runs."""
    sizes = {name: rest.of_chromosomes([name]) for name in rest.chromosomes}
    large = [name for name, part in sizes.items() if part.n_bins.max() >= window] or list(sizes)
    if len(large) > 1:
        chosen: list[str] = []
        for name in sorted(large, key=lambda name: sizes[name].total)[:-1]:
            chosen.append(name)
            if sum(sizes[one].total for one in chosen) >= HELD_OUT_SHARE * rest.total:
                break
        held = rest.of_chromosomes(chosen)
        logger.info("Validation on %s: %.1f %% of the bins.", chosen, 100 * held.total / rest.total)
        return rest.of_chromosomes([name for name in sizes if name not in chosen]), held
    only = sizes[large[0]]
    n_held = int(np.ceil(round(HELD_OUT_SHARE * only.total, 6)))
    n_held = max(n_held, window) if only.total >= 2 * window else n_held
    # bins of a chromosome are neighbours in the table, so that its last bins are counted back from its end
    behind = np.cumsum(only.n_bins[::-1])[::-1]
    at = int(np.flatnonzero(behind >= n_held)[-1])
    cut = int(only.stop[at] - (n_held - (behind[at] - only.n_bins[at])))
    held = only.between(cut, int(only.stop[-1]))
    logger.info("Validation on the last %d of the %d bins of '%s'.", held.total, only.total, large[0])
    train = [part for name, part in sizes.items() if name != large[0]] + [only.between(0, cut)]
    keep = np.argsort(np.concatenate([part.first for part in train]), kind="stable")
    chrom, first, n_bins, start_bp = (
        np.concatenate([getattr(part, key) for part in train]) for key in ("chrom", "first", "n_bins", "start_bp")
    )
    return Runs(chrom, first, n_bins, start_bp, rest.bin_size_bp).take(keep), held


def check_chromosomes(chosen: Any, known: Sequence[str], *, name: str) -> None:
    """Check a list of chromosomes that the user gave.

    Raises
    ------
    ConfigError
        If it is no list of names, or a name is unknown.

    Examples
    --------
    >>> check_chromosomes(["chr1"], ["chr1", "chr2"], name="test_chroms")
    """
    if chosen is None:
        return
    if isinstance(chosen, str) or not all(isinstance(entry, str) for entry in chosen):
        message = f"{name}={chosen!r} is not valid: give a list of names of chromosomes."
        raise ConfigError(message)
    for entry in chosen:
        if entry not in known:
            message = f"{name} names '{entry}', which has no bin. {nearest(entry, known)}"
            raise ConfigError(message)


class Tiling(NamedTuple):
    """Windows of inference and the bins to keep of each, all int64, shape (w,).

    Attributes
    ----------
    starts
        First bin of each window.
    crop_from, crop_to
        Bins to keep of each window, half-open, counted like ``starts``.
    """

    starts: np.ndarray
    crop_from: np.ndarray
    crop_to: np.ndarray


def tile(run: Run, window: int, overlap: int | None = None) -> Tiling:
    """Cover a run with overlapping windows, of which the middles are kept, so that each bin is kept once.

    Half of the overlap is cropped at each side. At the ends of the run the window is kept to its edge; the last window
    is shifted to the left so that it ends with the run. A run shorter than a window is one window, which is padded.

    Parameters
    ----------
    run
        What to cover.
    window
        Bins of a window.
    overlap
        Bins that neighbouring windows share; ``None``: twice 10 % of the window.

    Raises
    ------
    ConfigError
        If ``window`` is not positive, or ``overlap`` not below it.

    Examples
    --------
    >>> [part.tolist() for part in tile(Run("chr1", 100, 25, 0), 10)]
    [[100, 108, 115], [100, 109, 117], [109, 117, 125]]
    """
    check_number(window, "window", low=1, integer=True)
    if overlap is None:
        overlap = 2 * int(CROP_SHARE * window)
    check_number(overlap, "overlap", low=0, high=window, high_inclusive=False, integer=True)
    last = max(run.first, run.stop - window)
    starts = np.append(np.arange(run.first, last, window - overlap), last).astype(np.int64)
    crop_to = starts + window - overlap // 2
    crop_to[-1] = run.stop
    return Tiling(starts, np.concatenate([[run.first], crop_to[:-1]]), crop_to)
