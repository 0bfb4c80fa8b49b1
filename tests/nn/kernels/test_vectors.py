from __future__ import annotations

import numpy as np
import pytest

from epivi.nn.kernels._decoder import ADD, WRITE, pack_across, pack_along, padded, product
from epivi.nn.kernels._vectors import HAS_BF16, PANEL, ROWS, WIDTH


def test_padding_is_to_whole_panels():
    assert PANEL % WIDTH == 0
    assert [padded(n) for n in (0, 1, PANEL, PANEL + 1)] == [0, PANEL, PANEL, 2 * PANEL]


def test_products_of_strided_operands_are_added_or_written():
    rng = np.random.default_rng(0)
    a, b, c = (
        rng.normal(size=shape).astype(np.float32) for shape in [(2 * ROWS, 7), (7, 2 * PANEL), (2 * ROWS, 2 * PANEL)]
    )
    expected, out = a.astype(float) @ b, c.copy()
    shape = (2 * ROWS, 2 * PANEL, 7)
    product(out, a.view(np.uint32), 7, 1, b.view(np.uint32), shape, False, ADD)
    np.testing.assert_allclose(out, c + expected, rtol=1e-5, atol=1e-5)
    transposed = np.ascontiguousarray(a.T).view(np.uint32)
    product(out, transposed, 1, 2 * ROWS, b.view(np.uint32), shape, False, WRITE)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    product(out, transposed, 1, 2 * ROWS, b.view(np.uint32), (2 * ROWS, 2 * PANEL, 0), False, WRITE)
    assert not out.any()


def test_values_are_rounded_to_the_nearest_bfloat16():
    import torch

    x = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    along, across = np.zeros((4, 3), np.uint32), np.zeros((2, 6), np.uint32)
    pack_along(x.view(np.uint32), along, 4, 6)
    np.testing.assert_array_equal(along.view(np.uint16), expected)
    pack_across(x.view(np.uint32), across, 4, 6)
    np.testing.assert_array_equal(across & 0xFFFF, expected[0::2])
    np.testing.assert_array_equal(across >> 16, expected[1::2])


@pytest.mark.skipif(not HAS_BF16, reason="the processor does not multiply bfloat16")
def test_pairs_are_multiplied_and_summed_in_single_precision():
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-9, 9, shape).astype(np.float32) for shape in [(ROWS, 10), (10, PANEL)])
    along, across = np.zeros((ROWS, 5), np.uint32), np.zeros((5, PANEL), np.uint32)
    pack_along(a.view(np.uint32), along, ROWS, 10)
    pack_across(b.view(np.uint32), across, 10, PANEL)
    out = np.empty((ROWS, PANEL), np.float32)
    product(out, along, 5, 1, across, (ROWS, PANEL, 5), True, WRITE)
    np.testing.assert_array_equal(out, a @ b)  # whole numbers below 256 are exact
