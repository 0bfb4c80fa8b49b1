"""BAM files as bytes: blocks, header, index. See the SAM/BAM and CSI specifications (hts-specs), sections 4 and 5."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from epivi._errors import DataError
from epivi.pp.bulk._grid import check_file

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path
    from typing import IO

# The empty block at the end of every whole BGZF file (SAM specification, 4.1.2)
_END_BLOCK: Final = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_HEAD, _TAIL = 18, 8
# Blocks inflated by one task, and tasks in flight: two threads overlap with the parser, more than that it cannot use
_BLOCKS_PER_TASK, _N_THREADS, _N_AHEAD = 32, 2, 4


class Span(NamedTuple):
    """Where the records of one chromosome lie: virtual offsets, and how many there are (-1: not known)."""

    start: int
    end: int
    n_records: int


class BamFile:
    """An indexed BAM file, checked before its records are read.

    Parameters
    ----------
    path
        The file; its index is FILE.bai, FILE.csi or the name with .bai in place of .bam.

    Attributes
    ----------
    lengths
        Length in bp of each chromosome, in the order of the header.

    Raises
    ------
    DataError
        If the file is missing, no BAM file, cut off or damaged, or its index is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = check_file(path, "BAM file")
        self._inflate = _inflater()
        self.n_bytes = self.path.stat().st_size
        with self.path.open("rb") as handle:
            _check_ends(handle, self.path, self.n_bytes)
        self.lengths = self._header()
        self._spans = read_index(_index_of(self.path), len(self.lengths))

    def number(self, chrom: str) -> int:
        """Return the number of a chromosome in the records."""
        return list(self.lengths).index(chrom)

    def span(self, chrom: str) -> Span | None:
        """Return where the records of a chromosome lie, None if it has none."""
        return self._spans[self.number(chrom)]

    def pieces(self, span: Span) -> Iterator[bytes]:
        """Yield the bytes of the records of one chromosome, some MB at a time, cut anywhere.

        Raises
        ------
        DataError
            If a block is damaged, or the index points outside the file.
        """
        last, stop = span.end >> 16, span.end & 0xFFFF
        if (span.start >> 16) >= self.n_bytes or last > self.n_bytes:
            message = f"{self.path}: the index points behind the end of the file. {_REINDEX}"
            raise DataError(message)
        skip = span.start & 0xFFFF
        blocks = self._blocks(span.start >> 16, last if stop else last - 1)
        for address, data in self._inflated(blocks):
            # `data` ends with the block at `address`, which is the last one if that is where the span ends
            yield data[skip : len(data) - (address[1] - stop) if stop and address[0] == last else None]
            skip = 0

    def _inflated(self, blocks: Iterator[tuple[int, bytes]]) -> Iterator[tuple[tuple[int, int], bytes]]:
        """Yield ((address, inflated size) of the last block of a batch, all its bytes), in order."""
        with ThreadPoolExecutor(_N_THREADS) as pool:
            waiting: deque = deque()
            try:
                while True:
                    while len(waiting) < _N_AHEAD and (batch := list(islice(blocks, _BLOCKS_PER_TASK))):
                        waiting.append(pool.submit(self._inflate_all, batch))
                    if not waiting:
                        return
                    yield waiting.popleft().result()
            finally:
                for task in waiting:
                    task.cancel()

    def _inflate_all(self, batch: list[tuple[int, bytes]]) -> tuple[tuple[int, int], bytes]:
        parts = [inflate_block(block, self._inflate, self.path, address) for address, block in batch]
        return (batch[-1][0], len(parts[-1])), b"".join(parts)

    def _blocks(self, first: int, last: int) -> Generator[tuple[int, bytes]]:
        """Yield (address, bytes) of the blocks from address `first` to address `last`."""
        with self.path.open("rb", buffering=1 << 20) as handle:
            handle.seek(first)
            address = first
            while address <= last:
                head = handle.read(_HEAD)
                size = block_size(head, self.path, address)
                rest = handle.read(size - _HEAD)
                if len(rest) != size - _HEAD:
                    raise DataError(_damaged(self.path, address))
                yield address, head + rest
                address += size

    def _header(self) -> dict[str, int]:
        """Read names and lengths of the chromosomes."""
        blocks = self._blocks(0, self.n_bytes - 1 - len(_END_BLOCK))
        stream = (inflate_block(block, self._inflate, self.path, address) for address, block in blocks)
        text = bytearray()

        def need(n_bytes: int) -> None:
            while len(text) < n_bytes:
                if (more := next(stream, None)) is None:
                    message = f"{self.path}: the header is cut off. Fetch or write the file anew."
                    raise DataError(message)
                text.extend(more)

        need(8)
        if text[:4] != b"BAM\1":
            message = f"{self.path} is compressed as BAM files are, but has no BAM header. Give a BAM file."
            raise DataError(message)
        at = 8 + struct.unpack_from("<I", text, 4)[0]
        need(at + 4)
        n_chroms = struct.unpack_from("<I", text, at)[0]
        at += 4
        lengths: dict[str, int] = {}
        for _ in range(n_chroms):
            need(at + 4)
            n_name = struct.unpack_from("<I", text, at)[0]
            need(at + 8 + n_name)
            name = bytes(text[at + 4 : at + 3 + n_name]).decode("latin-1")
            lengths[name] = struct.unpack_from("<I", text, at + 4 + n_name)[0]
            at += 8 + n_name
        blocks.close()
        if len(lengths) != n_chroms or not lengths:
            message = (
                f"{self.path}: the header names {n_chroms} chromosomes, {len(lengths)} of them different. Repair it."
            )
            raise DataError(message)
        return lengths


