from __future__ import annotations

import numpy as np
from numba import njit

from epivi.nn.kernels._lanes import exp_sum_column, softmax_column
from epivi.nn.kernels._vectors import WIDTH


@njit
def exponentials(tile, shift, scale):
    softmax_column(tile, 0, tile.shape[1], tile.shape[0], shift, scale, 0)


@njit
def sums(tile, state):
    exp_sum_column(tile, 0, tile.shape[1], tile.shape[0], state, 0, tile.shape[1])


def test_exponentials_are_right_to_the_last_digits_of_single_precision():
    x = -np.concatenate([np.linspace(0, 86.9, 1000 * WIDTH - 3), [0.0, 1e-30, 86.99]])
    tile = x.astype(np.float32).reshape(1000, WIDTH)
    expected = np.exp(tile.astype(np.float64))
    exponentials(tile, np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    np.testing.assert_allclose(tile, expected, rtol=2.5e-7)


def test_exponentials_of_very_negative_numbers_are_next_to_nothing_and_others_stay_no_numbers():
    tile = np.full((2, WIDTH), -1e30, np.float32)
    tile[1, 0] = np.nan
    exponentials(tile, np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    assert np.isnan(tile[1, 0])
    assert (tile[0] < 2e-38).all()


def test_sums_of_exponentials_go_on_from_tile_to_tile():
    tile = np.random.default_rng(0).normal(0, 30, (50, WIDTH)).astype(np.float32)
    state = np.stack([np.full(WIDTH, -np.inf), np.zeros(WIDTH)]).astype(np.float32)
    for part in (tile[:20], tile[20:]):
        sums(np.ascontiguousarray(part), state)
    np.testing.assert_array_equal(state[0], tile.max(0))
    expected = np.logaddexp.reduce(tile.astype(np.float64), axis=0)
    np.testing.assert_allclose(state[0] + np.log(state[1]), expected, rtol=1e-6)
