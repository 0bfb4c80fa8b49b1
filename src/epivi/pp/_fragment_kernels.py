"""Compiled parser of fragment files, imported on first use because numba is heavy.

Names (chromosomes, barcodes) are numbered by open addressing: `slots` holds numbers or -1, `hashes` the hash of each
name, `ends` (one entry more than names) where it stops in `arena`, the bytes of all names after one another.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Final

import numpy as np
import scipy.sparse as sp
from numba import njit

if TYPE_CHECKING:
    from collections.abc import Mapping

# What `parse_lines` returns
DONE: Final = 0  # all bytes are read
GROW_CHROMS: Final = 1  # the table of chromosomes is full; the line at POSITION is to be read again
GROW_CELLS: Final = 2  # the same for barcodes
BAD: Final = 3  # the line at POSITION cannot be used

# Entries of the array `state`
POSITION: Final = 0  # byte of the buffer at which reading goes on
LINE: Final = 1  # lines read so far
N_KEYS: Final = 2  # keys written by this call
ACCEPTED: Final = 3  # fragments of wanted barcodes on known chromosomes
UNKNOWN: Final = 4  # fragments on chromosomes that are not in the genome
OTHER: Final = 5  # fragments of barcodes that are not in the whitelist
DROPPED: Final = 6  # counts in bins that are left out
UNSORTED: Final = 7  # lines that stand before their place
LAST_CHROM: Final = 8
LAST_START: Final = 9
N_STATE: Final = 10

# Counts kept before they are summed up
_MERGE_COUNTS = 1 << 22

_MAX_DIGITS = 12
_TAB, _NEWLINE, _RETURN, _BLANK, _HASH, _PLUS, _MINUS, _DOT, _ZERO, _NINE = 9, 10, 13, 32, 35, 43, 45, 46, 48, 57
_SEED, _PRIME, _POSITIVE = 1469598103934665603, 1099511628211, 0x7FFFFFFFFFFFFFFF


@njit(cache=True)
def hash_name(buf, start, stop):  # pragma: no cover - compiled
    """Return a hash of at least zero (FNV-1a, high bits folded into the low ones that choose the slot)."""
    h = np.int64(_SEED)
    for i in range(start, stop):
        h = (h ^ np.int64(buf[i])) * np.int64(_PRIME)
    return (h ^ (h >> 32)) & np.int64(_POSITIVE)


@njit(cache=True)
def find(buf, start, stop, h, table):  # pragma: no cover - compiled
    """Return the number of a name, or -1 - (free slot) if the table does not have it."""
    slots, hashes, ends, arena = table
    mask = slots.size - 1
    at = h & mask
    while True:
        number = slots[at]
        if number < 0:
            return -1 - at
        low = ends[number]
        if hashes[number] == h and ends[number + 1] - low == stop - start:
            same = True
            for i in range(stop - start):
                if arena[low + i] != buf[start + i]:
                    same = False
                    break
            if same:
                return np.int64(number)
        at = (at + 1) & mask


@njit(cache=True)
def insert(buf, start, stop, h, slot, number, table):  # pragma: no cover - compiled
    """Enter a name under the next number; False if there is no room."""
    slots, hashes, ends, arena = table
    low = ends[number]
    if number >= hashes.size or low + stop - start > arena.size:
        return False
    slots[slot] = number
    hashes[number] = h
    for i in range(stop - start):
        arena[low + i] = buf[start + i]
    ends[number + 1] = low + stop - start
    return True


@njit(cache=True)
def insert_all(buf, stops, table):  # pragma: no cover - compiled
    """Enter names given after one another; return the first that occurs twice, or -1."""
    start = 0
    for number in range(stops.size):
        h = hash_name(buf, start, stops[number])
        slot = find(buf, start, stops[number], h, table)
        if slot >= 0:
            return number
        insert(buf, start, stops[number], h, -1 - slot, number, table)
        start = stops[number]
    return -1


@njit(cache=True)
def _field(buf, p):  # pragma: no cover - compiled
    """Return where the text from `p` on stops: at a tab, blank or line end."""
    while buf[p] > _BLANK:
        p += 1
    return p


@njit(cache=True)
def _number(buf, p):  # pragma: no cover - compiled
    """Read digits; return the number, -1 if there are none or too many, and where they stop."""
    value, first = np.int64(0), p
    while _ZERO <= buf[p] <= _NINE:
        value = value * 10 + (buf[p] - _ZERO)
        p += 1
        if p - first > _MAX_DIGITS:
            return np.int64(-1), p
    if p == first:
        return np.int64(-1), p
    return value, p


@njit(cache=True)
def _rest(buf, p):  # pragma: no cover - compiled
    """Check read support and strand; return where the next line starts, or -1."""
    for column in range(2):
        if buf[p] != _TAB:
            break
        first = p + 1
        if column == 0:
            p = first + 1 if buf[first] == _DOT else _number(buf, first)[1]
        else:
            p = first + 1 if buf[first] in (_PLUS, _MINUS, _DOT) else first
        if p == first:
            return np.int64(-1)
    if buf[p] == _RETURN and buf[p + 1] == _NEWLINE:
        p += 1
    return np.int64(p + 1) if buf[p] == _NEWLINE else np.int64(-1)


@njit(cache=True)
def _skip(buf, p):  # pragma: no cover - compiled
    """Return where the next line starts if this one is blank or a comment, else `p`."""
    if buf[p] == _HASH:
        while buf[p] != _NEWLINE:
            p += 1
        return p + 1
    if buf[p] == _RETURN and buf[p + 1] == _NEWLINE:
        return p + 2
    return p + 1 if buf[p] == _NEWLINE else p


@njit(cache=True)
def _line(buf, p):  # pragma: no cover - compiled
    """Split a line; return where chromosome stops, start, end, where the barcode begins and stops, the next line.

    The last is -1 if the line does not have the form.
    """
    bad = np.int64(-1)
    chrom_stop = _field(buf, p)
    start, q = _number(buf, chrom_stop + 1) if buf[chrom_stop] == _TAB else (bad, chrom_stop)
    end, q = _number(buf, q + 1) if start >= 0 and buf[q] == _TAB else (bad, q)
    if chrom_stop == p or end <= start or buf[q] != _TAB:
        return chrom_stop, start, end, q, q, bad
    name_stop = _field(buf, q + 1)
    return chrom_stop, start, end, q + 1, name_stop, _rest(buf, name_stop) if name_stop > q + 1 else bad


@njit(cache=True)
def _enter(buf, start, stop, table, count, at, fixed):  # pragma: no cover - compiled
    """Return the number of a name, entered if it is new: -1 if it is new and `fixed`, -2 if there is no room."""
    h = hash_name(buf, start, stop)
    number = find(buf, start, stop, h, table)
    if number >= 0:
        return number
    if fixed:
        return np.int64(-1)
    if not insert(buf, start, stop, h, -1 - number, count[at], table):
        return np.int64(-2)
    count[at] += 1
    return np.int64(count[at] - 1)


@njit(cache=True)
def _add(base, tile, column, cell, keys, state, n_columns):  # pragma: no cover - compiled
    """Count one site."""
    at = column[base + tile]
    if at < 0:
        state[DROPPED] += 1
    else:
        keys[state[N_KEYS]] = cell * n_columns + at
        state[N_KEYS] += 1


@njit(cache=True)
def parse_lines(buf, chroms, cells, grid, counts, keys, state, options):  # pragma: no cover - compiled
    """Read whole lines from state[POSITION] on, up to the end of the buffer or to a line that needs attention.

    Parameters
    ----------
    buf
        Bytes; the last one is a line end.
    chroms, cells
        Tables of names: (slots, hashes, ends, arena).
    grid
        Sizes of the known chromosomes (bp), the number of the first tile of each, and the column of each tile, -1
        where it is left out.
    counts
        Number of names, (2,): chromosomes, barcodes; lines by chromosome; fragments by barcode.
    keys
        Receives barcode * columns + column for each count.
    state
        Positions and totals, see the constants above.
    options
        (bin width in bp, number of columns, both cut sites?, are the barcodes a fixed list?, is a line bad if its
        chromosome is not known?).
    """
    sizes, first_tile, column = grid
    n_names, on_chrom, on_cell = counts
    width, n_columns, both_ends, fixed, strict = options
    p = state[POSITION]
    state[N_KEYS] = 0
    status = DONE
    while p < buf.size and status == DONE:
        state[POSITION] = p
        after = _skip(buf, p)
        if after == p:
            chrom_stop, start, end, name, name_stop, after = _line(buf, p)
            chrom = _enter(buf, p, chrom_stop, chroms, n_names, 0, strict) if after >= 0 else np.int64(-1)
            cell = np.int64(-1)
            if chrom == -2:
                status = GROW_CHROMS
                continue
            if chrom < 0 or (chrom < sizes.size and end > sizes[chrom]):
                status = BAD
                continue
            if chrom >= sizes.size:
                state[UNKNOWN] += 1
            else:
                cell = _enter(buf, name, name_stop, cells, n_names, 1, fixed)
                if cell == -2:
                    status = GROW_CELLS
                    continue
                state[ACCEPTED if cell >= 0 else OTHER] += 1
            if cell >= 0:
                on_cell[cell] += 1
                base = first_tile[chrom]
                if both_ends:
                    _add(base, start // width, column, cell, keys, state, n_columns)
                    _add(base, (end - 1) // width, column, cell, keys, state, n_columns)
                else:
                    _add(base, (start + end) // 2 // width, column, cell, keys, state, n_columns)
            is_next = chrom == state[LAST_CHROM]
            state[UNSORTED] += (is_next and start < state[LAST_START]) or (not is_next and on_chrom[chrom] > 0)
            on_chrom[chrom] += 1
            state[LAST_CHROM], state[LAST_START] = chrom, start
        p = after
        state[LINE] += 1
    return status


def diagnose(place: str, line: bytes, sizes: Mapping[str, int], *, is_strict: bool) -> str:
    r"""Say what is wrong with a line at which the parser stopped.

    Examples
    --------
    >>> diagnose("f.tsv:1", b"chr1\t9\t5\tA", {"chr1": 100}, is_strict=False)[:41]
    'f.tsv:1: the end 5 is not above the start'
    """
    text = line.decode(errors="replace").removesuffix("\r")
    fields = text.split("\t")
    start, end = (fields[i] if len(fields) > i else "" for i in (1, 2))
    is_whole = [re.fullmatch("[0-9]{1,12}", value) is not None for value in (start, end)]
    cause, remedy = "it cannot be read", "Correct or remove the line"
    if not 4 <= len(fields) <= 6:
        cause = f"4 to 6 fields separated by tabs are needed, found {len(fields)}"
        remedy = "Correct or remove the line; a header must begin with '#'"
    elif re.fullmatch("-[0-9]+", start):
        cause = f"the start {start} is negative"
    elif not all(is_whole):
        cause = f"{'end' if is_whole[0] else 'start'} '{(end if is_whole[0] else start)[:40]}' is not a position"
        remedy = "A whole number of bp is needed; a header must begin with '#'"
    elif int(end) <= int(start):
        cause = f"the end {end} is not above the start {start}"
        remedy += "; intervals are 0-based and half-open"
    elif not re.fullmatch(r"[^\x00-\x20]+", fields[0]) or not re.fullmatch(r"[^\x00-\x20]+", fields[3]):
        cause = "chromosome or barcode is empty or has a blank in it"
    elif len(fields) > 4 and not re.fullmatch(r"\.|[0-9]{1,12}", fields[4]):
        cause = f"the read support '{fields[4][:40]}' is not a whole number"
    elif len(fields) > 5 and fields[5] not in {"+", "-", "."}:
        cause = f"the strand '{fields[5][:40]}' is none of + - ."
    elif fields[0] not in sizes:
        if is_strict:
            cause = f"the genome has no chromosome '{fields[0]}'"
            remedy = "Give a genome that has it, or set unknown_chroms='skip'"
    elif int(end) > sizes[fields[0]]:
        cause = f"the end {end} lies beyond {fields[0]}, which has {sizes[fields[0]]} bp"
        remedy = "Check that the genome is that of the file"
    return f"{place}: {cause}. The line is {text[:120]!r}. {remedy}."


class Names:
    """Names by number, found by their bytes in the compiled parser.

    Parameters
    ----------
    names
        The first names, without duplicates.
    room
        Names that fit before the table grows.

    Examples
    --------
    >>> Names(["chr1", "chr2"]).decode(2)
    ['chr1', 'chr2']
    """

    def __init__(self, names: list[str], room: int = 0) -> None:
        encoded = [name.encode() for name in names]
        blob = np.frombuffer(b"".join(encoded) + b"\n", dtype=np.uint8)
        stops = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._allocate(max(len(names), room, 16), max(blob.size, 24 * room, 256))
        self.repeated = int(insert_all(blob, stops, self.table))

    @property
    def room(self) -> int:
        """Number of names for which there is room."""
        return int(self.table[1].size)

    def _allocate(self, n_names: int, n_bytes: int) -> None:
        slots = np.full(1 << (2 * n_names - 1).bit_length(), -1, dtype=np.int32)
        ends = np.zeros(n_names + 1, dtype=np.int64)
        self.table = (slots, np.empty(n_names, dtype=np.int64), ends, np.empty(n_bytes, dtype=np.uint8))

    def grow(self, n_names: int) -> int:
        """Double the room for names and bytes, keep the `n_names` there are; return the new room."""
        _, hashes, ends, arena = self.table
        stops = ends[1 : n_names + 1].copy()
        self._allocate(2 * hashes.size, 2 * arena.size + (1 << 16))
        arena.flags.writeable = False  # the kernels are compiled for buffers that cannot be written
        insert_all(arena, stops, self.table)
        return 2 * hashes.size

    def decode(self, n_names: int) -> list[str]:
        """Return the first `n_names` names; UnicodeDecodeError if one is no UTF-8."""
        _, _, ends, arena = self.table
        blob, bounds = arena.tobytes(), ends[: n_names + 1].tolist()
        return [blob[low:high].decode() for low, high in itertools.pairwise(bounds)]


class Sums:
    """How often each key occurred; keys are kept as they come and summed up from time to time.

    Examples
    --------
    >>> sums = Sums()
    >>> sums.add(np.array([3, 0, 3]))
    >>> sums.matrix(2, 2).toarray().tolist()
    [[1, 0], [0, 2]]
    """

    def __init__(self) -> None:
        self.keys, self.sums = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
        self._pending: list[np.ndarray] = []
        self._n_pending = 0

    def add(self, keys: np.ndarray) -> None:
        """Take keys, in any order."""
        self._pending.append(keys.copy())
        self._n_pending += keys.size
        # waiting for as many as there are bounds both the memory and the number of merges
        if self._n_pending > max(_MERGE_COUNTS, self.keys.size):
            self._merge()

    def _merge(self) -> None:
        keys = np.concatenate([self.keys[:0], *self._pending])
        self._pending, self._n_pending = [], 0
        if keys.size == 0:
            return
        keys.sort()
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        sums = np.diff(first, append=keys.size).astype(np.int32)
        keys = keys[first]
        if self.keys.size:
            keys, sums = np.concatenate([self.keys, keys]), np.concatenate([self.sums, sums])
            order = np.argsort(keys, kind="stable")
            keys, sums = keys[order], sums[order]
            first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
            keys, sums = keys[first], np.add.reduceat(sums, first, dtype=np.int32)
        self.keys, self.sums = keys, sums

    def matrix(self, n_rows: int, n_columns: int) -> sp.csr_matrix:
        """Return the sums; key = row * n_columns + column."""
        self._merge()
        indptr = np.searchsorted(self.keys, np.arange(n_rows + 1, dtype=np.int64) * n_columns)
        columns = (self.keys % n_columns).astype(np.int32)
        return sp.csr_matrix((self.sums, columns, indptr), shape=(n_rows, n_columns))