_REINDEX: Final = "Write the index anew: samtools index FILE.bam (the file must be sorted by position)."


def _damaged(path: Path, address: int) -> str:
    return f"{path} is damaged: the block at byte {address} cannot be read. Fetch or write the file anew."


def _inflater() -> Callable[[bytes], bytes]:
    """Return the function that inflates raw deflate data: isal's, twice as fast, or that of the standard library."""
    try:
        from isal import isal_zlib
    except ImportError:
        return lambda data: zlib.decompress(data, -15, 65536)

    def inflate(data: bytes) -> bytes:
        try:
            return isal_zlib.decompress(data, -15, 65536)
        except isal_zlib.IsalError as error:  # type: ignore[misc]
            raise zlib.error(str(error)) from error

    return inflate


def block_size(head: bytes, path: Path, address: int) -> int:
    """Return the size of a block in bytes from its first 18 bytes.

    Examples
    --------
    >>> block_size(_END_BLOCK[:18], "a.bam", 0)
    28
    """
    if len(head) < _HEAD or head[:4] != b"\x1f\x8b\x08\x04" or head[10:16] != b"\x06\x00BC\x02\x00":
        raise DataError(_damaged(path, address))
    size = struct.unpack_from("<H", head, 16)[0] + 1
    if size < _HEAD + _TAIL:
        raise DataError(_damaged(path, address))
    return int(size)


def inflate_block(block: bytes, inflate: Callable[[bytes], bytes], path: Path, address: int) -> bytes:
    """Return the content of a block, checked against its checksum and its size.

    Examples
    --------
    >>> inflate_block(_END_BLOCK, _inflater(), "a.bam", 0)
    b''
    """
    try:
        data = inflate(block[_HEAD:-_TAIL])
    except zlib.error as error:
        raise DataError(_damaged(path, address)) from error
    checksum, size = struct.unpack_from("<II", block, len(block) - _TAIL)
    if len(data) != size or zlib.crc32(data) != checksum:
        raise DataError(_damaged(path, address))
    return data


