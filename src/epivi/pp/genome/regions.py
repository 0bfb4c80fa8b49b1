"""Chromosome sizes, BED files, tiles and overlaps. Intervals are 0-based and half-open throughout."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi._validate import check_key, check_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import pandas as pd

# No position of a genome comes near this; beyond it a number is damage, and the sum of two could leave int64.
_MAX_POSITION = 1 << 40

# Primary chromosomes in natural order, bp: 1, 2, ..., X, Y, M (UCSC tables of hg38, hg19 and mm10).
_PRIMARY_BP = {
    "hg38": (
        "248956422 242193529 198295559 190214555 181538259 170805979 159345973 145138636 138394717 133797422 "
        "135086622 133275309 114364328 107043718 101991189 90338345 83257441 80373285 58617616 64444167 46709983 "
        "50818468 156040895 57227415 16569"
    ),
    "hg19": (
        "249250621 243199373 198022430 191154276 180915260 171115067 159138663 146364022 141213431 135534747 "
        "135006516 133851895 115169878 107349540 102531392 90354753 81195210 78077248 59128983 63025520 48129895 "
        "51304566 155270560 59373566 16571"
    ),
    "mm10": (
        "195471971 182113224 160039680 156508116 151834684 149736546 145441459 129401213 124595110 130694993 "
        "122082543 120129022 120421639 124902244 104043685 98207768 94987271 90702639 61431566 171031299 91744698 16299"
    ),
}


def natural_chromosome_order(names: Iterable[str]) -> list[str]:
    """Return the different chromosome names in natural order: 1, 2, ..., 22, X, Y, M, then all others by name.

    A prefix "chr" is ignored, MT stands beside M, and numbers inside the other names count as numbers.

    Examples
    --------
    >>> natural_chromosome_order(["chrM", "chr10", "chrX", "chr2", "chrUn_KI2", "chr2"])
    ['chr2', 'chr10', 'chrX', 'chrM', 'chrUn_KI2']
    """
    return sorted({str(name) for name in names}, key=_chromosome_rank)


def _chromosome_rank(name: str) -> tuple[int, int, list[tuple[int, int, str]], str]:
    stem = name[3:] if name[:3].lower() == "chr" else name
    if re.fullmatch(r"[0-9]{1,9}", stem):
        return 0, int(stem), [], name
    if (sex := {"X": 0, "Y": 1, "M": 2, "MT": 2}.get(stem.upper())) is not None:
        return 1, sex, [], name
    parts = [part for part in re.split(r"([0-9]{1,18})", stem) if part]
    return 2, 0, [(0, int(part), "") if re.fullmatch(r"[0-9]+", part) else (1, 0, part) for part in parts], name


def chrom_sizes(source: str | Path | Mapping[str, int]) -> dict[str, int]:
    """Return the length of each chromosome in bp.

    Parameters
    ----------
    source
        "hg38", "hg19" or "mm10" (primary chromosomes only, with chrM), a file with a name and a size in each line
        (plain or gzip), or a mapping, which is checked and copied.

    Returns
    -------
    Lengths by name; in the order of the file or mapping, natural for the known genomes.

    Raises
    ------
    ConfigError
        If a string is neither a known genome nor a file.
    DataError
        If a line is malformed (file and line are named), a chromosome occurs twice, or a size is not a positive whole
        number.

    Examples
    --------
    >>> chrom_sizes("hg38")["chr22"]
    50818468
    """
    sizes: dict[str, int] = {}
    if hasattr(source, "items"):
        for name, size in source.items():
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 0 < size < _MAX_POSITION:
                message = f"The size of chromosome '{name}' is {size!r}; a whole number of bp above zero is needed."
                raise DataError(message)
            sizes[str(name)] = int(size)
    elif str(source) in _PRIMARY_BP:
        lengths = [int(size) for size in _PRIMARY_BP[str(source)].split()]
        stems = [*map(str, range(1, len(lengths) - 2)), "X", "Y", "M"]
        sizes = {f"chr{stem}": length for stem, length in zip(stems, lengths, strict=True)}
    elif not Path(source).exists():
        message = f"'{source}' is neither a known genome nor a file. {nearest(str(source), _PRIMARY_BP)}"
        raise ConfigError(message)
    else:
        for place, fields in _lines(Path(source), n_fields=2):
            if fields[0] in sizes:
                message = f"{place}: chromosome '{fields[0]}' occurs a second time. Remove one of the lines."
                raise DataError(message)
            sizes[fields[0]] = _position(fields[1], "size", place)
            if sizes[fields[0]] == 0:
                message = f"{place}: the size of '{fields[0]}' is 0. Remove the line or correct the size."
                raise DataError(message)
    if not sizes:
        message = f"There is no chromosome in {source!r}. Give names and sizes."
        raise DataError(message)
    return sizes


def read_bed(path: str | Path) -> pd.DataFrame:
    """Read the intervals of a BED file, plain or gzip.

    Comments, blank lines and the lines "track" and "browser" are skipped. Fields are separated by tabs, or by blanks
    where a line has no tab.

    Returns
    -------
    Columns chrom (str), start and end (int64, bp, 0-based, half-open), in the order of the file; and name (str) if
    any line has a fourth field.

    Raises
    ------
    DataError
        If the file is missing, damaged or no text; if a line has fewer than three fields, a position which is not a
        whole number of at least zero, or a start not below its end. File and line are named.

    Examples
    --------
    >>> import os, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "two.bed"
    >>> _ = path.write_text(f"chr1 10 20{os.linesep}chr2 0 5")
    >>> read_bed(path)["end"].tolist()
    [20, 5]
    """
    import pandas as pd

    chroms, starts, ends, names = [], [], [], []
    for place, fields in _lines(Path(path), n_fields=3):
        start, end = _position(fields[1], "start", place), _position(fields[2], "end", place)
        if start >= end:
            message = f"{place}: start {start} is not below end {end}. Intervals are 0-based and half-open."
            raise DataError(message)
        chroms.append(fields[0])
        starts.append(start)
        ends.append(end)
        names.append(fields[3] if len(fields) > 3 else "")
    frame = _region_frame(np.array(chroms, dtype=object), np.array(starts), np.array(ends))
    if any(names):
        frame["name"] = pd.Series(names, dtype=object)
    return frame


def read_blacklist(path: str | Path) -> pd.DataFrame:
    """Read a BED file of regions to leave out, such as the ENCODE blacklist, in natural order.

    Returns
    -------
    As `read_bed`, ordered by chromosome, start and end.

    Raises
    ------
    DataError
        As `read_bed`, and if the file has no region.

    Examples
    --------
    >>> import os, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "blacklist.bed"
    >>> _ = path.write_text(f"chr10 10 20{os.linesep}chr2 0 5")
    >>> read_blacklist(path)["chrom"].tolist()
    ['chr2', 'chr10']
    """
    frame = read_bed(path)
    if frame.empty:
        message = f"{path} has no region. Check that it is the blacklist."
        raise DataError(message)
    return frame.iloc[_genome_order(frame)].reset_index(drop=True)


def tile(
    chrom_sizes: str | Path | Mapping[str, int], bin_size_bp: int, *, blacklist: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Cut chromosomes into bins of equal width; the last bin of each ends where its chromosome ends.

    Parameters
    ----------
    chrom_sizes
        Anything that the function `chrom_sizes` takes.
    bin_size_bp
        Width of a bin in bp.
    blacklist
        Regions; bins which overlap one of them are left out.

    Returns
    -------
    Columns chrom, start, end (bp, 0-based, half-open), chromosomes in natural order.

    Raises
    ------
    ConfigError
        If the width is not a positive integer.
    DataError
        If the sizes are not valid, or nothing is left.

    Examples
    --------
    >>> tile({"chr1": 250}, 100)["end"].tolist()
    [100, 200, 250]
    """
    check_number(bin_size_bp, "bin_size_bp", low=1, integer=True)
    sizes = _sizes_of(chrom_sizes)
    order = natural_chromosome_order(sizes)
    starts = [np.arange(0, sizes[name], bin_size_bp, dtype=np.int64) for name in order]
    ends = [np.minimum(start + bin_size_bp, sizes[name]) for start, name in zip(starts, order, strict=True)]
    chroms = np.repeat(np.array(order, dtype=object), [start.size for start in starts])
    bins = _region_frame(chroms, np.concatenate(starts), np.concatenate(ends))
    if blacklist is not None:
        bins = bins[~overlaps(bins, blacklist)].reset_index(drop=True)
        if bins.empty:
            message = f"No bin of {bin_size_bp} bp is left outside the blacklist. Use smaller bins."
            raise DataError(message)
    return bins


