"""Pairs of overlapping intervals of two tables, and what chance would give."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from epivi._errors import DataError
from epivi._keys import VAR_CHROM, VAR_END, VAR_START

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd


class Pairs(NamedTuple):
    """The m overlapping pairs: rows of the first table, rows of the second, shared bp; by first row, then second."""

    first_m: np.ndarray
    second_m: np.ndarray
    shared_bp_m: np.ndarray


def overlap_pairs(first: pd.DataFrame, second: pd.DataFrame) -> Pairs:
    """Find every pair of intervals, one of each table, which share at least one bp.

    An interval [s, e) of the first table overlaps [t, u) of the second in one of two ways that exclude each other:
    t lies in [s, e), or s lies in (t, u). With the starts of either table sorted, each way is one contiguous run a
    row, found by binary search: O((n + k) log(n + k) + m log m), however long or nested the intervals are.

    Parameters
    ----------
    first, second
        Columns chrom, start, end (bp, 0-based, half-open), n and k rows in any order; intervals of one table may
        overlap one another.

    Returns
    -------
    Row numbers and shared bp of the m pairs, int64.

    Raises
    ------
    DataError
        If the positions are too large to be of a genome.

    Examples
    --------
    >>> import pandas as pd
    >>> peaks = pd.DataFrame({"chrom": ["chr1", "chr1"], "start": [0, 20], "end": [10, 30]})
    >>> others = pd.DataFrame({"chrom": ["chr1"], "start": [8], "end": [21]})
    >>> [entry.tolist() for entry in overlap_pairs(peaks, others)]
    [[0, 1], [0, 0], [2, 1]]
    """
    start_n, end_n, start_k, end_k = _on_one_axis(first, second)
    first_a, second_a = _runs(start_k, start_n, end_n)
    # + 1: a start equal to the other is counted above
    second_b, first_b = _runs(start_n, start_k + 1, end_k)
    first_m, second_m = np.concatenate([first_a, first_b]), np.concatenate([second_a, second_b])
    order = np.lexsort((second_m, first_m))
    first_m, second_m = first_m[order], second_m[order]
    shared_bp_m = np.minimum(end_n[first_m], end_k[second_m]) - np.maximum(start_n[first_m], start_k[second_m])
    return Pairs(first_m, second_m, shared_bp_m)


def _on_one_axis(first: pd.DataFrame, second: pd.DataFrame) -> tuple[np.ndarray, ...]:
    """Put the chromosomes one after the other, so that one search serves all of them."""
    codes, n_chroms = _chrom_codes(first, second)
    span = 1 + max(int(frame[VAR_END].max()) if len(frame) else 0 for frame in (first, second))
    if n_chroms * span >= 2**62:
        message = f"There are {n_chroms} chromosomes and positions up to {span - 1} bp: no genome is that large."
        raise DataError(message)
    shift_n, shift_k = codes[: len(first)] * span, codes[len(first) :] * span
    return (
        first[VAR_START].to_numpy(np.int64) + shift_n,
        first[VAR_END].to_numpy(np.int64) + shift_n,
        second[VAR_START].to_numpy(np.int64) + shift_k,
        second[VAR_END].to_numpy(np.int64) + shift_k,
    )


def _chrom_codes(first: pd.DataFrame, second: pd.DataFrame) -> tuple[np.ndarray, int]:
    """Number the chromosomes of both tables together."""
    import pandas as pd

    names = np.concatenate([frame[VAR_CHROM].astype(str).to_numpy(dtype=object) for frame in (first, second)])
    codes, found = pd.factorize(names)
    return codes.astype(np.int64), len(found)


def _runs(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, point) for every point in [low, high) of a row."""
    order = np.argsort(points, kind="stable")
    in_order = points[order]
    begin = np.searchsorted(in_order, low, side="left")
    n_found = np.maximum(np.searchsorted(in_order, high, side="left") - begin, 0)
    rows = np.repeat(np.arange(low.size), n_found)
    # position of each pair within its run: a count that starts anew with every row
    within = np.arange(rows.size) - np.repeat(np.cumsum(n_found) - n_found, n_found)
    return rows, order[begin[rows] + within]


def chance_share(first: pd.DataFrame, second: pd.DataFrame, sizes: Mapping[str, int] | None = None) -> float:
    """Return the share of the first table that would overlap the second if it were placed at random.

    Each interval keeps its chromosome, and has the median width w of the first table. Of the L - w + 1 places on a
    chromosome of length L those from t - w + 1 to u - 1 overlap [t, u); the union of these runs is counted.

    Parameters
    ----------
    first, second
        Columns chrom, start, end (bp, 0-based, half-open), with at least one row in the first.
    sizes
        Lengths of chromosomes; where unknown, the last position of both tables on it.

    Examples
    --------
    >>> import pandas as pd
    >>> first = pd.DataFrame({"chrom": ["chr1"], "start": [0], "end": [10]})
    >>> second = pd.DataFrame({"chrom": ["chr1"], "start": [40], "end": [50]})
    >>> round(chance_share(first, second, {"chr1": 109}), 6)  # 19 of 100 places
    0.19
    """
    import pandas as pd

    codes, n_chroms = _chrom_codes(first, second)
    codes_n, codes_k = codes[: len(first)], codes[len(first) :]
    both = pd.concat([first[[VAR_CHROM, VAR_END]], second[[VAR_CHROM, VAR_END]]])
    length_c = np.zeros(n_chroms, dtype=np.int64)
    np.maximum.at(length_c, codes, both[VAR_END].to_numpy(np.int64))
    if sizes:
        known = both[VAR_CHROM].astype(str).map(sizes).fillna(0).to_numpy(np.int64)
        np.maximum.at(length_c, codes, known)
    width = int(np.median((first[VAR_END] - first[VAR_START]).to_numpy()))
    places_c = np.maximum(length_c - width + 1, 1)
    begin_k = np.clip(second[VAR_START].to_numpy(np.int64) - width + 1, 0, places_c[codes_k])
    stop_k = np.clip(second[VAR_END].to_numpy(np.int64), 0, places_c[codes_k])
    order = np.lexsort((begin_k, codes_k))
    offset_k = codes_k[order] * (int(places_c.max()) + 1)
    begin_k, stop_k = begin_k[order] + offset_k, stop_k[order] + offset_k
    reached_k = np.concatenate([[0], np.maximum.accumulate(stop_k)[:-1]])  # how far the intervals before go
    new_k = np.maximum(stop_k - np.maximum(begin_k, reached_k), 0)
    covered_c = np.bincount(codes_k[order], weights=new_k, minlength=n_chroms)
    return float((covered_c / places_c)[codes_n].mean())
