"""Compiled logits and probabilities of one block of peaks, written cell by cell. Imported on first use.

A tile of logits has shape (peaks, cells) and what is returned (cells, peaks): squares of it are turned in registers.

Legend of shapes: b cells of the batch, p peaks, h hidden units; a trailing + means filled up with zeros to a whole
number of panels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from epivi.nn.kernels._decoder import TILE, WRITE, hidden_words, load_weights, product
from epivi.nn.kernels._lanes import Lanes
from epivi.nn.kernels._vectors import _FLOAT, _INT32, _INT64, WIDTH, _broadcast, _data


def _turned(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """Return the columns of a square of WIDTH rows: in step s, rows i and i + s change places of their halves."""
    distance = 1
    while distance < WIDTH:
        lanes = range(WIDTH)
        # the lanes of the second operand are counted from WIDTH on
        low = [lane if not lane & distance else WIDTH + lane - distance for lane in lanes]
        high = [lane + distance if not lane & distance else WIDTH + lane for lane in lanes]
        low_mask, high_mask = (ir.Constant(ir.VectorType(_INT32, WIDTH), mask) for mask in (low, high))
        for i in range(WIDTH):
            if not i & distance:
                a, b = rows[i], rows[i + distance]
                rows[i] = builder.shuffle_vector(a, b, low_mask)
                rows[i + distance] = builder.shuffle_vector(a, b, high_mask)
        distance *= 2
    return rows


def _probability(lanes: Lanes, logit: Any) -> Any:
    """Return 1 / (1 + exp(-logit))."""
    builder, one = lanes.builder, lanes.constant(1.0)
    part = lanes.exp(builder.fsub(lanes.constant(0.0), lanes.absolute(logit)))
    is_negative = builder.fcmp_ordered("<", logit, lanes.constant(0.0))
    return builder.fdiv(builder.select(is_negative, part, one), lanes.add(one, part))


def _make_square(*, squash: bool) -> Any:
    @intrinsic
    def write_square(typingctx, tile, start, distance, added, first, out, place, out_distance):  # noqa: PLR0913, PLR0917, ARG001
        """Write WIDTH x WIDTH logits (or probabilities), one row of the tile a column of the output.

        Parameters
        ----------
        tile, start, distance
            Products of peaks and cells, position of the first, distance of rows.
        added, first
            What is added to each row, and its first row.
        out, place, out_distance
            Output, position of the first element, distance of rows.
        """
        whole = types.int64
        signature = types.void(tile, whole, whole, added, whole, out, whole, whole)

        def generate(context, builder, signature, arguments):
            lanes, kinds = Lanes(builder), signature.args
            tile = _data(context, builder, kinds[0], arguments[0], arguments[1], _FLOAT)
            added = _data(context, builder, kinds[3], arguments[3], arguments[4], _FLOAT)
            out = _data(context, builder, kinds[5], arguments[5], arguments[6], _FLOAT)
            rows = []
            for i in range(WIDTH):
                number = ir.Constant(_INT64, i)
                logit = lanes.load(lanes.at(tile, builder.mul(number, arguments[2])))
                logit = lanes.add(logit, _broadcast(builder, builder.load(lanes.at(added, number))))
                rows.append(_probability(lanes, logit) if squash else logit)
            for i, column in enumerate(_turned(builder, rows)):
                lanes.store(column, lanes.at(out, builder.mul(ir.Constant(_INT64, i), arguments[7])))
            return context.get_dummy_value()

        return signature, generate

    return write_square


write_logits, write_probabilities = (_make_square(squash=squash) for squash in (False, True))


@njit(cache=True, nogil=True)
def _write_tile(tile, n_rows, added, out_bp, peak, squash):  # pragma: no cover - compiled
    """Write a tile; where the output ends inside a square, by way of a whole one."""
    n_b, n_p = out_bp.shape
    square = np.empty((WIDTH, WIDTH), np.float32)
    for cell in range(0, n_b, WIDTH):
        cells = min(WIDTH, n_b - cell)
        for i in range(0, n_rows, WIDTH):
            peaks, start = min(WIDTH, n_rows - i), i * tile.shape[1] + cell
            is_whole = cells == WIDTH and peaks == WIDTH
            target = out_bp if is_whole else square
            place, distance = (cell * n_p + peak + i, n_p) if is_whole else (0, WIDTH)
            if squash:
                write_probabilities(tile, start, tile.shape[1], added, i, target, place, distance)
            else:
                write_logits(tile, start, tile.shape[1], added, i, target, place, distance)
            if not is_whole:
                for c in range(cells):
                    for k in range(peaks):
                        out_bp[cell + c, peak + i + k] = square[c, k]


@njit(cache=True, nogil=True)
def outputs_of_block(hidden_bch, j, weight_ph, bias_p, peaks, shift, squash, out_bp, half):  # noqa: PLR0913, PLR0917  # pragma: no cover - compiled
    """Write logits less a shift, or with ``squash`` their probabilities, of the peaks first to last (exclusive).

    Arguments are those of :func:`epivi.nn.kernels._decoder.decode_block`; ``half`` is false: products are of
    single precision.
    """
    columns, rows = hidden_words(hidden_bch, j, half)
    n_b, n_hp = columns.shape[1], rows.shape[1]
    tile = np.zeros((TILE, n_b), np.float32)
    along = np.zeros((TILE, n_hp), np.uint32)
    added = np.zeros(TILE, np.float32)
    weight_words = weight_ph.view(np.uint32)
    for first in range(peaks[0], peaks[1], TILE):
        n = min(TILE, peaks[1] - first)
        n_m = load_weights(weight_words[first : first + n], along, along, half, half)
        product(tile, along, n_hp, 1, columns, (n_m, n_b, columns.shape[0]), half, WRITE)
        for i in range(n):
            added[i] = bias_p[first + i] - shift
        _write_tile(tile, n, added, out_bp, first, squash)
