"""Genes from BED and GTF files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from epivi._errors import DataError
from epivi._validate import check_choice
from epivi.pp.genome.regions import _lines, _position, _region_frame

if TYPE_CHECKING:
    import pandas as pd

_STRANDS = ("+", "-", ".")
_ATTRIBUTE = re.compile(r'(?<!\w)(gene_name|gene_id)\s+(?:"([^"]*)"|([^\s;"]+))\s*(?:;|$)')


def read_genes(path: str | Path, *, file_format: str = "auto", feature: str = "gene") -> pd.DataFrame:
    """Read the positions of genes from a BED or a GTF file, plain or gzip.

    Parameters
    ----------
    path
        BED with four or more columns (chrom, start, end, name, score, strand, ...) or GTF (nine columns).
    file_format
        "bed", "gtf" or "auto": GTF if the name of the file has ".gtf" or ".gff2" in it, else BED.
    feature
        Third column of the GTF rows to read. The name is the attribute gene_name, or gene_id where that is missing.

    Returns
    -------
    Columns chrom, start, end (bp, 0-based, half-open, also from GTF, which counts from 1 and includes its end), name,
    strand ("+", "-" or "." where not given), in the order of the file.

    Raises
    ------
    ConfigError
        If `file_format` is not known.
    DataError
        If the file is missing, damaged or no text, has no gene, or has a line with too few fields, a position that is
        none, an empty interval, a strand other than + - . or no name. File and line are named.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "genes.gtf"
    >>> row = ["chr1", "x", "gene", "11", "20", ".", "-", ".", 'gene_id "E1"; gene_name "ACTB";']
    >>> _ = path.write_text(chr(9).join(row))
    >>> gene = read_genes(path).iloc[0]
    >>> gene["name"], int(gene["start"]), int(gene["end"]), gene["strand"]
    ('ACTB', 10, 20, '-')
    """
    check_choice(file_format, "file_format", ["auto", "bed", "gtf"])
    path = Path(path)
    is_gtf = file_format == "gtf" or (file_format == "auto" and re.search(r"\.(gtf|gff2)\b", path.name.lower()))
    rows = _gtf(path, feature) if is_gtf else _bed(path)
    if not rows:
        what = f"GTF row with the feature '{feature}'" if is_gtf else "BED line"
        message = f"{path} has no {what}. Check the file, its format and the feature."
        raise DataError(message)
    chrom, start, end, name, strand = zip(*rows, strict=True)
    frame = _region_frame(np.array(chrom, dtype=object), start, end)
    frame["name"] = np.array(name, dtype=object)
    frame["strand"] = np.array(strand, dtype=object)
    return frame.astype({"name": str, "strand": str})


def _bed(path: Path) -> list[tuple[str, int, int, str, str]]:
    rows = []
    for place, fields in _lines(path, n_fields=4):
        start, end = _position(fields[1], "start", place), _position(fields[2], "end", place)
        strand = fields[5] if len(fields) > 5 else "."
        _check(place, start, end, fields[3], strand)
        rows.append((fields[0], start, end, fields[3], strand))
    return rows


def _gtf(path: Path, feature: str) -> list[tuple[str, int, int, str, str]]:
    rows = []
    for place, fields in _lines(path, n_fields=9):
        if fields[2] != feature:
            continue
        start, end = _position(fields[3], "start", place), _position(fields[4], "end", place)
        if start == 0:
            message = f"{place}: the start is 0, but GTF counts from 1. Check that this is a GTF file."
            raise DataError(message)
        # a quoted value may hold a semicolon, so attributes are searched, not split
        found = {match[1]: match[2] or match[3] or "" for match in _ATTRIBUTE.finditer(fields[8])}
        name = found.get("gene_name") or found.get("gene_id") or ""
        _check(place, start - 1, end, name, fields[6])
        rows.append((fields[0], start - 1, end, name, fields[6]))
    return rows


def _check(place: str, start: int, end: int, name: str, strand: str) -> None:
    """Refuse an empty interval, an unknown strand and a missing name."""
    if start >= end:
        message = f"{place}: the gene is empty, [{start}, {end}) from 0. Correct or remove the line."
        raise DataError(message)
    if strand not in _STRANDS:
        message = f"{place}: the strand '{strand[:40]}' is none of + - . Correct or remove the line."
        raise DataError(message)
    if not name:
        message = f"{place}: the gene has no name (column 4 of BED, gene_name or gene_id of GTF). Give it one."
        raise DataError(message)
