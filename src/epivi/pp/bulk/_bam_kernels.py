"""Compiled parser of BAM records, imported on first use because numba is heavy.

Layout of a record, after its size in 4 bytes: refID, pos (i4), l_read_name, mapq (u1), bin, n_cigar, flag (u2), l_seq,
next_refID, next_pos, tlen (i4), read name with its zero, CIGAR (u4 each), bases (two a byte), qualities, tags.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

# What `count_records` returns
DONE: Final = 0  # no whole record is left in the buffer
NEXT_CHROM: Final = 1  # the record at POSITION is of another chromosome
BAD: Final = 2  # the record at POSITION cannot be read
UNSORTED: Final = 3  # the record at POSITION stands before its place
BEYOND: Final = 4  # the record at POSITION begins behind the end of the chromosome

# Entries of `state`; those from N_RECORDS on are totals
POSITION: Final = 0
LAST_POS: Final = 1
N_RECORDS: Final = 2
N_UNMAPPED: Final = 3
N_SECONDARY: Final = 4
N_SUPPLEMENTARY: Final = 5
N_QC_FAIL: Final = 6
N_DUPLICATE: Final = 7
N_FLAGGED: Final = 8  # other flags that the user excludes
N_LOW_MAPQ: Final = 9
N_MATES: Final = 10  # records whose fragment is counted through the other mate
N_IMPROPER: Final = 11
N_THINNED: Final = 12
N_OUTSIDE: Final = 13  # in the narrower rest at the end of the chromosome
N_COUNTED: Final = 14
N_PAIRED: Final = 15  # of the counted: fragments with two mates
N_STATE: Final = 16

# Entries of `rule`
CHROM, WIDTH, SIZE, MIN_MAPQ, EXCLUDE, FRAGMENT, COUNT_IMPROPER, THIN = range(8)
N_RULE: Final = 8

MAX_LENGTH: Final = 1 << 16
_PAIRED, _PROPER, _UNMAPPED, _MATE_UNMAPPED, _REVERSE = 0x1, 0x2, 0x4, 0x8, 0x10
_SECOND, _SECONDARY, _QC_FAIL, _DUPLICATE, _SUPPLEMENTARY = 0x80, 0x100, 0x200, 0x400, 0x800
_FNV, _PRIME = np.uint64(1469598103934665603), np.uint64(1099511628211)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT1, _SHIFT2, _SHIFT3 = np.uint64(30), np.uint64(27), np.uint64(31)


@njit(cache=True, nogil=True, inline="always")
def _u16(buf, p):  # pragma: no cover - compiled
    return np.int64(buf[p]) | (np.int64(buf[p + 1]) << 8)


@njit(cache=True, nogil=True, inline="always")
def _i32(buf, p):  # pragma: no cover - compiled
    value = np.int64(buf[p]) | (np.int64(buf[p + 1]) << 8) | (np.int64(buf[p + 2]) << 16) | (np.int64(buf[p + 3]) << 24)
    return value - ((value >> 31) << 32)


@njit(cache=True, nogil=True)
def _mix(h):  # pragma: no cover - compiled
    """Spread each bit over all (the finalizer of SplitMix64)."""
    h = (h ^ (h >> _SHIFT1)) * _MIX1
    h = (h ^ (h >> _SHIFT2)) * _MIX2
    return h ^ (h >> _SHIFT3)


@njit(cache=True, nogil=True)
def fragment_hash(buf, start, stop, first, second, seed):  # pragma: no cover - compiled
    """Return 64 bits that are the same for both mates of a pair.

    `start` and `stop` bound the read name; `first` and `second` are the places of the mates, in either order.
    """
    if stop - start > 2 and buf[stop - 2] == 47 and (buf[stop - 1] == 49 or buf[stop - 1] == 50):
        stop -= 2  # "/1" and "/2", as old aligners write them
    h = _FNV
    for i in range(start, stop):
        h = (h ^ np.uint64(buf[i])) * _PRIME
    h = _mix(h ^ _mix(seed + _MIX1))
    h = _mix(h ^ np.uint64(min(first, second)))
    return _mix(h ^ np.uint64(max(first, second)))


@njit(cache=True, nogil=True)
def _alignment(buf, p, n_cigar):  # pragma: no cover - compiled
    """Return how many bp of the genome and how many bases of the read a CIGAR covers."""
    on_genome, on_read = np.int64(0), np.int64(0)
    for i in range(n_cigar):
        word = _i32(buf, p + 4 * i) & 0xFFFFFFFF
        size, kind = word >> 4, word & 15
        if kind == 0 or kind == 7 or kind == 8:
            on_genome += size
            on_read += size
        elif kind == 2 or kind == 3:
            on_genome += size
        elif kind == 1 or kind == 4:
            on_read += size
    return on_genome, on_read


@njit(cache=True, nogil=True, inline="always")
def _reason(flag, mapq, rule):  # pragma: no cover - compiled
    """Return the total to which a record that is left out adds, 0 if it is kept."""
    excluded = flag & (rule[EXCLUDE] | _UNMAPPED)
    if excluded:
        if excluded & _UNMAPPED:
            return N_UNMAPPED
        if excluded & _SECONDARY:
            return N_SECONDARY
        if excluded & _SUPPLEMENTARY:
            return N_SUPPLEMENTARY
        if excluded & _QC_FAIL:
            return N_QC_FAIL
        return N_DUPLICATE if excluded & _DUPLICATE else N_FLAGGED
    return N_LOW_MAPQ if mapq < rule[MIN_MAPQ] else 0


@njit(cache=True, nogil=True, inline="always")
def _mate_reason(flag, proper, rule):  # pragma: no cover - compiled
    """Return the same for a record of a pair: N_IMPROPER, N_MATES, or 0 if the fragment is counted through it."""
    if not flag & _PAIRED:
        return 0
    if not proper and not rule[COUNT_IMPROPER]:
        return N_IMPROPER
    # the second mate stands for the pair only if the first one is nowhere
    return N_MATES if flag & _SECOND and (proper or not flag & _MATE_UNMAPPED) else 0


@njit(cache=True, nogil=True, inline="always")
def _middle(pos, next_pos, tlen, on_genome, reverse, proper, fragment):  # pragma: no cover - compiled
    """Return the midpoint (start + end) // 2 of a fragment."""
    if proper:
        return min(pos, next_pos) + abs(tlen) // 2
    if fragment <= 0:
        return pos + on_genome // 2
    return pos + on_genome - (fragment + 1) // 2 if reverse else pos + fragment // 2


