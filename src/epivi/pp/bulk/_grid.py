"""The bins of a genome, chromosome after chromosome, and the comparison of a file's chromosomes with the genome's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from epivi._errors import DataError
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi._validate import _some, check_number
from epivi.pp.genome.regions import _PRIMARY_BP, chrom_sizes, natural_chromosome_order

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd


class Grid(NamedTuple):
    """Bins of one width.

    Examples
    --------
    >>> make_grid({"chr2": 260, "chr1": 150}, 100).n_bins
    {'chr1': 1, 'chr2': 2}
    """

    name: str
    sizes: dict[str, int]
    bin_size_bp: int
    n_bins: dict[str, int]

    @property
    def total(self) -> int:
        """Number of bins of all chromosomes."""
        return sum(self.n_bins.values())

    def offsets(self) -> dict[str, int]:
        """Return the number of the first bin of each chromosome."""
        ends = np.cumsum([0, *self.n_bins.values()]).tolist()
        return dict(zip(self.n_bins, ends, strict=False))


def make_grid(genome: str | Path | Mapping[str, int], bin_size_bp: int) -> Grid:
    """Cut each chromosome into bins of exactly one width; a rest at its end that is narrower is left out.

    Parameters
    ----------
    genome
        Anything that `epivi.pp.chrom_sizes` takes.
    bin_size_bp
        Width of a bin in bp.

    Returns
    -------
    Chromosomes in natural order.

    Raises
    ------
    ConfigError
        If the width is not a positive integer.
    DataError
        If the sizes are not valid, or a chromosome is shorter than one bin.

    Examples
    --------
    >>> make_grid({"chr1": 250}, 100).total
    2
    """
    check_number(bin_size_bp, "bin_size_bp", low=1, integer=True)
    sizes = chrom_sizes(genome)
    sizes = {name: sizes[name] for name in natural_chromosome_order(sizes)}
    short = [name for name, size in sizes.items() if size < bin_size_bp]
    if short:
        message = (
            f"Shorter than one bin of {bin_size_bp} bp: {_some(short)}. Leave these chromosomes out of the genome "
            "(give it as a mapping from names to sizes), or use narrower bins."
        )
        raise DataError(message)
    name = str(genome) if isinstance(genome, str) and genome in _PRIMARY_BP else ""
    return Grid(name, sizes, int(bin_size_bp), {key: size // int(bin_size_bp) for key, size in sizes.items()})


def bins_table(grid: Grid) -> pd.DataFrame:
    """Return chrom (categorical), start and end (bp, 0-based, half-open) of each bin, as small as they can be held.

    Examples
    --------
    >>> bins_table(make_grid({"chr1": 250}, 100))["end"].tolist()
    [100, 200]
    """
    import pandas as pd

    dtype = np.dtype(np.int32 if max(grid.sizes.values()) < np.iinfo(np.int32).max else np.int64)
    counts = list(grid.n_bins.values())
    start = np.concatenate([np.arange(0, n * grid.bin_size_bp, grid.bin_size_bp, dtype=dtype) for n in counts])
    codes = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    chrom = pd.Categorical.from_codes(codes, categories=pd.Index(list(grid.n_bins)))
    end = start + dtype.type(grid.bin_size_bp)
    return pd.DataFrame({VAR_CHROM: chrom, VAR_START: start, VAR_END: end})


def check_assembly(found: Mapping[str, int], grid: Grid, *, where: str, may_lack: bool = False) -> list[str]:
    """Compare the chromosomes that a file declares with those of the genome.

    Parameters
    ----------
    found
        Lengths in bp, by name, in the header of the file. More chromosomes than the genome has are fine.
    grid
        The genome.
    where
        How messages name the file.
    may_lack
        Whether the file may lack some chromosomes of the genome. All of them it may never lack.

    Returns
    -------
    The chromosomes of the genome that the file lacks.

    Raises
    ------
    DataError
        If a length differs (the genome that would fit is named where it is a known one), or a chromosome is missing.

    Examples
    --------
    >>> check_assembly({"chr1": 250, "chrM": 9}, make_grid({"chr1": 250}, 100), where="a.bam")
    []
    """
    differs = [name for name, size in grid.sizes.items() if found.get(name, size) != size]
    if differs:
        first = differs[0]
        message = (
            f"{where} is of another assembly: the length of '{first}' is {found[first]} bp in the file and "
            f"{grid.sizes[first]} bp in the genome; {len(differs)} such chromosomes.{_guess(found)} Give the genome to "
            "which the file was aligned."
        )
        raise DataError(message)
    lacks = [name for name in grid.sizes if name not in found]
    if lacks and (not may_lack or len(lacks) == len(grid.sizes)):
        stems = {name.removeprefix("chr") for name in found}
        hint = (
            " Their names differ by the prefix 'chr': name the chromosomes of the genome as the file does."
            if any(name.removeprefix("chr") in stems for name in lacks)
            else " Give as genome a mapping from the wanted chromosomes to their sizes."
        )
        message = (
            f"{where} lacks {len(lacks)} of the {len(grid.sizes)} chromosomes of the genome: {_some(lacks)}. It has "
            f"{_some(found)}.{hint}"
        )
        raise DataError(message)
    return lacks


def _guess(found: Mapping[str, int]) -> str:
    """Name the known genome whose chromosome lengths the file has."""
    for genome in _PRIMARY_BP:
        sizes = chrom_sizes(genome)
        shared = [name for name in found if name in sizes]
        if shared and all(found[name] == sizes[name] for name in shared):
            return f" The file looks like {genome}."
    return ""


def check_file(path: str | Path, what: str) -> Path:
    """Return the path of a file that is there and holds something.

    Raises
    ------
    DataError
        If it is missing, a folder, or empty.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as handle:
    ...     _ = handle.write(b"x"), handle.flush()
    ...     check_file(handle.name, "BAM file").is_file()
    True
    """
    path = Path(path)
    if not path.is_file():
        message = f"{path}: there is no such {what}. Check the path."
        raise DataError(message)
    if path.stat().st_size == 0:
        message = f"{path} is empty, a {what} is needed. Fetch or write it anew."
        raise DataError(message)
    return path
