"""bigWig files to mean signal in bins, and back."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from epivi._errors import ConfigError, DataError, nearest, require
from epivi._validate import _some, check_choice, check_number
from epivi.pp.bulk._grid import Grid, bins_table, check_assembly, check_file, make_grid
from epivi.pp.genome.regions import chrom_sizes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import IO

    import pandas as pd

logger = logging.getLogger(__name__)

TRANSFORMS = ("arcsinh", "none")
UNCOVERED = ("zero", "nan")
_MAGIC = bytes.fromhex("26fc8f88")
# What a sound header may hold
_TREE_MAGIC, _INDEX_MAGIC = bytes.fromhex("918cca78"), bytes.fromhex("e0ac6824")
_MAX_VERSION, _MAX_ZOOMS, _MAX_NAME, _MAX_BUFFER_BYTES = 16, 32, 1024, 1 << 30
# bp read at once: 4 bytes each from the file, 8 in sums
_PIECE_BP = 1 << 22


class BigWigSignal(NamedTuple):
    """Mean signal of each bin, float32 (bins,), the bins, and how the values were made."""

    signal_l: np.ndarray
    bins: pd.DataFrame
    transform: str
    uncovered: str


def read_bigwig(
    path: str | Path,
    genome: str | Path | Mapping[str, int],
    bin_size_bp: int = 25,
    *,
    transform: str = "arcsinh",
    uncovered: str = "zero",
) -> BigWigSignal:
    """Read the mean signal of each bin from a bigWig file.

    Parameters
    ----------
    path
        The file. A chromosome of the genome that it does not have is uncovered: many writers leave out chromosomes
        without data. This is logged.
    genome, bin_size_bp
        As in `count_bam`.
    transform
        "arcsinh" of the mean, log(x + sqrt(x^2 + 1)), or "none".
    uncovered
        What a base without a value is. "zero": 0, so that the mean is over all bases of the bin. "nan": missing; the
        mean is over the covered bases, and NaN where there is none. Common readers do the latter in silence, which
        makes sparse files look stronger than they are.

    Returns
    -------
    Signal, bins, transform and uncovered, chromosomes in natural order.

    Raises
    ------
    ConfigError
        If an argument is not valid.
    DataError
        If the file is missing, no bigWig file, damaged or cut off; is of another assembly, or holds an infinite value.
    MissingDependencyError
        If pyBigWig is not installed.

    Notes
    -----
    Values are read base by base, some million at a time, and averaged as an array, which is hundreds of times as fast
    as asking for the mean of each bin.

    Examples
    --------
    >>> read_bigwig("missing.bw", {"chr1": 1000})
    Traceback (most recent call last):
    epivi._errors.DataError: missing.bw: there is no such bigWig file. Check the path.
    """
    check_choice(transform, "transform", TRANSFORMS)
    check_choice(uncovered, "uncovered", UNCOVERED)
    grid = make_grid(genome, bin_size_bp)
    signal_l = np.empty(grid.total, dtype=np.float32)
    with open_bigwig(path, grid) as handle:
        for chrom, offset in grid.offsets().items():
            part = read_chrom(handle, chrom, grid, path=path, transform=transform, uncovered=uncovered)
            signal_l[offset : offset + part.size] = part
    return BigWigSignal(signal_l, bins_table(grid), transform, uncovered)


@contextlib.contextmanager
def open_bigwig(path: str | Path, grid: Grid) -> Iterator[Any]:
    """Open a bigWig file and check that it is whole and of the genome; close it at the end.

    Raises
    ------
    DataError, MissingDependencyError
        See `read_bigwig`.
    """
    path = check_file(path, "bigWig file")
    with path.open("rb") as raw:
        first = raw.read(4)
        raw.seek(-min(4, path.stat().st_size), os.SEEK_END)
        last = raw.read(4)
    if first != _MAGIC:
        message = f"{path} is not a bigWig file: it begins with {first!r}. Give a bigWig file."
        raise DataError(message)
    if last != _MAGIC:
        message = f"{path} is cut off: it does not end as bigWig files do. Fetch or write it anew."
        raise DataError(message)
    _check_layout(path)
    bigwig = require("pyBigWig", "tracks")
    try:
        handle = bigwig.open(str(path))
    except RuntimeError as error:
        message = f"{path} is damaged: its header cannot be read ({error}). Fetch or write it anew."
        raise DataError(message) from error
    try:
        found = {name: int(size) for name, size in handle.chroms().items()}
        lacks = check_assembly(found, grid, where=str(path), may_lack=True)
        if lacks:
            logger.warning(
                "%s has no data on %d of the %d chromosomes of the genome (%s): they count as uncovered.",
                path, len(lacks), len(grid.sizes), _some(lacks),
            )  # fmt: skip
        yield handle
    finally:
        handle.close()


def _check_layout(path: Path) -> None:
    """Follow the header of a bigWig file to its tables (Kent et al. 2010, supplement), because readers may crash.

    Raises
    ------
    DataError
        If it points outside the file, or to something else.
    """
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64 + 24 * _MAX_ZOOMS).ljust(64 + 24 * _MAX_ZOOMS, b"\0")
        version, n_zooms, *tables = struct.unpack_from("<HHQQQ", head, 4)
        (buffer_bytes,) = struct.unpack_from("<I", head, 52)
        zooms = [struct.unpack_from("<QQ", head, 72 + 24 * level) for level in range(min(n_zooms, _MAX_ZOOMS))]
        summary = struct.unpack_from("<Q", head, 44)[0] or 64
        places = [*tables, summary, *(place for pair in zooms for place in pair)]
        is_sound = (
            1 <= version <= _MAX_VERSION
            and n_zooms <= _MAX_ZOOMS
            and buffer_bytes < _MAX_BUFFER_BYTES
            and all(64 <= place < n_bytes - 4 for place in places)
        )
        indexes = [(place, _INDEX_MAGIC) for place in (tables[2], *(pair[1] for pair in zooms))]
        for place, magic in [(tables[0], _TREE_MAGIC), *indexes] if is_sound else []:
            file.seek(place)
            is_sound = is_sound and file.read(4) == magic
        if is_sound:
            file.seek(tables[0] + 4)
            _, key, value, n_chroms = struct.unpack("<IIIQ", file.read(20).ljust(20, b"\0"))
            is_sound = key <= _MAX_NAME and value == 8 and n_chroms < n_bytes
        try:
            is_sound = is_sound and sorted(_chrom_ids(file, tables[0] + 32, key)) == list(range(n_chroms))
        except (struct.error, OverflowError, OSError):
            is_sound = False
    if not is_sound:
        message = f"{path} is damaged: its header does not lead to its tables. Fetch or write it anew."
        raise DataError(message)


def _chrom_ids(file: IO[bytes], place: int, key: int, depth: int = 0) -> Iterator[int]:
    """Yield the numbers of the chromosomes below a node of their tree."""
    file.seek(place)
    is_leaf, _, n_entries = struct.unpack("<BBH", file.read(4))
    entries = file.read(n_entries * (key + 8))
    for at in range(key, n_entries * (key + 8), key + 8):
        if is_leaf:
            yield struct.unpack_from("<I", entries, at)[0]
        elif depth < _MAX_VERSION:
            yield from _chrom_ids(file, struct.unpack_from("<Q", entries, at)[0], key, depth + 1)


def read_chrom(handle: Any, chrom: str, grid: Grid, *, path: str | Path, transform: str, uncovered: str) -> np.ndarray:
    """Return the mean signal of the bins of one chromosome, float32 (bins,).

    Raises
    ------
    DataError
        If the data cannot be read, or a value is infinite.
    """
    n_bins, width = grid.n_bins[chrom], grid.bin_size_bp
    mean_l = np.full(n_bins, 0.0 if uncovered == "zero" else np.nan)
    known = chrom in handle.chroms()
    step = max(1, _PIECE_BP // width)
    for low in range(0, n_bins if known else 0, step):
        high = min(low + step, n_bins)
        try:
            values = handle.values(chrom, low * width, high * width, numpy=True)
        except RuntimeError as error:
            message = f"{path}: '{chrom}' cannot be read from {low * width} bp on ({error}). Fetch the file anew."
            raise DataError(message) from error
        missing = np.isnan(values)
        values[missing] = 0
        # float64 sums: float32 loses the small values beside a high peak
        sums = values.reshape(-1, width).sum(axis=1, dtype=np.float64)
        if not np.isfinite(sums).all():
            at = int(np.flatnonzero(~np.isfinite(sums))[0]) + low
            message = f"{path}: an infinite value in {chrom}:{at * width}-{(at + 1) * width}. Write the file anew."
            raise DataError(message)
        if uncovered == "zero":
            mean_l[low:high] = sums / width
        else:
            n_covered = width - np.count_nonzero(missing.reshape(-1, width), axis=1)
            np.divide(sums, n_covered, out=mean_l[low:high], where=n_covered > 0)
    return (np.arcsinh(mean_l) if transform == "arcsinh" else mean_l).astype(np.float32)


class BigWigWriter:
    """Writes a bigWig file piece by piece; the file appears under its name when all is written.

    Use it as a context manager. If the block ends with an error, nothing is left.

    Parameters
    ----------
    path
        The file; one that is there is replaced.
    genome
        Anything that `epivi.pp.chrom_sizes` takes. Pieces must come in this order of chromosomes.
    bin_size_bp
        Width of a bin in bp.

    Raises
    ------
    ConfigError
        If the width is not a positive integer, or the folder does not exist.
    DataError
        If no value was written; see `add`.
    MissingDependencyError
        If pyBigWig is not installed.

    Examples
    --------
    >>> with BigWigWriter("track.bw", {"chr1": 1000}, 25) as writer:  # doctest: +SKIP
    ...     writer.add("chr1", np.ones(20, dtype="float32"))
    """

    def __init__(self, path: str | Path, genome: str | Path | Mapping[str, int], bin_size_bp: int) -> None:
        check_number(bin_size_bp, "bin_size_bp", low=1, integer=True)
        self.path, self.bin_size_bp = Path(path), int(bin_size_bp)
        self.sizes = chrom_sizes(genome)
        if not self.path.parent.is_dir():
            message = f"{self.path}: there is no folder '{self.path.parent}'. Make it first."
            raise ConfigError(message)
        self._part = self.path.with_name(f".{self.path.name}-{os.getpid()}-{secrets.token_hex(4)}.part")
        self._place = (0, 0)
        self._n_written = 0
        self._handle = require("pyBigWig", "tracks").open(str(self._part), "w")
        self._handle.addHeader(list(self.sizes.items()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._n_written == 0:
                message = f"{self.path}: no value was given, or NaN alone. A bigWig file needs at least one value."
                raise DataError(message)
            if self._n_written:
                self._handle.close()
            if kind is None:
                with self._part.open("rb+") as file:
                    os.fsync(file.fileno())
                self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def add(self, chrom: str, values_l: np.ndarray, start_bp: int = 0) -> None:
        """Write the values of bins that follow one another.

        Parameters
        ----------
        chrom
            Chromosome.
        values_l
            One value a bin, written as float32. NaN leaves a bin uncovered.
        start_bp
            Where the first bin begins. The last bin of a chromosome may be narrower than the others.

        Raises
        ------
        DataError
            If the chromosome is not in the genome, a piece overlaps or stands before one that is written, it ends
            behind its chromosome, or a value is infinite or beyond float32.
        """
        if chrom not in self.sizes:
            message = f"{self.path}: chromosome '{chrom}' is not in the genome. {nearest(chrom, self.sizes)}"
            raise DataError(message)
        values_l = np.asarray(values_l)
        size, width = self.sizes[chrom], self.bin_size_bp
        stop_bp = start_bp + values_l.size * width
        if values_l.ndim != 1 or start_bp < 0 or stop_bp - width >= size:
            message = (
                f"{self.path}: {values_l.shape} values from {start_bp} bp on do not fit on '{chrom}' ({size} bp, bins "
                f"of {width} bp). Give one value for each bin."
            )
            raise DataError(message)
        place = (list(self.sizes).index(chrom), start_bp)
        if place < self._place:
            message = (
                f"{self.path}: the piece {chrom}:{start_bp} stands before or in what is already written. Give pieces "
                "in the order of the genome, without overlaps."
            )
            raise DataError(message)
        self._place = (place[0], min(stop_bp, size))
        with np.errstate(over="ignore"):
            values_l = values_l.astype(np.float32)
        if np.isinf(values_l).any():
            at = start_bp + int(np.flatnonzero(np.isinf(values_l))[0]) * width
            message = (
                f"{self.path}: the value at {chrom}:{at} is infinite or beyond float32. Give finite values or NaN."
            )
            raise DataError(message)
        self._write(chrom, values_l, start_bp, size)

    def _write(self, chrom: str, values_l: np.ndarray, start_bp: int, size: int) -> None:
        """Write each run of values between NaN."""
        width = self.bin_size_bp
        edges = np.flatnonzero(np.diff(np.concatenate([[False], ~np.isnan(values_l), [False]]).astype(np.int8)))
        for low, high in edges.reshape(-1, 2).tolist():
            # a narrower last bin is an entry of its own
            narrow = start_bp + high * width > size
            whole = high - narrow
            if whole > low:
                first = start_bp + low * width
                self._handle.addEntries(chrom, first, values=values_l[low:whole], span=width, step=width)
            if narrow:
                first = start_bp + whole * width
                self._handle.addEntries([chrom], [first], ends=[size], values=values_l[whole:high])
            self._n_written += high - low


def write_bigwig(
    path: str | Path,
    genome: str | Path | Mapping[str, int],
    tracks: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    *,
    bin_size_bp: int = 25,
) -> Path:
    """Write one value a bin to a bigWig file, chromosome by chromosome.

    Parameters
    ----------
    path
        The file; one that is there is replaced once the new one is whole.
    genome
        Anything that `epivi.pp.chrom_sizes` takes.
    tracks
        Values by chromosome from its first bin on: a mapping, in any order; or pairs from a generator, in the order of
        the genome, of which only one is in memory at a time.
    bin_size_bp
        Width of a bin in bp.

    Returns
    -------
    The path.

    Raises
    ------
    ConfigError, DataError, MissingDependencyError
        See `BigWigWriter`.

    Examples
    --------
    >>> write_bigwig("track.bw", {"chr1": 1000}, {"chr1": np.ones(40)})  # doctest: +SKIP
    PosixPath('track.bw')
    """
    with BigWigWriter(path, genome, bin_size_bp) as writer:
        pairs: Iterable[tuple[str, np.ndarray]]
        if hasattr(tracks, "items"):
            order = {name: at for at, name in enumerate(writer.sizes)}
            pairs = sorted(tracks.items(), key=lambda pair: order.get(pair[0], -1))
        else:
            pairs = tracks
        for chrom, values_l in pairs:
            writer.add(chrom, values_l)
    return Path(path)
