from __future__ import annotations

import numpy as np
import pytest
import torch

from epivi.nn.kernels._decoder import TILE
from epivi.nn.linear import PeakBlocks

# more than a tile of peaks in a block, one peak in another, an odd number in the last tile
LONG = np.repeat([0, 1, 2], [2 * TILE + 7, 1, 33])


def build_case(block_of_peak=LONG, *, n_cells=9, n_hidden=20, diagonal=True, density=0.2, seed=0):
    """Random counts (one empty cell, one empty peak) as rows and dense, in user's order, and a layer in block order."""
    rng = np.random.default_rng(seed)
    blocks = PeakBlocks(block_of_peak)
    x_bp = (rng.random((n_cells, block_of_peak.size)) < density) * rng.integers(1, 4, (n_cells, block_of_peak.size))
    x_bp[0] = 0
    x_bp[:, 3] = 0
    rows, columns = np.nonzero(x_bp)
    indptr = torch.from_numpy(np.concatenate([[0], np.bincount(rows, minlength=n_cells).cumsum()]))
    counts = torch.from_numpy(x_bp[rows, columns].astype(np.float32))
    generator = torch.Generator().manual_seed(seed)
    shape = (n_cells, len(blocks.sizes), n_hidden) if diagonal else (n_cells, n_hidden)
    hidden = torch.randn(shape, generator=generator)
    weight = torch.randn(block_of_peak.size, n_hidden, generator=generator) / n_hidden**0.5
    bias = torch.randn(block_of_peak.size, generator=generator)
    order = np.argsort(blocks.rank.numpy())
    dense = torch.from_numpy(x_bp[:, order].astype(np.float64))
    return blocks, (indptr, torch.from_numpy(columns)), counts, dense, (hidden, weight, bias)


@pytest.fixture(scope="session")
def case():
    """Build random data and a layer."""
    return build_case
