"""Many experiments, files to one zarr store: biosamples by assays by bins."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from epivi._errors import ConfigError, DataError
from epivi._validate import check_choice, check_number
from epivi.pp.bulk._grid import Grid, bins_table, make_grid
from epivi.pp.bulk._pieces import Workshop, digest, locked, partial_folder, stamp
from epivi.pp.bulk._table import MEASURED, Experiments, read_table
from epivi.pp.bulk.bam import RUN_TYPES, ReadRule, count_chrom, open_bam, summarize
from epivi.pp.bulk.bigwig import TRANSFORMS, UNCOVERED, open_bigwig, read_chrom
from epivi.pp.bulk.dna import iterate_dna

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from anndata import AnnData

logger = logging.getLogger(__name__)

_DTYPES = ("uint16", "int32")
_VERSION = 1


class CountOverflowError(DataError, OverflowError):
    """A count is larger than the type of the store can hold."""


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How files become arrays.

    Parameters
    ----------
    bin_size_bp
        Width of a bin in bp.
    rule
        Which reads of BAM files are counted.
    transform, uncovered
        Of bigWig files, see `read_bigwig`.
    counts_dtype
        "uint16", or "int32" where a bin may have more than 65,535 fragments.

    Raises
    ------
    ConfigError
        If a value is not valid.

    Examples
    --------
    >>> StoreOptions(bin_size_bp=200).transform
    'arcsinh'
    """

    bin_size_bp: int = 25
    rule: ReadRule = field(default_factory=ReadRule)
    transform: str = "arcsinh"
    uncovered: str = "zero"
    counts_dtype: str = "uint16"

    def __post_init__(self) -> None:
        """Check the values."""
        check_number(self.bin_size_bp, "bin_size_bp", low=1, integer=True)
        check_choice(self.transform, "transform", TRANSFORMS)
        check_choice(self.uncovered, "uncovered", UNCOVERED)
        check_choice(self.counts_dtype, "counts_dtype", _DTYPES)


class _Job(NamedTuple):
    """What is ingested, and into which arrays."""

    experiments: Experiments
    grid: Grid
    options: StoreOptions
    fasta: Path | None
    shop: Workshop
    bar: Any

    def piece(self, chrom: str) -> slice:
        """Return where the bins of a chromosome lie."""
        offset = self.grid.offsets()[chrom]
        return slice(offset, offset + self.grid.n_bins[chrom])


def ingest(
    table: pd.DataFrame,
    store: str | Path,
    genome: str | Path | Mapping[str, int],
    *,
    options: StoreOptions | None = None,
    fasta: str | Path | None = None,
    progress: bool = True,
) -> AnnData:
    """Read BAM and bigWig files of many experiments into one zarr store, chromosome by chromosome.

    A killed call is finished by calling it again with the same arguments: what is written is kept, and the result is
    the same. Until all is written, the data are in STORE.partial, and STORE does not exist.

    Parameters
    ----------
    table
        One row for each experiment: columns biosample, assay, bam and/or bigwig (paths, empty where there is none).
        Further columns are covariates: numbers, or categories. In columns named depth, coverage, read_length or
        run_type, what is given replaces what the BAM file says.
    store
        Folder to make. If it holds the finished store of the same call, that is opened.
    genome
        As in `count_bam`.
    options
        Bin width, read rule, transform; ``StoreOptions()`` if None.
    fasta
        DNA of the genome, see `read_dna`; none is stored if None.
    progress
        Show a progress bar where there is a terminal.

    Returns
    -------
    The opened store, see `open_store`.

    Raises
    ------
    ConfigError
        If an argument is not valid, `store` is in use, or holds something else.
    DataError
        If the table is not valid, or a file cannot be used. All headers are checked before anything is written.
    CountOverflowError
        If a count does not fit ``options.counts_dtype``; it is a `DataError` and an `OverflowError`.
    MissingDependencyError
        If bigWig files are given and pyBigWig is not installed.

    Notes
    -----
    Memory is that of one chromosome of one experiment and of one shard (4 million bins), and, at the end, of the
    table of bins (9 bytes a bin).

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"biosample": ["K562"], "assay": ["DNase"], "bam": ["missing.bam"]})
    >>> ingest(table, "store.zarr", {"chr1": 1000})
    Traceback (most recent call last):
    epivi._errors.DataError: missing.bam: there is no such BAM file. Check the path.
    """
    options = StoreOptions() if options is None else options
    grid = make_grid(genome, options.bin_size_bp)
    experiments = read_table(table)
    store = Path(store)
    plan = _plan(experiments, grid, options, None if fasta is None else Path(fasta))
    if store.exists():
        _check_finished(store, plan)
        return open_store(store)
    if not store.absolute().parent.is_dir():
        message = f"{store}: there is no folder '{store.parent}'. Make it first."
        raise ConfigError(message)
    if not (partial_folder(store) / "plan.json").exists():
        _check_headers(experiments, grid)
    with locked(store):
        shop = Workshop(store, plan)
        n_pieces = sum((row.bam is not None) + (row.bigwig is not None) for row in experiments.rows) + bool(fasta)
        with _bar(n_pieces * grid.total, progress=progress) as bar:
            job = _Job(experiments, grid, options, None if fasta is None else Path(fasta), shop, bar)
            _dna(job)
            covariates = [
                _counts(job, row) if experiments.rows[row].bam else {} for row in range(len(experiments.rows))
            ]
            for row in range(len(experiments.rows)):
                _signal(job, row)
        _describe(job, covariates, digest(plan))
        shop.finish()
    return open_store(store)


