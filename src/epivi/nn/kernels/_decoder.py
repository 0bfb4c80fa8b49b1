"""Compiled passes over one block of peaks: logits, likelihood, and both gradients, a tile of peaks at a time.

A tile of logits has shape (peaks, cells); it is made, turned into gradients in place, multiplied with weights and
hidden units, and written over by the next. Imported on first use, because numba is heavy.

Legend of shapes: b cells of the batch, p peaks, h hidden units, c blocks; a trailing + means filled up with zeros to a
whole number of panels.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from epivi.nn.kernels._lanes import bernoulli_column, exp_sum_column, softmax_column
from epivi.nn.kernels._vectors import PANEL, ROWS, WIDTH, step_half, step_single

TILE: Final = 192  # peaks of a tile, a multiple of ROWS and of GROUP
GROUP: Final = 96  # peaks whose likelihoods share a logarithm, at most 120

# what is done with a tile of logits
BERNOULLI: Final = 0
LOG_SUM: Final = 1
MULTINOMIAL: Final = 2

# whether a product is added to what is there
ADD: Final = True
WRITE: Final = False


@njit(cache=True, nogil=True)
def padded(n: int) -> int:  # pragma: no cover - compiled
    """Return n filled up to a whole number of panels."""
    return (n + PANEL - 1) // PANEL * PANEL


@njit(cache=True, nogil=True)
def _round(bits):  # pragma: no cover - compiled
    """Bits of a float, rounded to the nearest bfloat16, which is then their upper half."""
    return bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))


@njit(cache=True, nogil=True)
def pack_along(source, target, n_rows, n_columns):  # pragma: no cover - compiled
    """Write rows as bfloat16, so that a word of the target holds two neighbours of a row."""
    halves = target.view(np.uint16)
    for i in range(n_rows):
        for j in range(n_columns):
            halves[i, j] = np.uint16(_round(source[i, j]) >> np.uint32(16))


@njit(cache=True, nogil=True)
def pack_across(source, target, n_rows, n_columns):  # pragma: no cover - compiled
    """Write rows as bfloat16, so that a word of the target holds two neighbours of a column."""
    for i in range(n_rows // 2):
        for j in range(n_columns):
            low, high = _round(source[2 * i, j]), _round(source[2 * i + 1, j])
            target[i, j] = (low >> np.uint32(16)) | (high & np.uint32(0xFFFF0000))


@njit(cache=True, nogil=True)
def product(c, a, lda, ldr, b, shape, half, add):  # pragma: no cover - compiled
    """Return c (+)= a b over (rows, columns, words of r), whole numbers of steps; a[m, r] is word m lda + r ldr."""
    n_m, n_n, n_r = shape
    ldc, ldb = c.shape[1], b.shape[1]
    for n in range(0, n_n, PANEL):
        for m in range(0, n_m, ROWS):
            if half:
                step_half(c, m * ldc + n, ldc, a, m * lda, lda, ldr, b, n, ldb, n_r, add)
            else:
                step_single(c, m * ldc + n, ldc, a, m * lda, lda, ldr, b, n, ldb, n_r, add)


@njit(cache=True, nogil=True)
def load_weights(block, along, across, half, wanted):  # pragma: no cover - compiled
    """Take weights as operands of one or both products; return the number of rows, zeros below the last included."""
    n, n_h = block.shape
    n_m = (n + ROWS - 1) // ROWS * ROWS
    along[n:n_m] = 0
    if not half:
        for i in range(n):  # a slice would be compiled with the text of an error, which takes seconds
            for k in range(n_h):
                along[i, k] = block[i, k]
        return n_m
    pack_along(block, along, n, n_h)
    if not wanted:
        return n_m
    pack_across(block, across, n, n_h)
    if n % 2:
        for k in range(n_h):
            across[n // 2, k] = _round(block[n - 1, k]) >> np.uint32(16)
    return n_m


@njit(cache=True, nogil=True)
def _weight_gradient(target, spare, gradients, hidden, half):  # pragma: no cover - compiled
    """Write the gradient of a tile of weights, at once if it has no rows and columns to fill up."""
    n_m, n_hp = (target.shape[0] + ROWS - 1) // ROWS * ROWS, hidden.shape[1]
    shape = (n_m, n_hp, hidden.shape[0])
    if target.shape == (n_m, n_hp):
        product(target, gradients, gradients.shape[1], 1, hidden, shape, half, WRITE)
    else:
        product(spare, gradients, gradients.shape[1], 1, hidden, shape, half, WRITE)
        for i in range(target.shape[0]):
            for k in range(target.shape[1]):
                target[i, k] = spare[i, k]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _sum_rows(tile, n_rows, out, first):  # pragma: no cover - compiled
    for i in range(n_rows):
        total = np.float32(0.0)
        for j in range(tile.shape[1]):
            total += tile[i, j]
        out[first + i] = total


@njit(cache=True, nogil=True)
def hidden_words(hidden_bch, j, half):  # pragma: no cover - compiled
    """Return the hidden units of a block as operands: of logits (h+ x b+) and of the weight gradient (b+ x h+)."""
    n_b, n_h = hidden_bch.shape[0], hidden_bch.shape[2]
    rows_bh = np.zeros((padded(n_b), padded(n_h)), np.float32)
    columns_hb = np.zeros((padded(n_h), padded(n_b)), np.float32)
    for i in range(n_b):
        for k in range(n_h):
            rows_bh[i, k] = hidden_bch[i, j, k]
            columns_hb[k, i] = hidden_bch[i, j, k]
    rows, columns = rows_bh.view(np.uint32), columns_hb.view(np.uint32)
    if not half:
        return columns, rows
    columns_half = np.empty((columns.shape[0] // 2, columns.shape[1]), np.uint32)
    rows_half = np.empty((rows.shape[0] // 2, rows.shape[1]), np.uint32)
    pack_across(columns, columns_half, columns.shape[0], columns.shape[1])
    pack_across(rows, rows_half, rows.shape[0], rows.shape[1])
    return columns_half, rows_half


@njit(cache=True, nogil=True)
def _bernoulli(tile, n_rows, peak, lists, marks, factors, scale, loss_b):  # pragma: no cover - compiled
    """Turn a tile of logits into gradients and add the likelihoods of the cells."""
    starts, cells, _ = lists
    n_b = tile.shape[1]
    for i in range(n_rows):
        for o in range(starts[peak + i], starts[peak + i + 1]):
            marks[i, cells[o]] = 1
    sums = np.empty((3, n_b), np.float32)
    for i in range(0, n_rows, GROUP):
        n = min(GROUP, n_rows - i)
        for cell in range(0, n_b, WIDTH):
            bernoulli_column(tile, i * n_b + cell, n_b, n, marks, factors, scale, cell, sums, n_b)
        for cell in range(loss_b.size):
            loss_b[cell] += sums[0, cell] + factors[0] * np.log(sums[1, cell]) + factors[1] * np.log(sums[2, cell])
    marks[:n_rows] = 0


@njit(cache=True, nogil=True)
def _log_sum(tile, n_rows, peak, lists, state, loss_b):  # pragma: no cover - compiled
    """Add exponentials to their sums, and subtract count x logit from the likelihoods of the cells."""
    starts, cells, counts = lists
    n_b = tile.shape[1]
    dot_b = np.zeros(n_b, np.float32)
    for i in range(n_rows):
        for o in range(starts[peak + i], starts[peak + i + 1]):
            dot_b[cells[o]] += counts[o] * tile[i, cells[o]]
    for cell in range(loss_b.size):
        loss_b[cell] -= dot_b[cell]
    for cell in range(0, n_b, WIDTH):
        exp_sum_column(tile, cell, n_b, n_rows, state, cell, n_b)


@njit(cache=True, nogil=True)
def _multinomial(tile, n_rows, peak, lists, state, scale):  # pragma: no cover - compiled
    """Turn a tile of logits into gradients; ``state`` holds the log of the sum and the total of counts x scale."""
    starts, cells, counts = lists
    n_b = tile.shape[1]
    for cell in range(0, n_b, WIDTH):
        softmax_column(tile, cell, n_b, n_rows, state[0], state[1], cell)
    for i in range(n_rows):
        for o in range(starts[peak + i], starts[peak + i + 1]):
            tile[i, cells[o]] -= counts[o] * scale[cells[o]]


@njit(cache=True, nogil=True)
def decode_block(  # noqa: PLR0913, PLR0917  # pragma: no cover - compiled
    kind, hidden_bch, j, weight_ph, bias_p, peaks, lists, factors, scale, state, loss_b, gradients, half
):
    """Go over the peaks of one block.

    Parameters
    ----------
    kind
        BERNOULLI, LOG_SUM or MULTINOMIAL.
    hidden_bch, j
        Hidden units and the block whose units are read.
    weight_ph, bias_p, peaks
        Of the logit layer; first and last peak (exclusive).
    lists
        Of the entries, peak by peak: starts (p + 1), cells, counts.
    factors
        Weights of closed and of open entries, and what is taken from each logit.
    scale
        Shape (b+): what each cell's gradient is multiplied by; zero where there is no cell.
    state
        Shape (2, b+); see the function of the kind.
    loss_b
        Likelihoods, float64, added to.
    gradients
        Whether they are wanted, and where to: of hidden units (h+ x b+, added to), weight (p x h) and bias (p).
    half
        Whether products are of bfloat16.
    """
    wanted, grad_hb, grad_weight_ph, grad_bias_p = gradients
    columns, rows = hidden_words(hidden_bch, j, half)
    n_b, n_hp = columns.shape[1], rows.shape[1]
    per_word = 2 if half else 1
    tile = np.empty((TILE, n_b), np.float32)
    marks = np.zeros((TILE, n_b), np.uint8)
    along = np.zeros((TILE, n_hp // per_word), np.uint32)
    across = np.zeros((TILE // 2, n_hp), np.uint32) if half else along
    tile_words = tile.view(np.uint32)
    tile_along = np.empty((TILE, n_b // 2), np.uint32) if half else tile_words
    tile_across = np.empty((TILE // 2, n_b), np.uint32) if half else tile_words
    grad_tile = np.empty((TILE, n_hp), np.float32)
    weight_words = weight_ph.view(np.uint32)
    for first in range(peaks[0], peaks[1], TILE):
        n = min(TILE, peaks[1] - first)
        block = weight_words[first : first + n]
        n_m = load_weights(block, along, across, half, wanted)
        product(tile, along, along.shape[1], 1, columns, (n_m, n_b, columns.shape[0]), half, WRITE)
        for i in range(n):
            shift = bias_p[first + i] - factors[2]
            for cell in range(n_b):
                tile[i, cell] += shift
        if kind == BERNOULLI:
            _bernoulli(tile, n, first, lists, marks, factors, scale, loss_b)
        elif kind == LOG_SUM:
            _log_sum(tile, n, first, lists, state, loss_b)
        elif kind == MULTINOMIAL:
            _multinomial(tile, n, first, lists, state, scale)
        if wanted:
            _sum_rows(tile, n, grad_bias_p, first)
            tile[n:n_m] = 0.0
            if half:
                pack_along(tile_words, tile_along, n_m, n_b)
                pack_across(tile_words, tile_across, n_m, n_b)
            n_r = (n + per_word - 1) // per_word
            n_h = (block.shape[1] + ROWS - 1) // ROWS * ROWS
            product(grad_hb, across, 1, n_hp, tile_across, (n_h, n_b, n_r), half, ADD)
            _weight_gradient(grad_weight_ph[first : first + n], grad_tile, tile_along, rows, half)
