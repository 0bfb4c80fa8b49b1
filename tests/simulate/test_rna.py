from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from epivi.simulate._rna import RnaSimulator


def simulator(**changes):
    arguments = {"dims": 4, "noise": 0.5, "subtype_sd": 0.5, "median": 1000, "log_sd": 0.5, "n_genes": 30}
    return RnaSimulator(**{**arguments, "sees_subtypes": True, "seed": 0, **changes})


def test_centres_are_nested_normal_draws():
    rna = simulator(dims=20_000, subtype_sd=0.3)
    centres = rna.centres([2, 1])
    assert centres.shape == (3, 20_000)
    np.testing.assert_allclose(centres.std(axis=1), np.sqrt(1 + 0.3**2), rtol=0.03)
    assert (centres[0] - centres[1]).std() == pytest.approx(0.3 * np.sqrt(2), rel=0.03)
    assert (centres[0] - centres[2]).std() == pytest.approx(np.sqrt(2 * (1 + 0.3**2)), rel=0.03)


def test_hidden_subtypes_share_their_centre():
    centres = simulator(sees_subtypes=False).centres([2, 2])
    np.testing.assert_array_equal(centres[0], centres[1])
    np.testing.assert_array_equal(centres[2], centres[3])
    assert not np.allclose(centres[0], centres[2])


def test_embeddings_scatter_about_the_centre_of_their_cell():
    centre_nd = np.repeat([[3.0, -1.0, 0.0, 2.0]], 20_000, axis=0)
    batch_n = np.repeat([0, 1], 10_000)
    r_nd = simulator(noise=0.2).embeddings(centre_nd, batch_n, shuffle=False)
    np.testing.assert_allclose(r_nd.mean(axis=0), centre_nd[0], atol=0.01)
    np.testing.assert_allclose(r_nd.std(axis=0), 0.2, rtol=0.03)
    shuffled = simulator(noise=0.2).embeddings(centre_nd, batch_n, shuffle=True)
    assert (shuffled != r_nd).any()
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(r_nd, axis=0))


def test_depths_are_lognormal_and_correlated_one_half_with_those_of_atac():
    rng = np.random.default_rng(0)
    atac_n = np.exp(rng.normal(np.log(5000), 0.7, 20_000))
    depth_n = simulator().depths(atac_n, np.zeros(20_000, dtype=int))
    assert np.median(depth_n) == pytest.approx(1000, rel=0.03)
    assert np.log(depth_n).std() == pytest.approx(0.5, rel=0.03)
    assert np.corrcoef(np.log(depth_n), np.log(atac_n))[0, 1] == pytest.approx(0.5, abs=0.02)


def test_equal_or_zero_atac_depths_are_no_problem():
    depth_n = simulator().depths(np.array([7, 7, 0, 5]), np.array([0, 0, 1, 2]))
    assert (depth_n >= 1).all()


def test_counts_are_poisson_about_the_softmax():
    rna = simulator()
    r_nd = np.repeat([[1.0, -1.0, 0.5, 0.0]], 5000, axis=0)
    counts = rna.counts(r_nd, np.full(5000, 1000), np.zeros(5000, dtype=int)).toarray()
    mean_g = 1000 * softmax(r_nd[0] @ rna.loadings())
    np.testing.assert_allclose(counts.mean(axis=0), mean_g, atol=5 * np.sqrt(mean_g.max() / 5000))
    np.testing.assert_allclose((counts.var(axis=0) / mean_g).mean(), 1.0, atol=0.03)


def test_loadings_give_logits_of_unit_variance():
    loadings_dg = simulator(dims=50, n_genes=4000).loadings()
    assert (np.random.default_rng(0).normal(size=(200, 50)) @ loadings_dg).var() == pytest.approx(1.0, rel=0.05)
