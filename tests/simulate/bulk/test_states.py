"""States, loadings and motifs of the simulated bulk experiments."""

import inspect

import numpy as np
import pytest

from epivi.simulate import bulk
from epivi.simulate.bulk._setting import bulk_setting
from epivi.simulate.bulk._states import draw_dna, draw_genome, draw_states, loadings, log_rates, motifs, steepness

DEFAULTS = {name: entry.default for name, entry in inspect.signature(bulk).parameters.items()}


def setting(**options):
    return bulk_setting(DEFAULTS | options)


@pytest.mark.parametrize("n_assays", [3, 4, 6, 9, 14])
@pytest.mark.parametrize("n_factors", [3, 4, 6])
def test_the_pair_alone_sees_the_first_factor(n_assays, n_factors):
    weight = loadings(n_assays, n_factors)
    np.testing.assert_allclose((weight**2).sum(axis=1), 1.0)
    assert (weight[:2, 0] == 0.9).all()
    assert (weight[2:, 0] == 0).all()
    common = np.abs(weight @ weight.T) - np.eye(n_assays)
    assert common[0].argmax() == 1
    assert common[1].argmax() == 0
    assert common[0, 1] == pytest.approx(0.81)
    # no other assay repeats another one
    assert common[2:, 2:].max() < 0.999


def test_states_have_the_moments_asked_for():
    s = setting(chrom_sizes=[60_000], domain=4, own=0.3, motif_share=0.6)
    genome = draw_genome(s)
    states = np.stack([draw_states(s, genome, b) for b in range(4)])
    assert states.mean(axis=(0, 2)) == pytest.approx(np.zeros(3), abs=0.05)
    assert states.var(axis=2).mean(axis=0) == pytest.approx(np.ones(3), abs=0.05)
    between = np.corrcoef(states[:, 0])[np.triu_indices(4, 1)]
    assert between == pytest.approx(np.full(6, 0.7), abs=0.04)
    assert np.corrcoef(genome.shared_kl[1], genome.motif_kl[1])[0, 1] ** 2 == pytest.approx(0.6, abs=0.03)
    assert np.abs(np.corrcoef(genome.shared_kl)[np.triu_indices(3, 1)]).max() < 0.05


def test_domains_are_as_long_as_asked_and_break_at_gaps():
    s = setting(chrom_sizes=[20_000, 10_000], domain=10, gap=4)
    genome = draw_genome(s)
    n_domains = genome.domain_kl.max(axis=1) + 1
    assert 30_000 / n_domains == pytest.approx(np.full(3, 10.0), rel=0.06)
    for first in (10_000, 20_000, 25_000):
        assert (genome.domain_kl[:, first] != genome.domain_kl[:, first - 1]).all()
    for k, domain in enumerate(genome.domain_kl):
        inside = np.diff(domain) == 0
        assert (np.diff(genome.shared_kl[k])[inside] == 0).all()
        assert (np.diff(draw_states(s, genome, 0)[k])[inside] == 0).all()


def test_log_rates_follow_the_formula():
    s = setting(noise=0.0, level=[1, 2, 3, 4, 5, 6], gain=0.8)
    state = draw_states(s, draw_genome(s), 2)
    seen = loadings(6, 3) @ state
    rate = log_rates(s, state, 2)
    np.testing.assert_allclose(rate, np.log(s.level)[:, None] + 0.8 * np.tanh(steepness(s)[:, None] * seen))
    assert ((steepness(s) >= 0.7) & (steepness(s) <= 1.5)).all()
    noisy = log_rates(setting(noise=0.3, level=[1, 2, 3, 4, 5, 6], gain=0.8), state, 2) - rate
    assert noisy.std(axis=1) == pytest.approx(np.full(6, 0.3), rel=0.15)
    assert np.abs(np.corrcoef(noisy)[np.triu_indices(6, 1)]).max() < 0.2


def test_motifs_are_in_the_bins_that_have_them():
    s = setting(chrom_sizes=[400, 200], bin_size_bp=50)
    genome = draw_genome(s)
    dna = draw_dna(s, genome)
    assert (dna.dtype, dna.shape, dna.max()) == (np.uint8, (600 * 50,), 3)
    windows = np.lib.stride_tricks.sliding_window_view(dna.reshape(600, 50), 8, axis=1)
    for motif, has in zip(motifs(s), genome.motif_kl, strict=True):
        found = (windows == motif).all(axis=-1).any(axis=-1)
        assert found[has].all()
        # by chance a bin has one in 43 / 4⁸
        assert found[~has].mean() < 0.02
