"""Likelihoods of many logits at once, written in vectors of the processor, for use inside compiled functions.

Each function goes down WIDTH neighbouring cells of a tile of logits (peaks x cells), so that sums over peaks stay in
registers.
"""

from __future__ import annotations

import math
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from epivi.nn.kernels._vectors import _FLOAT, _INT32, _INT64, _VECTOR, WIDTH, _broadcast, _data

_intrinsic: Any = intrinsic  # its type counts the typing context among the arguments
_WORDS = ir.VectorType(_INT32, WIDTH)
_BYTES = ir.VectorType(ir.IntType(8), WIDTH)
_ROUNDING: Final = 1.5 * 2.0**23  # adding it leaves the nearest whole number in the low bits
_LOWEST: Final = -87.0  # exp of less is not normal in single precision
# exp(f) = 1 + f + f^2 (c0 + c1 f + ...) for |f| <= log(2) / 2, error below 1e-7
_SERIES: Final = tuple(1.0 / math.factorial(k) for k in range(2, 8))


class Lanes:
    """Arithmetic on vectors of WIDTH floats.

    Parameters
    ----------
    builder
        Where the code goes.
    """

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def constant(self, value: float) -> Any:
        """Return a vector of one number."""
        return ir.Constant(_VECTOR, [value] * WIDTH)

    def add(self, a: Any, b: Any) -> Any:
        """Return a + b."""
        return self.builder.fadd(a, b, flags=("contract",))

    def subtract(self, a: Any, b: Any) -> Any:
        """Return a - b."""
        return self.builder.fsub(a, b, flags=("contract",))

    def multiply(self, a: Any, b: Any) -> Any:
        """Return a b."""
        return self.builder.fmul(a, b, flags=("contract",))

    def bits(self, a: Any) -> Any:
        """Return the bits of floats as whole numbers."""
        return self.builder.bitcast(a, _WORDS)

    def absolute(self, a: Any) -> Any:
        """Return |a|."""
        mask = ir.Constant(_WORDS, [0x7FFFFFFF] * WIDTH)
        return self.builder.bitcast(self.builder.and_(self.bits(a), mask), _VECTOR)

    def larger(self, a: Any, b: Any) -> Any:
        """Return the larger of a and b, a where it is not a number."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), b, a)

    def exp(self, a: Any) -> Any:
        """Return exp(a) for a of at most 0; of less than -87 it is that of -87, and not a number stays so."""
        builder = self.builder
        a = self.larger(a, self.constant(_LOWEST))
        shifted = self.add(self.multiply(a, self.constant(1.0 / math.log(2.0))), self.constant(_ROUNDING))
        whole = builder.fsub(shifted, self.constant(_ROUNDING))
        # log(2) in two parts, the first of few bits, so that the difference is exact
        rest = self.subtract(a, self.multiply(whole, self.constant(0.693359375)))
        rest = self.subtract(rest, self.multiply(whole, self.constant(math.log(2.0) - 0.693359375)))
        series = self.constant(_SERIES[-1])
        for coefficient in _SERIES[-2::-1]:
            series = self.add(self.multiply(series, rest), self.constant(coefficient))
        value = self.add(self.multiply(self.multiply(rest, rest), series), self.add(rest, self.constant(1.0)))
        exponent = builder.shl(builder.add(self.bits(shifted), ir.Constant(_WORDS, [127] * WIDTH)), _words(23))
        return self.multiply(value, builder.bitcast(exponent, _VECTOR))

    def load(self, pointer: Any, kind: ir.Type = _VECTOR) -> Any:
        """Return the vector at an address."""
        loaded = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        loaded.align = kind.element.width // 8 if isinstance(kind.element, ir.IntType) else 4
        return loaded

    def store(self, value: Any, pointer: Any) -> None:
        """Write a vector to an address."""
        self.builder.store(value, self.builder.bitcast(pointer, _VECTOR.as_pointer())).align = 4

    def at(self, pointer: Any, offset: Any) -> Any:
        """Return the address so many elements further."""
        return self.builder.gep(pointer, [offset])


class Loop:
    """A loop over rows that carries sums in registers.

    Parameters
    ----------
    builder
        Where the code goes.
    n_rows
        Number of rows, at least one.
    starts
        Sums before the first row.
    """

    def __init__(self, builder: ir.IRBuilder, n_rows: Any, starts: list[Any]) -> None:
        self.builder, self.n_rows = builder, n_rows
        entry = builder.block
        self.body, self.after = builder.append_basic_block("rows"), builder.append_basic_block("after")
        builder.branch(self.body)
        builder.position_at_end(self.body)
        self.row = builder.phi(_INT64)
        self.row.add_incoming(ir.Constant(_INT64, 0), entry)
        self.sums = [builder.phi(start.type) for start in starts]
        for phi, start in zip(self.sums, starts, strict=True):
            phi.add_incoming(start, entry)

    def end(self, sums: list[Any]) -> list[Any]:
        """Close the loop and return the sums after the last row."""
        builder = self.builder
        following = builder.add(self.row, ir.Constant(_INT64, 1))
        self.row.add_incoming(following, builder.block)
        for phi, value in zip(self.sums, sums, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, self.n_rows), self.body, self.after)
        builder.position_at_end(self.after)
        return sums


def _words(value: int) -> ir.Constant:
    return ir.Constant(_WORDS, [value] * WIDTH)


@_intrinsic
def bernoulli_column(typingctx, tile, start, distance, n_rows, marks, factors, scale, cell, sums, n_cells):  # noqa: PLR0913, PLR0917, ARG001
    r"""Turn logits of WIDTH cells into gradients of the weighted Bernoulli loss, and write its parts.

    With s the logit of a closed peak and minus that of an open one, an entry costs
    :math:`\omega \log(1 + e^s) = \omega (\max(s, 0) + \log(1 + e^{-|s|}))`. The second part of many entries needs
    one logarithm, that of a product of numbers between 1 and 2: at most 120 rows fit into a float.

    Parameters
    ----------
    tile, start, distance, n_rows
        Logits, position of the first, distance of rows, number of rows.
    marks
        Bytes, laid out as the tile: 1 where a peak is open.
    factors
        Weights of closed and of open entries.
    scale, cell
        What each cell's gradient is multiplied by, and the first cell.
    sums, n_cells
        Written: rows of n_cells with the sum of the first parts, and the products of closed and of open entries.
    """
    whole = types.int64
    signature = types.void(tile, whole, whole, whole, marks, factors, scale, whole, sums, whole)

    def generate(context, builder, signature, arguments):
        lanes, kinds = Lanes(builder), signature.args
        _, first, distance, n_rows, _, _, _, cell, _, n_cells = arguments
        tile = _data(context, builder, kinds[0], arguments[0], first, _FLOAT)
        marks = _data(context, builder, kinds[4], arguments[4], first, ir.IntType(8))
        factors = _data(context, builder, kinds[5], arguments[5], ir.Constant(_INT64, 0), _FLOAT)
        closed = _broadcast(builder, builder.load(factors))
        opened = _broadcast(builder, builder.load(lanes.at(factors, ir.Constant(_INT64, 1))))
        scale = lanes.load(_data(context, builder, kinds[6], arguments[6], cell, _FLOAT))
        out = _data(context, builder, kinds[8], arguments[8], cell, _FLOAT)
        zero, one = lanes.constant(0.0), lanes.constant(1.0)
        closed_scaled, open_scaled = lanes.multiply(closed, scale), lanes.multiply(opened, scale)
        open_scaled = builder.fsub(zero, open_scaled)
        loop = Loop(builder, n_rows, [zero, one, one])
        linear, product_closed, product_open = loop.sums
        offset = builder.mul(loop.row, distance)
        place = lanes.at(tile, offset)
        logit = lanes.load(place)
        mark = lanes.load(lanes.at(marks, offset), _BYTES)
        is_open = builder.icmp_unsigned("!=", mark, ir.Constant(_BYTES, None))
        s = builder.select(is_open, builder.fsub(zero, logit), logit)
        size = lanes.absolute(s)
        part = lanes.exp(builder.fsub(zero, size))
        above = lanes.add(one, part)
        weight = builder.select(is_open, opened, closed)
        # (s + |s|) / 2 is not a number where s is not
        positive = lanes.multiply(lanes.multiply(lanes.add(s, size), lanes.constant(0.5)), weight)
        share = builder.fdiv(builder.select(builder.fcmp_ordered("<", s, zero), part, one), above)
        gradient = lanes.multiply(share, builder.select(is_open, open_scaled, closed_scaled))
        lanes.store(gradient, place)
        final = loop.end(
            [
                lanes.add(linear, positive),
                lanes.multiply(product_closed, builder.select(is_open, one, above)),
                lanes.multiply(product_open, builder.select(is_open, above, one)),
            ]
        )
        for row, value in enumerate(final):
            lanes.store(value, lanes.at(out, builder.mul(ir.Constant(_INT64, row), n_cells)))
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def exp_sum_column(typingctx, tile, start, distance, n_rows, state, cell, n_cells):  # noqa: ARG001
    """Add the exponentials of the logits of WIDTH cells to their sums, relative to the largest logit so far.

    Parameters
    ----------
    tile, start, distance, n_rows
        Logits, position of the first, distance of rows, number of rows.
    state, cell, n_cells
        Rows of n_cells with the largest logit and the sum, updated; the first cell.
    """
    whole = types.int64
    signature = types.void(tile, whole, whole, whole, state, whole, whole)

    def generate(context, builder, signature, arguments):
        lanes, kinds = Lanes(builder), signature.args
        _, first, distance, n_rows, _, cell, n_cells = arguments
        tile = _data(context, builder, kinds[0], arguments[0], first, _FLOAT)
        largest_at = _data(context, builder, kinds[4], arguments[4], cell, _FLOAT)
        sum_at = lanes.at(largest_at, n_cells)
        before = lanes.load(largest_at)
        loop = Loop(builder, n_rows, [before])
        logit = lanes.load(lanes.at(tile, builder.mul(loop.row, distance)))
        (largest,) = loop.end([lanes.larger(logit, loop.sums[0])])
        scaled = lanes.multiply(lanes.load(sum_at), lanes.exp(lanes.subtract(before, largest)))
        loop = Loop(builder, n_rows, [scaled])
        logit = lanes.load(lanes.at(tile, builder.mul(loop.row, distance)))
        (total,) = loop.end([lanes.add(loop.sums[0], lanes.exp(lanes.subtract(logit, largest)))])
        lanes.store(largest, largest_at)
        lanes.store(total, sum_at)
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def softmax_column(typingctx, tile, start, distance, n_rows, shift, scale, cell):  # noqa: ARG001
    """Replace the logits a of WIDTH cells by scale x exp(a - shift), with a at most the shift.

    Parameters
    ----------
    tile, start, distance, n_rows
        Logits, position of the first, distance of rows, number of rows.
    shift, scale, cell
        Log of the sum of the exponentials and the factor of each cell; the first cell.
    """
    whole = types.int64
    signature = types.void(tile, whole, whole, whole, shift, scale, whole)

    def generate(context, builder, signature, arguments):
        lanes, kinds = Lanes(builder), signature.args
        _, first, distance, n_rows, _, _, cell = arguments
        tile = _data(context, builder, kinds[0], arguments[0], first, _FLOAT)
        shift = lanes.load(_data(context, builder, kinds[4], arguments[4], cell, _FLOAT))
        scale = lanes.load(_data(context, builder, kinds[5], arguments[5], cell, _FLOAT))
        loop = Loop(builder, n_rows, [])
        place = lanes.at(tile, builder.mul(loop.row, distance))
        lanes.store(lanes.multiply(lanes.exp(lanes.subtract(lanes.load(place), shift)), scale), place)
        loop.end([])
        return context.get_dummy_value()

    return signature, generate
