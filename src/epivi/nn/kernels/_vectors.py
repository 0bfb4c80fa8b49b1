r"""The inner loop of all products, written in vectors of the processor, for use inside compiled functions.

One step multiplies ROWS rows of a with a panel of PANEL columns of b and keeps the sums in registers:

.. math:: c_{mn} \mathrel{(+)=} \sum_r a_{mr} b_{rn}

Operands are arrays of 32-bit words. In single precision a word is one value. In half precision it holds the values of
two neighbouring r as bfloat16, the lower r in the lower half, so that there are half as many r; products and sums are
single precision (the instruction vdpbf16ps).

Legend of shapes: m rows, n columns (a multiple of PANEL), r what is summed over.
"""

from __future__ import annotations

import os
from typing import Any, Final

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import intrinsic


def _features() -> dict[str, bool]:
    """Features of the processor, none where numba is told to compile for another one."""
    return {} if os.environ.get("NUMBA_CPU_NAME") else dict(get_host_cpu_features())


FEATURES: Final = _features()
# floats of a register, and registers of a panel: with ROWS rows the sums stay in the registers that there are
WIDTH: Final = 16 if FEATURES.get("avx512f") else 8 if FEATURES.get("avx2") else 4
PANEL: Final = WIDTH * (2 if WIDTH == 8 else 4)
ROWS: Final = 4
HAS_BF16: Final = bool(FEATURES.get("avx512bf16") and FEATURES.get("avx512f"))

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, WIDTH)


class _BFloat(ir.Type):
    """The type bfloat of LLVM, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _add_product(builder: ir.IRBuilder, total: Any, a: Any, b: Any, *, pairs: bool) -> Any:
    """Return total + a b, element by element; of both values of a word if there are pairs."""
    if not pairs:
        return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))
    halves = ir.VectorType(_BFloat(), 2 * WIDTH)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR, halves, halves]), name)
    return builder.call(function, [total, builder.bitcast(a, halves), builder.bitcast(b, halves)])


def _broadcast(builder: ir.IRBuilder, value: Any) -> Any:
    vector = ir.VectorType(value.type, WIDTH)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_INT32, 0))
    zeros = ir.Constant(ir.VectorType(_INT32, WIDTH), None)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


class _Step:
    """Emits the code of one step.

    Parameters
    ----------
    builder
        Where the code goes.
    pairs
        Whether words hold pairs of bfloat16.
    """

    def __init__(self, builder: ir.IRBuilder, *, pairs: bool) -> None:
        self.builder, self.pairs = builder, pairs
        self.word = _INT32 if pairs else _FLOAT  # what a word is read as

    def _at(self, pointer: Any, *offsets: Any) -> Any:
        total = offsets[0]
        for offset in offsets[1:]:
            total = self.builder.add(total, offset)
        return self.builder.gep(pointer, [total])

    def _load(self, pointer: Any, kind: ir.Type) -> Any:
        loaded = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        loaded.align = 4
        return loaded

    def emit(self, c: Any, ldc: Any, a: Any, lda: tuple[Any, Any], b: Any, ldb: Any, n_r: Any, add: Any) -> None:
        """Emit c (+)= a b for ROWS rows and one panel; ``lda`` holds the distances of rows and of r in a."""
        builder, block = self.builder, self.builder.append_basic_block
        vectors = range(PANEL // WIDTH)
        zero = ir.Constant(_INT64, 0)
        entry, loop, done = builder.block, block("loop"), block("done")
        is_empty = builder.icmp_signed("<=", n_r, zero)
        builder.cbranch(is_empty, done, loop)
        builder.position_at_end(loop)
        r = builder.phi(_INT64)
        r.add_incoming(zero, entry)
        sums = {(m, v): builder.phi(_VECTOR) for m in range(ROWS) for v in vectors}
        row_b = builder.mul(r, ldb)
        kind = ir.VectorType(self.word, WIDTH)
        parts = [self._load(self._at(b, row_b, ir.Constant(_INT64, v * WIDTH)), kind) for v in vectors]
        step_a = builder.mul(r, lda[1])
        new = {}
        for m in range(ROWS):
            row_a = builder.mul(ir.Constant(_INT64, m), lda[0])
            spread = _broadcast(builder, self._load(self._at(a, row_a, step_a), self.word))
            for v in vectors:
                new[m, v] = _add_product(builder, sums[m, v], spread, parts[v], pairs=self.pairs)
        following = builder.add(r, ir.Constant(_INT64, 1))
        r.add_incoming(following, loop)
        nothing = ir.Constant(_VECTOR, None)
        for key, phi in sums.items():
            phi.add_incoming(nothing, entry)
            phi.add_incoming(new[key], loop)
        builder.cbranch(builder.icmp_signed("<", following, n_r), loop, done)
        builder.position_at_end(done)
        for (m, v), total in new.items():
            result = builder.phi(_VECTOR)
            result.add_incoming(nothing, entry)
            result.add_incoming(total, loop)
            new[m, v] = result
        for (m, v), total in new.items():
            place = self._at(c, builder.mul(ir.Constant(_INT64, m), ldc), ir.Constant(_INT64, v * WIDTH))
            old = self._load(place, _VECTOR)
            # x * 0 would keep what is not finite
            start = builder.select(add, old, nothing)
            stored = builder.store(builder.fadd(start, total), builder.bitcast(place, _VECTOR.as_pointer()))
            stored.align = 4


def _data(context: Any, builder: ir.IRBuilder, kind: Any, array: Any, start: Any, element: ir.Type) -> Any:
    """Return the address of an element of an array, as a pointer to what it is read as."""
    pointer = context.make_array(kind)(context, builder, array).data
    return builder.gep(builder.bitcast(pointer, element.as_pointer()), [start])


def _make_step(*, pairs: bool) -> Any:
    @intrinsic
    def step(typingctx, c, c_start, ldc, a, a_start, lda, ldr, b, b_start, ldb, n_r, add):  # noqa: PLR0913, PLR0917, ARG001
        whole = types.int64
        signature = types.void(c, whole, whole, a, whole, whole, whole, b, whole, whole, whole, types.boolean)

        def generate(context, builder, signature, arguments):
            if pairs and not HAS_BF16:
                return context.get_dummy_value()  # is never reached
            word = _INT32 if pairs else _FLOAT
            kinds = signature.args
            _Step(builder, pairs=pairs).emit(
                _data(context, builder, kinds[0], arguments[0], arguments[1], _FLOAT),
                arguments[2],
                _data(context, builder, kinds[3], arguments[3], arguments[4], word),
                (arguments[5], arguments[6]),
                _data(context, builder, kinds[7], arguments[7], arguments[8], word),
                arguments[9],
                arguments[10],
                builder.icmp_unsigned("!=", arguments[11], ir.Constant(arguments[11].type, 0)),
            )
            return context.get_dummy_value()

        return signature, generate

    return step


# step(c, c_start, ldc, a, a_start, lda, ldr, b, b_start, ldb, n_r, add): starts and distances count words
step_single = _make_step(pairs=False)
step_half = _make_step(pairs=True)