def open_store(path: str | Path) -> AnnData:
    """Open a store that `ingest` made; counts, signal and DNA stay on disk.

    Parameters
    ----------
    path
        The store.

    Returns
    -------
    AnnData with biosamples (B) as obs and assays (A) as var:

    - ``X`` float32: 1 where the experiment was done, else 0;
    - ``obsm["counts"]`` zarr array (B, A, bins), uint16 or int32, fragments in each bin, if there are BAM files;
    - ``obsm["signal"]`` zarr array (B, A, bins), float32, if there are bigWig files;
    - ``obsm["availability"]`` bool (B, A), for the counts, or for the signal if there are no counts; and
      ``obsm["availability_signal"]`` if both exist and differ. Arrays are 0 where nothing is available;
    - ``obsm["depth"]``, ``["coverage"]``, ``["read_length"]`` (see `BamCounts`) and further covariates, float32
      (B, A), NaN where unknown; ``obsm["run_type"]`` and further categories, int8 codes, -1 where unknown, with
      ``uns["categories"]`` by name;
    - ``uns["bins"]`` chrom, start, end of each bin (bp, 0-based, half-open); ``uns["genome"]`` name ("" if given as
      sizes), chrom_sizes, bin_size_bp; ``uns["signal_transform"]``, ``uns["signal_uncovered"]``; ``uns["dna"]`` zarr
      array uint8 (bins * bin_size_bp,), if there is DNA.

    Raises
    ------
    DataError
        If there is no such store, it is not finished, or not one that `ingest` made.

    Notes
    -----
    The store is a plain AnnData store: ``anndata.read_zarr`` reads it into memory. Views of the opened object, such
    as ``adata[:2]``, read what they select into memory; ``adata.copy()`` needs ``adata.to_memory()`` first. For dask:
    ``dask.array.from_zarr(adata.obsm["counts"])``.

    Examples
    --------
    >>> open_store("missing.zarr")
    Traceback (most recent call last):
    epivi._errors.DataError: missing.zarr: there is no such store. Check the path.
    """
    import anndata as ad
    import zarr
    from anndata.io import read_elem

    path = Path(path)
    if not path.is_dir():
        rest = "Check the path."
        if partial_folder(path).is_dir():
            rest = "Its ingestion is not finished: call ingest with the same arguments again."
        message = f"{path}: there is no such store. {rest}"
        raise DataError(message)
    root: Any = _root(path)
    elements: dict[str, dict[str, Any]] = {
        slot: {
            key: node
            if isinstance(node, zarr.Array) and node.ndim > 0 and key in ("counts", "signal", "dna")
            else read_elem(node)
            for key, node in root[slot].members()
        }
        for slot in ("obsm", "uns")
    }
    elements["uns"]["bins"] = elements["uns"]["bins"].reset_index(drop=True)
    x_ba, obs, var = (read_elem(root[key]) for key in ("X", "obs", "var"))
    return ad.AnnData(x_ba, obs=obs, var=var, **elements)


