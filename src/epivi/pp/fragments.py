"""Fragment files to cells by bins."""

from __future__ import annotations

import codecs
import gzip
import logging
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from epivi._errors import ConfigError, DataError
from epivi._keys import OBS_N_FRAGMENTS, UNS_FRAGMENTS, VAR_CHROM, VAR_START
from epivi._validate import _some, check_choice, check_number
from epivi.pp.genome.regions import (
    _PRIMARY_BP,
    _lines,
    chrom_sizes,
    natural_chromosome_order,
    peak_names,
    read_blacklist,
    tile,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import IO

    import pandas as pd
    import scipy.sparse as sp
    from anndata import AnnData
    from mudata import MuData

logger = logging.getLogger(__name__)

# Bytes of text read at once
_CHUNK_BYTES = 1 << 22
_MAX_LINE_BYTES = 1 << 16
# The empty block at the end of every whole bgzip file (SAM specification, 4.1.2)
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


class _Grid(NamedTuple):
    """The bins, and how a position finds its column."""

    bins: pd.DataFrame
    sizes: dict[str, int]
    width: int
    genome: str
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray]


class _Options(NamedTuple):
    barcodes: list[str] | None
    min_fragments: int
    rule: str
    unknown_chroms: str


class _Tally(NamedTuple):
    """What one pass over a file found."""

    matrix: sp.csr_matrix
    barcodes: list[str]
    n_fragments: np.ndarray
    chroms: dict[str, int]
    totals: dict[str, int]


def fragments(
    source: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    genome: str | Path | Mapping[str, int],
    *,
    bin_size_bp: int = 10_000,
    blacklist: pd.DataFrame | str | Path | None = None,
    barcodes: str | Path | Iterable[str] | None = None,
    min_fragments: int = 1,
    count: str = "fragments",
    unknown_chroms: str = "skip",
) -> AnnData | MuData:
    """Count the fragments of each cell in bins along the genome.

    A fragment file has 4 to 6 columns separated by tabs: chromosome, start, end (bp, 0-based, half-open), barcode,
    read support, strand. It may be plain text, gzip or bgzip; an index is not needed, lines need not be sorted, lines
    that begin with ``#`` and blank lines are passed over, and so is a byte order mark (UTF-8) at the start. A line
    counts as one fragment, whatever its read support.

    Parameters
    ----------
    source
        One file; or one file a modality, as a mapping from the name of the modality, or as a list, whose modalities
        are named after the files.
    genome
        Anything that `epivi.pp.chrom_sizes` takes: "hg38", "hg19", "mm10", a file of sizes or a mapping.
    bin_size_bp
        Width of a bin in bp; the last bin of a chromosome ends where the chromosome ends.
    blacklist
        Regions, or their BED file; bins that overlap one are left out.
    barcodes
        Barcodes to count, or a file with one in the first column of each line. All if None.
    min_fragments
        Cells with fewer fragments are left out. With 0, a barcode of the whitelist that the file lacks is a cell
        without counts.
    count
        "fragments": a fragment is counted once, in the bin of its midpoint (start + end) // 2. "insertions": each of
        its two cut sites is counted, start in its bin and end - 1 in its bin, also if that is the same bin.
    unknown_chroms
        What to do with fragments on chromosomes that `genome` does not have: "skip" counts and reports them, "error"
        stops at the first.

    Returns
    -------
    For one file an AnnData with

    - ``X`` csr_matrix of int32 counts, cells by bins; cells in the order of `barcodes`, else sorted by name;
    - ``obs`` n_fragments: fragments on the known chromosomes, in bins that the blacklist leaves out too;
    - ``var`` chrom, start, end of all bins, chromosomes in natural order, and names ``chr1:0-10000``;
    - ``uns["fragments"]`` file, genome ("" if given as sizes), bin_size_bp, count, and how many n_lines,
      n_fragments (of the cells that were kept), n_unknown_chrom, n_other_barcodes (not in the whitelist),
      n_below_min (of barcodes below `min_fragments`), n_blacklisted (counts, not fragments), n_unsorted (lines that
      stand before their place) the file has; unknown_chroms and unknown_chrom_fragments by name; n_missing_barcodes
      of the whitelist.

    For a list or mapping, a MuData with such an AnnData for each modality, all on the same bins; a cell that a file
    lacks is missing from this modality. The names of bins begin there with the name of the modality.

    Raises
    ------
    ConfigError
        If an argument is not valid, or two files of a list give the same name.
    DataError
        If a file is missing, empty, damaged or cut off (for bgzip also at the end of a block; for text if the last line
        has no line end and fewer fields than the line before, else a log message warns); if a line does not
        have the form above, has a negative start or an end that is not above its start, or ends beyond its
        chromosome (file, line and content are named); if no fragment lies on a known chromosome, none has a barcode
        of the whitelist, or no cell has `min_fragments`.

    Notes
    -----
    The file is read once, in pieces. Memory is that of the non-zero counts (of all barcodes, where no whitelist is
    given) and of one piece. The first call compiles the parser, which takes some seconds; the result is kept on disk.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "fragments.tsv"
    >>> rows = ["chr1 0 90 AAA 1", "chr1 80 140 AAA 3", "chr1 110 130 CCC 1"]
    >>> _ = path.write_text("".join(row.replace(" ", chr(9)) + chr(10) for row in rows))
    >>> adata = fragments(path, {"chr1": 250}, bin_size_bp=100)
    >>> adata.obs_names.tolist(), adata.X.toarray().tolist()
    (['AAA', 'CCC'], [[1, 1, 0], [0, 1, 0]])
    """
    check_number(bin_size_bp, "bin_size_bp", low=1, integer=True)
    check_number(min_fragments, "min_fragments", low=0, integer=True)
    check_choice(count, "count", ["fragments", "insertions"])
    check_choice(unknown_chroms, "unknown_chroms", ["skip", "error"])
    files = _files(source)
    grid = _grid(genome, int(bin_size_bp), blacklist)
    options = _Options(_whitelist(barcodes), int(min_fragments), count, unknown_chroms)
    if not isinstance(files, dict):
        return _read(files, grid, options)
    from mudata import MuData

    parts = {name: _read(path, grid, options) for name, path in files.items()}
    for name, part in parts.items():
        # mudata needs names that differ between modalities; the positions are in the columns
        part.var_names = [f"{name}:{region}" for region in part.var_names]
    return MuData(parts)