def peak_names(frame: pd.DataFrame) -> pd.Index:
    """Return the names ``chrom:start-end`` of a table of regions.

    Raises
    ------
    DataError
        If a column is missing.

    Examples
    --------
    >>> import pandas as pd
    >>> peak_names(pd.DataFrame({"chrom": ["chr1"], "start": [100], "end": [200]})).tolist()
    ['chr1:100-200']
    """
    import pandas as pd

    for key in (VAR_CHROM, VAR_START, VAR_END):
        check_key(frame, key, where="frame")
    columns = zip(frame[VAR_CHROM], frame[VAR_START], frame[VAR_END], strict=True)
    return pd.Index([f"{chrom}:{start}-{end}" for chrom, start, end in columns], dtype=str)


def overlaps(regions: pd.DataFrame, blacklist: pd.DataFrame) -> np.ndarray:
    """Say for each region whether it shares at least one bp with any interval of a second table.

    Parameters
    ----------
    regions, blacklist
        Columns chrom, start, end (bp, 0-based, half-open), in any order; intervals may overlap one another.

    Returns
    -------
    Boolean mask, one entry per region. With the starts and the ends of one chromosome sorted apart, the number of
    overlaps of [s, e) is (starts below e) minus (ends not above s): O((n + m) log m).

    Raises
    ------
    DataError
        If a column is missing, or if the tables share no chromosome only because one of them writes "chr" before
        the names.

    Examples
    --------
    >>> import pandas as pd
    >>> peaks = pd.DataFrame({"chrom": ["chr1", "chr1"], "start": [0, 20], "end": [10, 30]})
    >>> overlaps(peaks, pd.DataFrame({"chrom": ["chr1"], "start": [10], "end": [21]})).tolist()
    [False, True]
    """
    for frame, name in ((regions, "regions"), (blacklist, "blacklist")):
        for key in (VAR_CHROM, VAR_START, VAR_END):
            check_key(frame, key, where=name)
    chrom_r = regions[VAR_CHROM].astype(str).to_numpy(dtype=object)
    chrom_k = blacklist[VAR_CHROM].astype(str).to_numpy(dtype=object)
    _check_naming(set(chrom_r), set(chrom_k))
    start_r, end_r = regions[VAR_START].to_numpy(), regions[VAR_END].to_numpy()
    start_k, end_k = blacklist[VAR_START].to_numpy(), blacklist[VAR_END].to_numpy()
    hit_r = np.zeros(len(regions), dtype=bool)
    for name in set(chrom_k) & set(chrom_r):
        at_r, at_k = np.flatnonzero(chrom_r == name), chrom_k == name
        below_end = np.searchsorted(np.sort(start_k[at_k]), end_r[at_r], side="left")
        before_start = np.searchsorted(np.sort(end_k[at_k]), start_r[at_r], side="right")
        hit_r[at_r] = below_end > before_start
    return hit_r