@njit(cache=True, nogil=True, inline="always")
def _place(chrom, pos, state, rule):  # pragma: no cover - compiled
    """Return what is wrong with the place of a record, DONE if nothing is."""
    if chrom != rule[CHROM]:
        return NEXT_CHROM
    if pos < 0 or pos >= rule[SIZE]:
        return BEYOND
    return UNSORTED if pos < state[LAST_POS] else DONE


@njit(cache=True, nogil=True)
def count_records(buf, counts, lengths, state, rule, seed, threshold):  # pragma: no cover - compiled
    """Count the fragments of whole records from state[POSITION] on.

    Parameters
    ----------
    buf
        Bytes; a record may be cut off at their end.
    counts
        Counts of the bins of the chromosome.
    lengths
        Receives how often a counted read has each length, (MAX_LENGTH,).
    state, rule
        Totals and settings, see the constants above.
    seed, threshold
        Of the thinning: a fragment is kept if its hash lies below the threshold.
    """
    p = state[POSITION]
    while p + 4 <= buf.size:
        size = _i32(buf, p)
        state[POSITION] = p
        if size < 32:
            return BAD
        if p + 4 + size > buf.size:
            return DONE
        chrom, pos = _i32(buf, p + 4), _i32(buf, p + 8)
        l_name, mapq = np.int64(buf[p + 12]), np.int64(buf[p + 13])
        n_cigar, flag, l_seq = _u16(buf, p + 16), _u16(buf, p + 18), _i32(buf, p + 20)
        next_chrom, next_pos, tlen = _i32(buf, p + 24), _i32(buf, p + 28), _i32(buf, p + 32)
        if l_name < 1 or l_seq < 0 or 32 + l_name + 4 * n_cigar + (l_seq + 1) // 2 + l_seq > size:
            return BAD
        place = _place(chrom, pos, state, rule)
        if place != DONE:
            return place
        state[LAST_POS] = pos
        state[N_RECORDS] += 1
        name = p + 36
        p += 4 + size
        paired = flag & _PAIRED
        proper = paired and flag & _PROPER and next_chrom == chrom and next_pos >= 0 and tlen != 0
        reason = _reason(flag, mapq, rule)
        reason = reason if reason else _mate_reason(flag, proper, rule)
        if not reason and rule[THIN]:
            here = (chrom << 33) | (pos << 1)
            there = (next_chrom << 33) | (next_pos << 1) if paired else here | ((flag & _REVERSE) >> 4)
            h = fragment_hash(buf, name, name + l_name - 1, here, there, seed)
            reason = 0 if h < threshold else N_THINNED
        if reason:
            state[reason] += 1
            continue
        on_genome, on_read = _alignment(buf, name + l_name, n_cigar)
        middle = _middle(pos, next_pos, tlen, max(on_genome, 1), flag & _REVERSE, proper, rule[FRAGMENT])
        at = min(max(middle, 0), rule[SIZE] - 1) // rule[WIDTH]
        if at >= counts.size:
            state[N_OUTSIDE] += 1
            continue
        counts[at] += 1
        lengths[min(l_seq if l_seq > 0 else on_read, MAX_LENGTH - 1)] += 1
        state[N_COUNTED] += 1
        state[N_PAIRED] += 1 if proper else 0
    state[POSITION] = p
    return DONE
