"""BAM files to counts of fragments in bins."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from epivi._errors import ConfigError, DataError
from epivi._validate import check_choice, check_number
from epivi.pp.bulk._bgzf import _REINDEX, BamFile
from epivi.pp.bulk._grid import Grid, bins_table, check_assembly, make_grid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd

logger = logging.getLogger(__name__)

# unmapped, secondary, QC-fail, duplicate, supplementary
_EXCLUDED_FLAGS = 0x4 | 0x100 | 0x200 | 0x400 | 0x800
RUN_TYPES = ("single", "paired")


@dataclass(frozen=True, kw_only=True)
class ReadRule:
    """Which reads are counted, and where: each fragment once, in the bin of its midpoint (start + end) // 2.

    - A proper pair (flags 1 and 2, both mates on one chromosome, template length given) is one fragment, from the
      leftmost start of its mates over the template length. It is counted through its first mate (the one without flag
      128), whose flags and mapping quality decide; the second mate is never counted.
    - A single-end read is a fragment from the first to the last base of its alignment, or, with `fragment_bp`, one of
      this length from its 5' end on. A midpoint outside the chromosome is moved to its first or last base.

    Parameters
    ----------
    min_mapq
        Lowest mapping quality. 255 (not available) passes, as in samtools.
    exclude_flags
        Reads with any of these flags are left out. Unmapped ones always are.
    fragment_bp
        Length to which single-end reads are extended, for example twice the shift at which the strands
        correlate best. None: the alignment itself.
    improper
        Mates that are not a proper pair (one unmapped, on other chromosomes, in an unusual orientation): "drop", or
        "count" them as a single-end read through the first mate, or the second where the first one is unmapped.
    keep
        Share of the fragments to keep, in (0, 1]. A fragment is kept if a hash of its read name, the positions of its
        mates and `seed` lies below the share: mates go together, the order of the file does not matter, and what a
        smaller share keeps is part of what a larger one keeps. The positions count because some files have lost
        their names; without them, such a file would be kept or dropped as a whole.
    seed
        Seed of the thinning.

    Raises
    ------
    ConfigError
        If a value is out of its range.

    Examples
    --------
    >>> ReadRule(min_mapq=30).exclude_flags == 0x4 | 0x100 | 0x200 | 0x400 | 0x800
    True
    """

    min_mapq: int = 0
    exclude_flags: int = _EXCLUDED_FLAGS
    fragment_bp: int | None = None
    improper: str = "drop"
    keep: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        check_number(self.min_mapq, "min_mapq", low=0, high=255, integer=True)
        check_number(self.exclude_flags, "exclude_flags", low=0, high=0xFFF, integer=True)
        if self.fragment_bp is not None:
            check_number(self.fragment_bp, "fragment_bp", low=1, high=1_000_000, integer=True)
        check_choice(self.improper, "improper", ["drop", "count"])
        check_number(self.keep, "keep", low=0, high=1, low_inclusive=False)
        check_number(self.seed, "seed", low=0, high=2**63 - 1, integer=True)


class ChromCounts(NamedTuple):
    """Counts of one chromosome, int32 (bins,), and what its covariates are made of."""

    counts_l: np.ndarray
    totals: dict[str, int]
    read_lengths: dict[int, int]


@dataclass(frozen=True)
class BamCounts:
    """Counts of one experiment.

    Attributes
    ----------
    counts_l
        int32, one entry a bin.
    bins
        chrom, start, end (bp, 0-based, half-open).
    covariates
        depth: fragments counted; coverage: share of the bins with at least one; read_length: median length in bases of
        the reads through which they were counted; run_type: "paired" if most of them are proper pairs, else "single".
    totals
        Records of the chromosomes of the genome, and how many of them were left out for which reason; the first that
        applies counts, in this order: unmapped, secondary, supplementary, qc_fail, duplicate, flagged (other flags in
        `exclude_flags`), low_mapq, improper, mates (second mates of counted fragments), thinned, outside (in the rest
        at the end of a chromosome that is narrower than a bin); counted, how many of these are paired, and how many
        bins are covered.
    """

    counts_l: np.ndarray
    bins: pd.DataFrame
    covariates: dict[str, Any]
    totals: dict[str, int]


def count_bam(
    path: str | Path,
    genome: str | Path | Mapping[str, int],
    bin_size_bp: int = 25,
    *,
    rule: ReadRule | None = None,
    depth: int | None = None,
) -> BamCounts:
    """Count the fragments of an indexed BAM file in bins along the genome.

    Parameters
    ----------
    path
        File sorted by position, with its index (.bai or .csi) beside it.
    genome
        Anything that `epivi.pp.chrom_sizes` takes: "hg38", "hg19", "mm10", a file of sizes, or a mapping, which may
        name some of the chromosomes only. Others in the file are passed over.
    bin_size_bp
        Width of a bin in bp. A rest at the end of a chromosome that is narrower is left out, so that all bins are of
        one width.
    rule
        Which reads are counted; ``ReadRule()`` if None.
    depth
        Thin the fragments to about this number: each is kept with probability depth / (number without thinning), so
        that the number kept is binomial. The file is read twice. In place of ``rule.keep``.

    Returns
    -------
    Counts, bins, covariates and totals, chromosomes in natural order.

    Raises
    ------
    ConfigError
        If an argument is not valid, or both `depth` and ``rule.keep`` are given.
    DataError
        If the file is missing, no BAM file, damaged or cut off; has no index, or that of another file; is of another
        assembly; is not sorted; has no fragment to count, or fewer than `depth`.

    Notes
    -----
    Memory is that of the counts and some MB. The first call compiles the parser, which takes some seconds; the result
    is kept on disk. With the package isal, which the extra `tracks` installs, files are inflated twice as fast.

    Examples
    --------
    >>> count_bam("missing.bam", {"chr1": 1000})
    Traceback (most recent call last):
    epivi._errors.DataError: missing.bam: there is no such BAM file. Check the path.
    """
    rule = ReadRule() if rule is None else rule
    grid = make_grid(genome, bin_size_bp)
    if depth is not None:
        check_number(depth, "depth", low=1, integer=True)
        if rule.keep < 1:
            message = f"Both depth={depth} and keep={rule.keep} are given. Give one of them."
            raise ConfigError(message)
    bam = open_bam(path, grid)
    if depth is not None:
        total = sum(count_chrom(bam, chrom, grid, rule).totals["counted"] for chrom in grid.sizes)
        if total < depth:
            message = f"{path} has {total} fragments to count, fewer than depth={depth}. Choose a smaller depth."
            raise DataError(message)
        rule = dataclasses.replace(rule, keep=depth / total)
    counts_l = np.zeros(grid.total, dtype=np.int32)
    parts = []
    for chrom, offset in grid.offsets().items():
        part = count_chrom(bam, chrom, grid, rule)
        counts_l[offset : offset + part.counts_l.size] = part.counts_l
        parts.append((part.totals, part.read_lengths))
    covariates, totals = summarize(parts, grid, where=str(path))
    logger.info("%s: %d fragments of %d records counted.", path, totals["counted"], totals["records"])
    return BamCounts(counts_l, bins_table(grid), covariates, totals)


def open_bam(path: str | Path, grid: Grid) -> BamFile:
    """Open a BAM file and check that it is whole, indexed and of the genome.

    Raises
    ------
    DataError
        See `count_bam`.
    """
    bam = BamFile(path)
    check_assembly(bam.lengths, grid, where=str(bam.path))
    if all(bam.span(chrom) is None for chrom in grid.sizes):
        message = f"{bam.path} has no reads on the chromosomes of the genome. Check that it was aligned and indexed."
        raise DataError(message)
    return bam


def count_chrom(bam: BamFile, chrom: str, grid: Grid, rule: ReadRule) -> ChromCounts:
    """Count the fragments of one chromosome.

    Raises
    ------
    DataError
        If the records are damaged, not sorted, or not those that the index describes.
    """
    from epivi.pp.bulk import _bam_kernels as bk

    counts = np.zeros(grid.n_bins[chrom], dtype=np.int32)
    lengths, state = np.zeros(bk.MAX_LENGTH, dtype=np.int64), np.zeros(bk.N_STATE, dtype=np.int64)
    state[bk.LAST_POS] = -1
    settings = np.zeros(bk.N_RULE, dtype=np.int64)
    settings[[bk.CHROM, bk.WIDTH, bk.SIZE]] = bam.number(chrom), grid.bin_size_bp, grid.sizes[chrom]
    settings[[bk.MIN_MAPQ, bk.EXCLUDE, bk.FRAGMENT]] = rule.min_mapq, rule.exclude_flags, rule.fragment_bp or 0
    settings[[bk.COUNT_IMPROPER, bk.THIN]] = rule.improper == "count", rule.keep < 1
    seed, threshold = np.uint64(rule.seed), np.uint64(min(int(rule.keep * 2.0**64), 2**64 - 1))
    rest, span = b"", bam.span(chrom)
    for piece in bam.pieces(span) if span is not None else ():
        text = rest + piece if rest else piece
        state[bk.POSITION] = 0
        status = bk.count_records(
            np.frombuffer(text, dtype=np.uint8), counts, lengths, state, settings, seed, threshold
        )
        if status != bk.DONE:
            raise DataError(_refused(bam, chrom, status, int(state[bk.N_RECORDS])))
        rest = text[state[bk.POSITION] :]
    n_records = int(state[bk.N_RECORDS])
    if rest or (span is not None and span.n_records not in (-1, n_records)):
        expected = span.n_records if span is not None else 0
        message = (
            f"{bam.path} has {n_records} records on '{chrom}', its index says {expected}: the index is of another "
            f"version of the file. {_REINDEX}"
        )
        raise DataError(message)
    found = np.flatnonzero(lengths)
    totals = {name: int(state[at]) for name, at in _totals(bk).items()} | {"covered": int(np.count_nonzero(counts))}
    return ChromCounts(counts, totals, dict(zip(found.tolist(), lengths[found].tolist(), strict=True)))


def _totals(bk: Any) -> dict[str, int]:
    """Return where the compiled parser keeps each total."""
    return {
        name[2:].lower(): getattr(bk, name)
        for name in dir(bk)
        if name.startswith("N_") and name not in ("N_STATE", "N_RULE")
    }


def _refused(bam: BamFile, chrom: str, status: int, n_records: int) -> str:
    """Say why the parser stopped."""
    from epivi.pp.bulk import _bam_kernels as bk

    place = f"{bam.path}: record {n_records + 1} of '{chrom}'"
    if status == bk.BAD:
        return f"{place} is damaged. Fetch or write the file anew, and index it."
    if status == bk.BEYOND:
        return f"{place} begins outside the chromosome ({bam.lengths[chrom]} bp). The file is damaged: align anew."
    if status == bk.UNSORTED:
        return f"{place} stands before its place. Sort and index the file: samtools sort, samtools index."
    return f"{place} is of another chromosome: the index is of another version of the file. {_REINDEX}"


def summarize(
    parts: list[tuple[dict[str, int], dict[int, int]]], grid: Grid, *, where: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """Sum the totals of chromosomes and make the covariates of the experiment.

    Parameters
    ----------
    parts
        Totals and read lengths of each chromosome.
    grid
        The bins.
    where
        How a message names the file.

    Raises
    ------
    DataError
        If no fragment was counted.
    """
    totals = {name: sum(part[name] for part, _ in parts) for name in parts[0][0]}
    if totals["counted"] == 0:
        reasons = ", ".join(f"{name} {n}" for name, n in totals.items() if n and name != "records")
        message = (
            f"{where}: none of {totals['records']} records is counted ({reasons or 'there are none'}). Check the read "
            "rule and the genome."
        )
        raise DataError(message)
    lengths: dict[int, int] = {}
    for _, found in parts:
        for length, n in found.items():
            lengths[int(length)] = lengths.get(int(length), 0) + n
    order = sorted(lengths)
    median = order[int(np.searchsorted(np.cumsum([lengths[size] for size in order]), totals["counted"] / 2))]
    covariates = {
        "depth": totals["counted"],
        "coverage": totals["covered"] / grid.total,
        "read_length": median,
        "run_type": RUN_TYPES[int(2 * totals["paired"] > totals["counted"])],
    }
    return covariates, totals