def _root(path: Path) -> Any:
    """Return the group of a store."""
    import zarr

    try:
        root = zarr.open_group(str(path), mode="r")
        version = root.attrs["epivi-bulk-store"]
    except (FileNotFoundError, KeyError, ValueError) as error:
        message = f"{path} is no store that epivi.pp.bulk.ingest made. Check the path."
        raise DataError(message) from error
    if version != _VERSION:
        message = f"{path} has the format {version!r}, {_VERSION} is known. Make it anew with this version of epivi."
        raise DataError(message)
    return root


def _plan(experiments: Experiments, grid: Grid, options: StoreOptions, fasta: Path | None) -> dict[str, Any]:
    """Return all that decides what the store will hold."""
    if fasta is not None and not fasta.is_file():
        message = f"{fasta}: there is no such FASTA file. Check the path."
        raise DataError(message)
    covariates = {**experiments.numbers, **experiments.codes}
    return {
        "version": _VERSION,
        "genome": [grid.name, grid.sizes],
        "options": dataclasses.asdict(options),
        "biosamples": experiments.biosamples,
        "assays": experiments.assays,
        "files": [[row.biosample, row.assay, stamp(row.bam), stamp(row.bigwig)] for row in experiments.rows],
        "fasta": stamp(fasta),
        "covariates": {name: str(array.tolist()) for name, array in covariates.items()},
        "categories": experiments.categories,
    }


def _check_finished(store: Path, plan: dict[str, Any]) -> None:
    """Refuse a path that holds something else than the result of this call."""
    if not store.is_dir() or _root(store).attrs.get("epivi-plan") != digest(plan):
        message = (
            f"'{store}' holds another store: table, files, genome or options differ. Delete it, or choose another path."
        )
        raise ConfigError(message)


def _check_headers(experiments: Experiments, grid: Grid) -> None:
    """Open each file once before anything is written."""
    for row in experiments.rows:
        if row.bam is not None:
            open_bam(row.bam, grid)
        if row.bigwig is not None:
            with open_bigwig(row.bigwig, grid):
                pass


def _bar(total: int, *, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="bins", unit_scale=True, desc="Reading files", disable=None if progress else True)


def _dna(job: _Job) -> None:
    """Write the DNA of each chromosome."""
    if job.fasta is None:
        return
    width = job.grid.bin_size_bp
    array = job.shop.array("uns/dna", (job.grid.total * width,), "uint8", fill_value=4)
    places = {
        chrom: (slice(job.piece(chrom).start * width, job.piece(chrom).stop * width),) for chrom in job.grid.sizes
    }
    names = {chrom: f"dna-{number}" for number, chrom in enumerate(job.grid.sizes)}
    waiting = [chrom for chrom in job.grid.sizes if job.shop.report(names[chrom], array, places[chrom]) is None]
    job.bar.update(sum(n for chrom, n in job.grid.n_bins.items() if chrom not in waiting))
    for chrom, codes in iterate_dna(job.fasta, job.grid) if waiting else ():
        if chrom in waiting:
            job.shop.write(names[chrom], array, places[chrom], codes, {})
            job.bar.update(job.grid.n_bins[chrom])


def _counts(job: _Job, number: int) -> dict[str, Any]:
    """Write the counts of one experiment; return its covariates."""
    row, grid = job.experiments.rows[number], job.grid
    shape = len(job.experiments.biosamples), len(job.experiments.assays), grid.total
    array = job.shop.array("obsm/counts", shape, job.options.counts_dtype)
    limit = np.iinfo(job.options.counts_dtype).max
    bam, parts = None, []
    for c, chrom in enumerate(grid.sizes):
        name, at = f"counts-{number}-{c}", (row.biosample, row.assay, job.piece(chrom))
        note = job.shop.report(name, array, at)
        if note is None:
            bam = open_bam(row.bam or "", grid) if bam is None else bam
            found = count_chrom(bam, chrom, grid, job.options.rule)
            if found.counts_l.max(initial=0) > limit:
                raise CountOverflowError(_overflow(job, row.name, chrom, found.counts_l))
            note = {"totals": found.totals, "read_lengths": {str(n): k for n, k in found.read_lengths.items()}}
            job.shop.write(name, array, at, found.counts_l.astype(job.options.counts_dtype), note)
        parts.append((note["totals"], note["read_lengths"]))
        job.bar.update(grid.n_bins[chrom])
    return summarize(parts, grid, where=str(row.bam))[0]


