"""Sums of few rows of a matrix, and one row added to few, in vectors of the processor.

Both take a strip of a matrix, N_VECTORS registers wide, and a list of row numbers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from epivi.nn.kernels._lanes import Lanes, Loop
from epivi.nn.kernels._vectors import _FLOAT, _INT32, _INT64, _VECTOR, PANEL, WIDTH, _broadcast, _data

WHOLE = types.int64


def _offset(vector: int) -> Any:
    return ir.Constant(_INT64, vector * WIDTH)


class _Rows:
    """The rows that a list names, one after the other."""

    def __init__(self, context: Any, builder: Any, kinds: Any, arguments: Any, *, weighted: bool) -> None:
        matrix, start, distance, cells, values, first = arguments[:6]
        self.lanes, self.builder, self.distance = Lanes(builder), builder, distance
        self.matrix = _data(context, builder, kinds[0], matrix, start, _FLOAT)
        self.cells = _data(context, builder, kinds[3], cells, first, _INT32)
        self.values = _data(context, builder, kinds[4], values, first, _FLOAT) if weighted else None

    def place(self, row: Any) -> Any:
        """Return the address of the row of an entry."""
        cell = self.builder.zext(self.builder.load(self.lanes.at(self.cells, row)), _INT64)
        return self.lanes.at(self.matrix, self.builder.mul(cell, self.distance))

    def weigh(self, row: Any, vectors: list[Any]) -> list[Any]:
        """Multiply with the value of an entry."""
        if self.values is None:
            return vectors
        value = _broadcast(self.builder, self.builder.load(self.lanes.at(self.values, row)))
        return [self.lanes.multiply(vector, value) for vector in vectors]


def _signature(matrix: Any, cells: Any, values: Any, other: Any) -> Any:
    return types.void(matrix, WHOLE, WHOLE, cells, values, WHOLE, WHOLE, other, WHOLE)


def _make_add(n_vectors: int, *, weighted: bool) -> Any:
    @intrinsic
    def add_to_rows(typingctx, matrix, start, distance, cells, values, first, n, row, row_start):  # noqa: PLR0913, PLR0917, ARG001
        """Add one row, times the value of each entry, to the rows of n entries (at least one)."""

        def generate(context, builder, signature, arguments):
            rows = _Rows(context, builder, signature.args, arguments, weighted=weighted)
            lanes = rows.lanes
            source = _data(context, builder, signature.args[7], arguments[7], arguments[8], _FLOAT)
            added = [lanes.load(lanes.at(source, _offset(v))) for v in range(n_vectors)]
            loop = Loop(builder, arguments[6], [])
            place = rows.place(loop.row)
            for v, vector in enumerate(rows.weigh(loop.row, added)):
                part = lanes.at(place, _offset(v))
                lanes.store(lanes.add(lanes.load(part), vector), part)
            loop.end([])
            return context.get_dummy_value()

        return _signature(matrix, cells, values, row), generate

    return add_to_rows


def _make_sum(n_vectors: int, *, weighted: bool) -> Any:
    @intrinsic
    def sum_of_rows(typingctx, matrix, start, distance, cells, values, first, n, row, row_start):  # noqa: PLR0913, PLR0917, ARG001
        """Write the sum of the rows of n entries (at least one), each times its value."""

        def generate(context, builder, signature, arguments):
            rows = _Rows(context, builder, signature.args, arguments, weighted=weighted)
            lanes = rows.lanes
            target = _data(context, builder, signature.args[7], arguments[7], arguments[8], _FLOAT)
            loop = Loop(builder, arguments[6], [ir.Constant(_VECTOR, None)] * n_vectors)
            place = rows.place(loop.row)
            parts = rows.weigh(loop.row, [lanes.load(lanes.at(place, _offset(v))) for v in range(n_vectors)])
            sums = loop.end([lanes.add(total, part) for total, part in zip(loop.sums, parts, strict=True)])
            for v, total in enumerate(sums):
                lanes.store(total, lanes.at(target, _offset(v)))
            return context.get_dummy_value()

        return _signature(matrix, cells, values, row), generate

    return sum_of_rows


add_wide, add_wide_weighted = (_make_add(PANEL // WIDTH, weighted=weighted) for weighted in (False, True))
add_narrow, add_narrow_weighted = (_make_add(1, weighted=weighted) for weighted in (False, True))
sum_wide, sum_wide_weighted = (_make_sum(PANEL // WIDTH, weighted=weighted) for weighted in (False, True))
sum_narrow, sum_narrow_weighted = (_make_sum(1, weighted=weighted) for weighted in (False, True))
