"""FASTA files to codes of bases: 0-3 = A, C, G, T; 4 = anything else."""

from __future__ import annotations

import gzip
import zlib
from typing import TYPE_CHECKING, Final

import numpy as np

from epivi._errors import DataError
from epivi._validate import _some
from epivi.pp.bulk._grid import Grid, check_file, make_grid

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_CHUNK_BYTES: Final = 1 << 22
_MAX_HEADER_BYTES: Final = 1 << 16
_BAD, _SKIP = 255, 254


def _table() -> np.ndarray:
    """Return the code of each byte: letters of bases, letters that stand for several bases, line ends, the rest."""
    codes = np.full(256, _BAD, dtype=np.uint8)
    for letters in (b"ACGT", b"acgt"):
        codes[list(letters)] = np.arange(4)
    codes[[ord("U"), ord("u")]] = 3
    codes[list(b"RYSWKMBDHVNXryswkmbdhvnx-.*")] = 4
    codes[list(b"\n\r \t")] = _SKIP
    return codes


_CODES: Final = _table()


def read_dna(path: str | Path, genome: str | Path | Mapping[str, int], bin_size_bp: int = 25) -> dict[str, np.ndarray]:
    """Read the bases under the bins of each chromosome of a genome.

    Parameters
    ----------
    path
        FASTA, plain, gzip or bgzip. No index is needed and none is written. Other sequences in it are passed over.
    genome, bin_size_bp
        As in `count_bam`: bases in a narrower rest at the end of a chromosome are left out, as is their bin.

    Returns
    -------
    uint8 codes by chromosome, (bins * bin_size_bp,), chromosomes in natural order: 0-3 = A, C, G, T (U is read as T;
    lower case, as in masked repeats, counts like upper case); 4 = N and every other letter for several bases.

    Raises
    ------
    ConfigError
        If the width is not valid.
    DataError
        If the file is missing, no FASTA file, damaged or cut off; if a chromosome is missing, occurs twice or has
        another length than in the genome; if a character stands for no base.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.fa"
    >>> _ = path.write_text(">chr1 some text" + chr(10) + "ACgtN" + chr(10) + "RA")
    >>> read_dna(path, {"chr1": 7}, bin_size_bp=3)["chr1"].tolist()
    [0, 1, 2, 3, 4, 4]
    """
    grid = make_grid(genome, bin_size_bp)
    found = dict(iterate_dna(path, grid))
    return {chrom: found[chrom] for chrom in grid.sizes}


def iterate_dna(path: str | Path, grid: Grid) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each chromosome of the genome and its codes, in the order of the file, one at a time.

    Raises
    ------
    DataError
        See `read_dna`.
    """
    path = check_file(path, "FASTA file")
    seen: set[str] = set()
    everything: list[str] = []
    codes, size = np.empty(0, dtype=np.uint8), 0
    name = ""
    for header, text in _records(path):
        if header is not None:
            if name in grid.sizes:
                yield name, _whole(path, name, codes, size, grid)
            name, size = header, 0
            everything.append(name)
            if name in seen:
                message = f"{path}: the sequence '{name}' occurs twice. Remove one of them."
                raise DataError(message)
            if name in grid.sizes:
                seen.add(name)
                codes = np.empty(grid.sizes[name], dtype=np.uint8)
        elif name in grid.sizes:
            part = _encode(text, path, name, size)
            # a sequence that is too long is counted to its end, for the message
            room = codes[size : size + part.size]
            room[:] = part[: room.size]
            size += part.size
    if name in grid.sizes:
        yield name, _whole(path, name, codes, size, grid)
    lacks = [chrom for chrom in grid.sizes if chrom not in seen]
    if lacks:
        message = (
            f"{path} lacks {len(lacks)} of the {len(grid.sizes)} chromosomes of the genome: {_some(lacks)}. It has "
            f"{_some(everything)}. Give the FASTA file of the genome, with the same names."
        )
        raise DataError(message)


def _whole(path: Path, name: str, codes: np.ndarray, size: int, grid: Grid) -> np.ndarray:
    if size != grid.sizes[name]:
        message = (
            f"{path}: '{name}' has {size} bases, {grid.sizes[name]} bp in the genome. Give the FASTA file of this "
            "assembly, or fetch it anew if it is cut off."
        )
        raise DataError(message)
    return codes[: grid.n_bins[name] * grid.bin_size_bp]


def _encode(text: bytes, path: Path, name: str, size: int) -> np.ndarray:
    """Return the codes of a piece of sequence."""
    codes = _CODES[np.frombuffer(text, dtype=np.uint8)]
    codes = codes[codes != _SKIP]
    if (codes == _BAD).any():
        at = int(np.flatnonzero(codes == _BAD)[0])
        letter = [byte for byte in text if _CODES[byte] != _SKIP][at]
        message = f"{path}: base {size + at + 1} of '{name}' is {chr(letter)!r}, no letter for bases. Repair the file."
        raise DataError(message)
    return codes


def _records(path: Path) -> Iterator[tuple[str | None, bytes]]:
    """Yield (name, b"") for each header and (None, text) for pieces of the sequence after it."""
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    started = False
    try:
        with gzip.open(path, "rb") if is_gzip else path.open("rb") as handle:
            while chunk := handle.read(_CHUNK_BYTES):
                # up to a line end, so that no header is cut; a sequence may be one long line
                chunk += handle.readline(_MAX_HEADER_BYTES)
                at = 0
                while at < len(chunk):
                    head = chunk.find(b">", at)
                    stop = head if head >= 0 else len(chunk)
                    if chunk[at:stop].strip():
                        if not started:
                            message = f"{path} is not a FASTA file: it begins with {chunk[:20]!r}, a '>' is needed."
                            raise DataError(message)
                        yield None, chunk[at:stop]
                    at = stop
                    if head >= 0:
                        started = True
                        end = chunk.find(b"\n", head)
                        at = end if end >= 0 else len(chunk)
                        fields = chunk[head + 1 : at].split()
                        yield (fields[0].decode("latin-1") if fields else ""), b""
    except (EOFError, OSError, zlib.error) as error:
        message = f"{path} is damaged or cut off: it cannot be read to its end ({error}). Fetch it anew."
        raise DataError(message) from error
