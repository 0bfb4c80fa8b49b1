"""Compiled products of sparse peaks with dense matrices. Imported on first use, because numba is heavy.

Legend of shapes: b cells of the batch, p peaks, o non-zeros, h hidden units. The entries are listed peak by peak:
``starts`` (p + 1), ``cells`` (o) and, where they are weighted, ``values`` (o).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit

from epivi.nn.kernels._rows import (
    add_narrow,
    add_narrow_weighted,
    add_wide,
    add_wide_weighted,
    sum_narrow,
    sum_narrow_weighted,
    sum_wide,
    sum_wide_weighted,
)
from epivi.nn.kernels._vectors import PANEL, WIDTH

# widths of the strips of hidden units that are gone over at a time, so that those of all cells stay in the cache
WIDE: Final = PANEL
NARROW: Final = WIDTH


@njit(cache=True, nogil=True)
def list_by_peak(indptr, indices, rank, values, counts, logs, lists):  # pragma: no cover - compiled
    """List the entries of compressed rows peak by peak, cells in order, and return whether all peaks exist.

    ``rank`` is empty where peaks stay in order. ``lists`` ends with the totals of each cell (2 x b): the sum of its
    counts, and of the logs of their factorials; those of small numbers stand in ``logs``.
    """
    starts, cells, values_out, counts_out, totals = lists
    n_p = starts.size - 1
    starts[:] = 0
    moved = rank.size > 0
    for o in range(indices.size):
        if indices[o] < 0 or indices[o] >= n_p:
            return False
        starts[(rank[indices[o]] if moved else indices[o]) + 1] += 1
    for p in range(n_p):
        starts[p + 1] += starts[p]
    for b in range(indptr.size - 1):
        total, log_total = 0.0, 0.0
        for o in range(indptr[b], indptr[b + 1]):
            p = rank[indices[o]] if moved else indices[o]
            place = starts[p]
            starts[p] = place + 1
            cells[place] = b
            if values.size:
                values_out[place] = values[o]
            if counts.size:
                count = counts[o]
                counts_out[place] = count
                total += count
                whole = int(count)
                is_small = whole == count and whole < logs.size
                log_total += logs[whole] if is_small else math.lgamma(count + 1.0)
        totals[0, b], totals[1, b] = total, log_total
    for p in range(n_p, 0, -1):
        starts[p] = starts[p - 1]
    starts[0] = 0
    return True


@njit(cache=True, nogil=True)
def rows_times_matrix(peaks, lists, weight_ph, strip, out_bch, j):  # pragma: no cover - compiled
    """Write x W over peaks first to last (exclusive), for hidden units first to last, as block j of the output."""
    starts, cells, values = lists
    first, n_h = strip[0], strip[1] - strip[0]
    n_b = out_bch.shape[0]
    sums = np.zeros((n_b, n_h), np.float32)
    for p in range(peaks[0], peaks[1]):
        o, n = starts[p], starts[p + 1] - starts[p]
        if n == 0:
            continue
        w = p * weight_ph.shape[1] + first
        if n_h == WIDE and values.size:
            add_wide_weighted(sums, 0, n_h, cells, values, o, n, weight_ph, w)
        elif n_h == WIDE:
            add_wide(sums, 0, n_h, cells, values, o, n, weight_ph, w)
        elif n_h == NARROW and values.size:
            add_narrow_weighted(sums, 0, n_h, cells, values, o, n, weight_ph, w)
        elif n_h == NARROW:
            add_narrow(sums, 0, n_h, cells, values, o, n, weight_ph, w)
        else:
            for i in range(o, o + n):
                value = values[i] if values.size else np.float32(1.0)
                for k in range(n_h):
                    sums[cells[i], k] += value * weight_ph[p, first + k]
    for b in range(n_b):
        for k in range(n_h):
            out_bch[b, j, first + k] = sums[b, k]


@njit(cache=True, nogil=True)
def columns_times_matrix(peaks, lists, grad_bch, j, strip, out_ph):  # pragma: no cover - compiled
    """Write the transposed product, x^T g of block j over peaks first to last, for hidden units first to last."""
    starts, cells, values = lists
    first, n_h = strip[0], strip[1] - strip[0]
    n_b = grad_bch.shape[0]
    grad_bh = np.empty((n_b, n_h), np.float32)
    for b in range(n_b):
        for k in range(n_h):
            grad_bh[b, k] = grad_bch[b, j, first + k]
    for p in range(peaks[0], peaks[1]):
        o, n = starts[p], starts[p + 1] - starts[p]
        w = p * out_ph.shape[1] + first
        if n == 0:
            out_ph[p, first : first + n_h] = 0.0
        elif n_h == WIDE and values.size:
            sum_wide_weighted(grad_bh, 0, n_h, cells, values, o, n, out_ph, w)
        elif n_h == WIDE:
            sum_wide(grad_bh, 0, n_h, cells, values, o, n, out_ph, w)
        elif n_h == NARROW and values.size:
            sum_narrow_weighted(grad_bh, 0, n_h, cells, values, o, n, out_ph, w)
        elif n_h == NARROW:
            sum_narrow(grad_bh, 0, n_h, cells, values, o, n, out_ph, w)
        else:
            out_ph[p, first : first + n_h] = 0.0
            for i in range(o, o + n):
                value = values[i] if values.size else np.float32(1.0)
                for k in range(n_h):
                    out_ph[p, first + k] += value * grad_bh[cells[i], k]