def _check_ends(handle: IO[bytes], path: Path, n_bytes: int) -> None:
    """Refuse what is no BAM file, and one without its last block."""
    magic = handle.read(4)
    if magic[:4] == b"CRAM":
        message = f"{path} is a CRAM file. Convert it: samtools view -b -T GENOME.fa FILE.cram > FILE.bam."
        raise DataError(message)
    if magic != b"\x1f\x8b\x08\x04":
        message = (
            f"{path} is not a BAM file: it begins with {magic!r}. Convert SAM text with samtools sort -o FILE.bam."
        )
        raise DataError(message)
    handle.seek(max(0, n_bytes - len(_END_BLOCK)))
    if handle.read() != _END_BLOCK:
        message = f"{path} is cut off: it has no end-of-file block ({n_bytes} bytes). Fetch or write the file anew."
        raise DataError(message)


def _index_of(path: Path) -> Path:
    """Return the index that stands beside a BAM file."""
    candidates = [path.with_name(path.name + ".bai"), path.with_suffix(".bai"), path.with_name(path.name + ".csi")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    message = f"{path} has no index ({candidates[0].name} or {candidates[2].name} beside it). {_REINDEX}"
    raise DataError(message)


def read_index(path: Path, n_chroms: int) -> list[Span | None]:
    """Read where the records of each chromosome lie from a BAI or CSI index.

    Parameters
    ----------
    path
        The index.
    n_chroms
        Number of chromosomes in the header of the BAM file.

    Returns
    -------
    One span a chromosome; None where there are no records.

    Raises
    ------
    DataError
        If the index is damaged, or of another file.
    """
    raw = path.read_bytes()
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        if raw[:4] == b"BAI\1":
            depth, at, n_loffset = 5, 4, 0
        elif raw[:4] == b"CSI\1":
            depth, n_aux = struct.unpack_from("<8xii", raw, 0)
            at, n_loffset = 16 + n_aux, 8
        else:
            message = f"{path} is not an index: it begins with {raw[:4]!r}. {_REINDEX}"
            raise DataError(message)
        (n_found,) = struct.unpack_from("<i", raw, at)
        if n_found != n_chroms:
            message = f"{path} is the index of another file: it has {n_found} chromosomes, not {n_chroms}. {_REINDEX}"
            raise DataError(message)
        spans, at = [], at + 4
        for _ in range(n_found):
            span, at = _read_span(raw, at, depth, n_loffset)
            spans.append(span)
    except (struct.error, EOFError, OSError, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        message = f"{path}: the index is damaged ({error}). {_REINDEX}"
        raise DataError(message) from error
    return spans


def _read_span(raw: bytes, at: int, depth: int, n_loffset: int) -> tuple[Span | None, int]:
    """Read the part of one chromosome; return its span and where the next part begins."""
    # the number behind the last real bin holds the bounds of the chromosome and the number of its records
    summary = ((1 << (3 * depth + 3)) - 1) // 7 + 1
    (n_bins,) = struct.unpack_from("<i", raw, at)
    at += 4
    low, high, bounds, n_records = 1 << 64, 0, None, -1
    for _ in range(n_bins):
        number = struct.unpack_from("<I", raw, at)[0]
        (n_chunks,) = struct.unpack_from("<i", raw, at + 4 + n_loffset)
        at += 8 + n_loffset
        chunks = np.frombuffer(raw, dtype="<u8", count=2 * n_chunks, offset=at).reshape(-1, 2)
        at += 16 * n_chunks
        if number == summary and n_chunks == 2:
            bounds, n_records = (int(chunks[0, 0]), int(chunks[0, 1])), int(chunks[1].sum())
        elif n_chunks:
            low, high = min(low, int(chunks[:, 0].min())), max(high, int(chunks[:, 1].max()))
    if n_loffset == 0:
        (n_intervals,) = struct.unpack_from("<i", raw, at)
        at += 4 + 8 * n_intervals
    low, high = bounds or (low, high)
    return (Span(low, high, n_records) if high > low and n_records != 0 else None), at