def _sizes_of(source: str | Path | Mapping[str, int]) -> dict[str, int]:
    """Call `chrom_sizes` from where an argument hides its name."""
    return chrom_sizes(source)


def _region_frame(chrom: Any, start: Any, end: Any, index: Any = None) -> pd.DataFrame:
    """Build the table of regions with its fixed columns and dtypes."""
    import pandas as pd

    columns = {VAR_CHROM: chrom, VAR_START: np.asarray(start, np.int64), VAR_END: np.asarray(end, np.int64)}
    return pd.DataFrame(columns, index=index).astype({VAR_CHROM: str})


def _genome_order(regions: pd.DataFrame) -> np.ndarray:
    """Return the stable order by chromosome (natural), start and end."""
    rank = {name: i for i, name in enumerate(natural_chromosome_order(regions[VAR_CHROM].unique()))}
    chrom_rank = regions[VAR_CHROM].map(rank).to_numpy(dtype=np.int64)
    return np.lexsort((regions[VAR_END].to_numpy(), regions[VAR_START].to_numpy(), chrom_rank))


def _check_naming(ours: set[str], theirs: set[str]) -> None:
    """Refuse tables that fit only after "chr" is added or removed: otherwise nothing would overlap, in silence."""
    if ours & theirs:
        return
    if {name.removeprefix("chr") for name in ours} & {name.removeprefix("chr") for name in theirs}:
        message = (
            f"The chromosomes are named differently: '{min(ours)}' in the regions, '{min(theirs)}' in the blacklist. "
            "Add or remove the prefix 'chr' in one of them."
        )
        raise DataError(message)


def _lines(path: Path, n_fields: int) -> Iterator[tuple[str, list[str]]]:
    """Yield ('file:line', fields) of each line with content."""
    if not path.is_file():
        message = f"{path} is not a file. Check the path."
        raise DataError(message)
    number = 0
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        # the first bytes decide, not the name: files are often renamed without being packed
        with gzip.open(path, "rt", encoding="utf-8") if is_gzip else path.open(encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                text = line.strip("\r\n")
                if not text.strip() or text.startswith("#") or re.match(r"(track|browser)(\s|$)", text):
                    continue
                fields = [field.strip() for field in (text.split("\t") if "\t" in text else text.split())]
                if len(fields) < n_fields or not fields[0]:
                    message = f"{path}:{number}: {n_fields} fields are needed, found {text[:80]!r}."
                    raise DataError(message)
                yield f"{path}:{number}", fields
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        message = f"{path}:{number + 1}: the file cannot be read as text ({error}). Fetch or write it anew."
        raise DataError(message) from error


def _position(text: str, what: str, place: str) -> int:
    """Read a position in bp, or name the line that has none."""
    if not (text.isascii() and text.isdigit() and len(text) <= 15 and int(text) < _MAX_POSITION):
        message = f"{place}: {what} '{text[:40]}' is not a position: a whole number of bp from 0 on is needed."
        raise DataError(message)
    return int(text)