def _files(source: Any) -> Path | dict[str, Path]:
    """Return the file, or the files by modality."""
    if isinstance(source, str | Path):
        return Path(source)
    if isinstance(source, Mapping):
        files = {str(name): Path(path) for name, path in source.items()}
    else:
        paths = [Path(path) for path in source]
        files = {}
        for path in paths:
            name = re.sub(r"([._-]?fragments)?(\.(tsv|bed|txt))?(\.(b?gz))?$", "", path.name) or path.name
            if name in files:
                message = (
                    f"'{files[name]}' and '{path}' both give the modality name '{name}'. Pass a mapping from names "
                    "to files."
                )
                raise ConfigError(message)
            files[name] = path
    if not files:
        message = "There is no fragment file in the list. Give at least one."
        raise ConfigError(message)
    return files


def _grid(genome: str | Path | Mapping[str, int], width: int, blacklist: pd.DataFrame | str | Path | None) -> _Grid:
    """Cut the genome into bins and number them."""
    sizes = chrom_sizes(genome)
    sizes = {name: sizes[name] for name in natural_chromosome_order(sizes)}
    if isinstance(blacklist, str | Path):
        blacklist = read_blacklist(blacklist)
    bins = tile(sizes, width, blacklist=blacklist)
    sizes_c = np.fromiter(sizes.values(), dtype=np.int64)
    first_tile_c = np.concatenate([[0], np.cumsum(-(-sizes_c // width))])
    number = {name: i for i, name in enumerate(sizes)}
    chrom_l = bins[VAR_CHROM].map(number).to_numpy(dtype=np.int64)
    column = np.full(first_tile_c[-1], -1, dtype=np.int32)
    column[first_tile_c[chrom_l] + bins[VAR_START].to_numpy() // width] = np.arange(len(bins))
    # pandas hands out the entries of a column of objects several times as fast as those of a column of strings
    bins.index = peak_names(bins.astype({VAR_CHROM: object}))
    known = str(genome) if isinstance(genome, str) and genome in _PRIMARY_BP else ""
    return _Grid(bins, sizes, width, known, (sizes_c, first_tile_c, column))


def _whitelist(barcodes: Any) -> list[str] | None:
    """Return the wanted barcodes as a list."""
    if barcodes is None:
        return None
    where = "barcodes"
    if isinstance(barcodes, str | Path):
        where = str(barcodes)
        names = [fields[0] for _, fields in _lines(Path(barcodes), n_fields=1)]
    else:
        names = list(barcodes)
        odd = [name for name in names if not isinstance(name, str)]
        if odd:
            message = f"A barcode must be a string, found {odd[0]!r} ({type(odd[0]).__name__})."
            raise ConfigError(message)
    if not names:
        message = f"{where} has no barcode. Give at least one, or barcodes=None to count all."
        raise DataError(message)
    return names


def _read(path: Path, grid: _Grid, options: _Options) -> AnnData:
    """Count one file."""
    import pandas as pd
    from anndata import AnnData

    tally = _count(path, grid, options)
    totals = tally.totals
    unknown = {name: n for name, n in tally.chroms.items() if name not in grid.sizes}
    _check_found(path, tally, grid, options)
    names = np.array(tally.barcodes, dtype=object)
    keep = np.flatnonzero(tally.n_fragments >= options.min_fragments)
    if options.barcodes is None:
        keep = keep[np.argsort(names[keep].astype(str), kind="stable")]
    if keep.size == 0:
        message = (
            f"{path}: no cell has {options.min_fragments} fragments; the largest number is {tally.n_fragments.max()}. "
            "Lower min_fragments."
        )
        raise DataError(message)
    if unknown:
        logger.warning(
            "%s: %d of %d fragments lie on %d chromosomes that the genome does not have (%s) and are left out.",
            path, totals["n_unknown_chrom"], totals["n_lines_used"], len(unknown), _some(unknown),
        )  # fmt: skip
    n_kept = int(tally.n_fragments[keep].sum())
    report = {
        "file": str(path),
        "genome": grid.genome,
        "bin_size_bp": grid.width,
        "count": options.rule,
        "n_lines": totals["n_lines"],
        "n_fragments": n_kept,
        "n_unknown_chrom": totals["n_unknown_chrom"],
        "n_other_barcodes": totals["n_other_barcodes"],
        "n_below_min": totals["n_accepted"] - n_kept,
        "n_blacklisted": totals["n_blacklisted"],
        "n_unsorted": totals["n_unsorted"],
        "unknown_chroms": np.array(list(unknown), dtype=str),
        "unknown_chrom_fragments": np.array(list(unknown.values()), dtype=np.int64),
        "n_missing_barcodes": 0 if options.barcodes is None else int((tally.n_fragments == 0).sum()),
    }
    logger.info("%s: %d fragments of %d cells in %d bins.", path, n_kept, keep.size, len(grid.bins))
    obs = pd.DataFrame({OBS_N_FRAGMENTS: tally.n_fragments[keep]}, index=names[keep].astype(str))
    return AnnData(tally.matrix[keep], obs=obs, var=grid.bins.copy(), uns={UNS_FRAGMENTS: report})


def _check_found(path: Path, tally: _Tally, grid: _Grid, options: _Options) -> None:
    """Refuse a file of which nothing can be used."""
    totals = tally.totals
    if totals["n_lines_used"] == 0:
        message = f"{path} has no fragment ({totals['n_lines']} lines). Check that it was written to its end."
        raise DataError(message)
    if totals["n_unknown_chrom"] == totals["n_lines_used"]:
        found = [name for name, n in tally.chroms.items() if n and name not in grid.sizes]
        message = (
            f"{path}: no fragment lies on a chromosome of the genome. The file has {_some(found)}, the genome "
            f"{_some(grid.sizes)}. Give the genome of the file, with the same names."
        )
        raise DataError(message)
    if totals["n_accepted"] == 0 and options.barcodes is not None:
        message = (
            f"{path}: no fragment has one of the {len(options.barcodes)} barcodes of the whitelist, such as "
            f"'{options.barcodes[0]}'. Compare their form with column 4 of the file (a suffix '-1', a sample name?)."
        )
        raise DataError(message)


def _count(path: Path, grid: _Grid, options: _Options) -> _Tally:
    """Read a file from end to end."""
    from epivi.pp import _fragment_kernels as fk

    chroms = fk.Names(list(grid.sizes), room=len(grid.sizes) + 64)
    cells = fk.Names(options.barcodes or [], room=1 << 14 if options.barcodes is None else 0)
    if cells.repeated >= 0:
        message = (
            f"The barcode '{(options.barcodes or [])[cells.repeated]}' stands twice in the whitelist. Give it once."
        )
        raise DataError(message)
    n_names = np.array([len(grid.sizes), len(options.barcodes or [])], dtype=np.int64)
    on_chrom, on_cell = (np.zeros(table.room, dtype=np.int64) for table in (chroms, cells))
    state = np.zeros(fk.N_STATE, dtype=np.int64)
    state[fk.LAST_CHROM] = -1
    is_strict = options.unknown_chroms == "error"
    n_columns = len(grid.bins)
    flags = (
        grid.width,
        n_columns,
        int(options.rule == "insertions"),
        int(options.barcodes is not None),
        int(is_strict),
    )
    sums = fk.Sums()
    before = b""
    with _open(path) as handle:
        while (text := _next_lines(handle, path, int(state[fk.LINE]), before)) is not None:
            before = text
            buf = np.frombuffer(text, dtype=np.uint8)
            # no line with a fragment is shorter than eight bytes
            keys = np.empty(buf.size // 4 + 2, dtype=np.int64)
            state[fk.POSITION], status = 0, -1
            while status != fk.DONE:
                args = (chroms.table, cells.table, grid.arrays, (n_names, on_chrom, on_cell), keys, state, flags)
                status = fk.parse_lines(buf, *args)
                sums.add(keys[: state[fk.N_KEYS]])
                if status == fk.GROW_CHROMS:
                    on_chrom = np.pad(on_chrom, (0, chroms.grow(int(n_names[0])) - on_chrom.size))
                elif status == fk.GROW_CELLS:
                    on_cell = np.pad(on_cell, (0, cells.grow(int(n_names[1])) - on_cell.size))
                elif status == fk.BAD:
                    line = text[state[fk.POSITION] : text.index(b"\n", state[fk.POSITION])]
                    raise DataError(fk.diagnose(f"{path}:{state[fk.LINE] + 1}", line, grid.sizes, is_strict=is_strict))
    totals = {
        "n_lines": fk.LINE,
        "n_accepted": fk.ACCEPTED,
        "n_unknown_chrom": fk.UNKNOWN,
        "n_other_barcodes": fk.OTHER,
        "n_blacklisted": fk.DROPPED,
        "n_unsorted": fk.UNSORTED,
    }
    totals = {name: int(state[at]) for name, at in totals.items()}
    totals["n_lines_used"] = int(on_chrom.sum())
    try:
        chrom_names, barcodes = chroms.decode(int(n_names[0])), cells.decode(int(n_names[1]))
    except UnicodeDecodeError as error:
        message = f"{path}: a chromosome or barcode is no UTF-8 text ({error}). Check that it is a fragment file."
        raise DataError(message) from error
    matrix = sums.matrix(len(barcodes), n_columns)
    by_chrom = dict(zip(chrom_names, on_chrom.tolist(), strict=False))
    return _Tally(matrix, barcodes, on_cell[: len(barcodes)], by_chrom, totals)


def _open(path: Path) -> IO[bytes]:
    """Open a file for reading its text; the first bytes decide whether it is packed, not the name."""
    if not path.is_file():
        message = f"{path} is not a file. Check the path."
        raise DataError(message)
    with path.open("rb") as raw:
        head = raw.read(16)
        raw.seek(max(0, path.stat().st_size - len(_BGZF_END)))
        tail = raw.read()
    if not head:
        message = f"{path} is empty. Fetch or write it anew."
        raise DataError(message)
    if not head.startswith(b"\x1f\x8b"):
        return path.open("rb")
    if len(head) == 16 and head[3] & 4 and head[12:14] == b"BC" and tail != _BGZF_END:
        message = (
            f"{path} is cut off: it lacks the block that ends a bgzip file. Fetch it anew; if you are sure that it is "
            "whole, pack it again."
        )
        raise DataError(message)
    return gzip.open(path, "rb")  # type: ignore[return-value]


def _next_lines(handle: IO[bytes], path: Path, n_lines: int, before: bytes) -> bytes | None:
    """Return some whole lines after those of `before`, the last with a line end; None at the end of the file."""
    try:
        text = handle.read(_CHUNK_BYTES)
        if text and not text.endswith(b"\n"):
            text += handle.readline(_MAX_LINE_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        message = f"{path}: the file is damaged or cut off after line {n_lines} ({error}). Fetch or write it anew."
        raise DataError(message) from error
    if not text:
        return None
    if not before:
        text = text.removeprefix(codecs.BOM_UTF8) or b"\n"
    if not text.endswith(b"\n"):
        if len(text) - text.rfind(b"\n") > _MAX_LINE_BYTES:
            message = f"{path}: a line after line {n_lines} has no end. Check that it is a fragment file."
            raise DataError(message)
        _check_last(path, before[-2 * _MAX_LINE_BYTES :] + text[-2 * _MAX_LINE_BYTES :])
        text += b"\n"
    return text


def _check_last(path: Path, text: bytes) -> None:
    """Look whether a last line without line end is cut off: it has fewer fields than the line before."""
    last_two = [line for line in text.splitlines()[-2:] if line and not line.startswith(b"#")]
    n_fields = [line.count(b"\t") + 1 for line in last_two]
    if len(last_two) == 2 and n_fields[1] < n_fields[0]:
        message = (
            f"{path} is cut off: its last line has no line end and {n_fields[1]} fields, the line before it "
            f"{n_fields[0]}. The line is {last_two[1].decode(errors='replace')[:120]!r}. Fetch or write the file anew."
        )
        raise DataError(message)
    logger.warning("%s: the last line has no line end. If the file was cut off there, fetch or write it anew.", path)