def _overflow(job: _Job, name: str, chrom: str, counts_l: np.ndarray) -> str:
    at, width = int(counts_l.argmax()), job.grid.bin_size_bp
    return (
        f"{name}: {counts_l[at]} fragments in {chrom}:{at * width}-{(at + 1) * width}, more than "
        f"{job.options.counts_dtype} can hold. Use counts_dtype='int32', narrower bins, or a genome without '{chrom}'; "
        "then delete the folder of the unfinished store."
    )


def _signal(job: _Job, number: int) -> None:
    """Write the signal of one experiment."""
    row, grid, options = job.experiments.rows[number], job.grid, job.options
    if row.bigwig is None:
        return
    shape = len(job.experiments.biosamples), len(job.experiments.assays), grid.total
    array = job.shop.array("obsm/signal", shape, "float32")
    places = {chrom: (row.biosample, row.assay, job.piece(chrom)) for chrom in grid.sizes}
    names = {chrom: f"signal-{number}-{c}" for c, chrom in enumerate(grid.sizes)}
    waiting = [chrom for chrom in grid.sizes if job.shop.report(names[chrom], array, places[chrom]) is None]
    job.bar.update(sum(grid.n_bins[chrom] for chrom in grid.sizes if chrom not in waiting))
    if waiting:
        with open_bigwig(row.bigwig, grid) as handle:
            for chrom in waiting:
                values = read_chrom(
                    handle, chrom, grid, path=row.bigwig, transform=options.transform, uncovered=options.uncovered
                )
                job.shop.write(names[chrom], array, places[chrom], values, {})
                job.bar.update(grid.n_bins[chrom])


def _describe(job: _Job, covariates: list[dict[str, Any]], plan_digest: str) -> None:
    """Write everything that is small."""
    import pandas as pd
    from anndata.io import write_elem

    experiments, grid, root = job.experiments, job.grid, job.shop.root
    has_counts, has_signal = experiments.measured("bam"), experiments.measured("bigwig")
    arrays = {**experiments.numbers, **experiments.codes}
    for row, found in zip(experiments.rows, covariates, strict=True):
        at = row.biosample, row.assay
        for name in MEASURED if found else ():
            if np.isnan(arrays[name][at]):
                arrays[name][at] = found[name]
        if found and arrays["run_type"][at] < 0:
            arrays["run_type"][at] = RUN_TYPES.index(found["run_type"])
    arrays["availability"] = has_counts if has_counts.any() else has_signal
    if has_counts.any() and has_signal.any() and (has_counts != has_signal).any():
        arrays["availability_signal"] = has_signal
    uns = {
        "bins": bins_table(grid),
        "genome": {"name": grid.name, "chrom_sizes": grid.sizes, "bin_size_bp": grid.bin_size_bp},
        "categories": {name: np.array(levels, dtype=str) for name, levels in experiments.categories.items()},
        "signal_transform": job.options.transform,
        "signal_uncovered": job.options.uncovered,
    }
    # group by group, so that the large arrays that lie in them are not touched
    for slot, parts in (("obsm", arrays), ("uns", uns)):
        group = root.require_group(slot)
        group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        for key, part in parts.items():
            write_elem(group, key, part)
    write_elem(root, "X", (has_counts | has_signal).astype(np.float32))
    write_elem(root, "obs", pd.DataFrame(index=pd.Index(experiments.biosamples, dtype=str)))
    write_elem(root, "var", pd.DataFrame(index=pd.Index(experiments.assays, dtype=str)))
    for slot in ("layers", "varm", "obsp", "varp"):
        write_elem(root, slot, {})
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    root.attrs.update({"epivi-bulk-store": _VERSION, "epivi-plan": plan_digest})
