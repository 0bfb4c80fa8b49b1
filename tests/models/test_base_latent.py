from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from epivi.models.base_latent import RowNoise


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 10**9), min_size=1, max_size=9), seed=st.integers(0, 2**64 - 1))
def test_noise_depends_on_seed_and_row_alone(rows, seed):
    noise = RowNoise(seed, rows)
    found = torch.stack([noise.draw(3) for _ in range(2)])
    for at, row in enumerate(rows):
        alone = RowNoise(seed, [row])
        assert torch.equal(found[:, at], torch.stack([alone.draw(3)[0] for _ in range(2)]))
    assert found.dtype == torch.float32
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], RowNoise(seed ^ 1, rows).draw(3))


def test_noise_is_standard_normal_and_independent_between_rows_and_seeds():
    noise = np.stack([RowNoise(seed, range(500)).draw(20).numpy() for seed in (0, 1)])
    assert kstest(noise.ravel(), "norm").pvalue > 1e-3
    flat = noise.reshape(1000, 20)
    correlations = np.corrcoef(flat)[np.triu_indices(1000, 1)]
    assert np.abs(correlations.mean()) < 0.01
    assert np.isclose(correlations.std(), 20**-0.5, rtol=0.1)  # of independent pairs


def test_no_cells_get_no_noise():
    assert RowNoise(0, []).draw(4).shape == (0, 4)
