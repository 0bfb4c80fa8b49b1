from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from epivi.nn.kernels import layer_outputs
from epivi.nn.kernels._outputs import _write_tile, write_logits
from epivi.nn.kernels._vectors import WIDTH


@njit
def turn(tile, added, out):
    write_logits(tile, 0, tile.shape[1], added, 0, out, 0, out.shape[1])


def test_a_square_is_turned_and_added_to_row_by_row():
    tile = np.arange(WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH)
    added, out = np.arange(WIDTH, dtype=np.float32) / 4, np.zeros((WIDTH, WIDTH), np.float32)
    turn(tile, added, out)
    np.testing.assert_array_equal(out, (tile + added[:, None]).T)


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize(("n_cells", "n_peaks"), [(1, 1), (WIDTH, WIDTH), (WIDTH + 3, 2 * WIDTH + 1), (5, 3 * WIDTH)])
def test_tiles_of_any_size_are_written_and_nothing_else(n_cells, n_peaks, squash):
    rng, first, total = np.random.default_rng(0), 2, n_peaks + 5
    tile = rng.normal(0, 20, (4 * WIDTH, 2 * WIDTH)).astype(np.float32)
    added, out = rng.normal(size=4 * WIDTH).astype(np.float32), np.full((n_cells, total), 7.0, np.float32)
    _write_tile(tile, n_peaks, added, out, first, squash)
    expected = (tile.astype(np.float64) + added[:, None])[:n_peaks, :n_cells].T
    expected = 1 / (1 + np.exp(-expected)) if squash else expected
    np.testing.assert_allclose(out[:, first : first + n_peaks], expected, rtol=2e-6, atol=1e-6)
    assert (out[:, :first] == 7).all()
    assert (out[:, first + n_peaks :] == 7).all()


def test_probabilities_of_extreme_logits_and_of_no_numbers():
    tile = np.zeros((WIDTH, WIDTH), np.float32)
    tile[:4, 0] = [200.0, -200.0, np.nan, 0.0]
    out = np.zeros((WIDTH, WIDTH), np.float32)
    _write_tile(tile, WIDTH, np.zeros(WIDTH, np.float32), out, 0, True)
    assert out[0, 0] == 1.0
    assert 0 <= out[0, 1] < 2e-38
    assert np.isnan(out[0, 2])
    assert out[0, 3] == 0.5


@pytest.mark.parametrize("shift", [None, 1.5])
def test_a_cell_gets_the_same_alone_as_with_others(case, shift):
    blocks, _, _, _, (hidden, weight, bias) = case(n_cells=37, n_hidden=20)
    together = layer_outputs(hidden, weight, bias, blocks, shift=shift)
    for cell in (0, 15, 36):
        alone = layer_outputs(hidden[cell : cell + 1], weight, bias, blocks, shift=shift)
        assert torch.equal(alone[0], together[cell])


def test_outputs_are_written_to_the_memory_that_is_given(case):
    blocks, _, _, _, (hidden, weight, bias) = case()
    memory = torch.full((hidden.shape[0] + 2, blocks.n_peaks), torch.nan)
    found = layer_outputs(hidden, weight, bias, blocks, out_bp=memory[1:-1])
    assert found.data_ptr() == memory[1:].data_ptr()
    assert torch.equal(memory[1:-1], layer_outputs(hidden, weight, bias, blocks))
    assert memory[[0, -1]].isnan().all()
