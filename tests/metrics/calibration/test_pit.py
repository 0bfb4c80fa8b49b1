"""The PIT of data drawn from the prediction is uniform, and coverage is what was promised."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from epivi._errors import DataError
from epivi.metrics import (
    coverage,
    gaussian_pit,
    interval_coverage,
    nb_pit,
    nb_quantile,
    pit_distance,
    randomised_pit,
)

N = 40_000
LEVELS = np.array([0.1, 0.5, 0.9, 0.95, 0.99])


@pytest.fixture(scope="module")
def sample():
    rng = np.random.default_rng(1)
    mean, dispersion = np.exp(rng.normal(0, 1, N)), np.exp(rng.uniform(-1, 3, N))
    return rng.negative_binomial(dispersion, dispersion / (dispersion + mean)), mean, dispersion


def test_pit_of_the_true_law_is_uniform(sample):
    counts, mean, dispersion = sample
    u = nb_pit(counts, mean, dispersion, seed=3)
    assert stats.kstest(u, "uniform").pvalue > 0.01
    np.testing.assert_allclose(coverage(u, LEVELS), LEVELS, atol=0.01)
    assert pit_distance(u) < 0.01
    x = np.random.default_rng(0).normal(mean, np.sqrt(dispersion))
    assert stats.kstest(gaussian_pit(x, mean, dispersion), "uniform").pvalue > 0.01


def test_pit_shows_what_is_wrong(sample):
    counts, mean, dispersion = sample
    narrow, wide = nb_pit(counts, mean, 100 * dispersion), nb_pit(counts, mean, dispersion / 5)
    assert coverage(narrow, 0.9) < 0.87 < 0.92 < coverage(wide, 0.9)
    assert min(pit_distance(narrow), pit_distance(wide), pit_distance(nb_pit(counts, 2 * mean, dispersion))) > 0.03


def test_equal_tailed_intervals_of_counts_cover_too_much(sample):
    counts, mean, dispersion = sample
    lower, upper = (nb_quantile(q, mean, dispersion) for q in (0.25, 0.75))
    assert interval_coverage(counts, lower, upper) > 0.65
    assert coverage(nb_pit(counts, mean, dispersion), 0.5) == pytest.approx(0.5, abs=0.01)
    # of a continuous law both are the same
    x = np.random.default_rng(0).normal(size=N)
    end = stats.norm.ppf(0.75)
    assert interval_coverage(x, -end, end) == coverage(gaussian_pit(x, 0, 1), 0.5)


def test_randomised_pit_lies_in_its_step_and_follows_the_seed(sample):
    counts, mean, dispersion = (part[:500] for part in sample)
    law = stats.nbinom(dispersion, dispersion / (dispersion + mean))
    below, at = law.cdf(counts - 1), law.cdf(counts)
    u = randomised_pit(counts, below, at, seed=4)
    assert ((below <= u) & (u <= at)).all()
    np.testing.assert_allclose((u - below) / (at - below), np.random.default_rng(4).random(500), atol=1e-6)
    np.testing.assert_allclose(u, nb_pit(counts, mean, dispersion, seed=4), atol=1e-12)
    np.testing.assert_array_equal(u, randomised_pit(counts, below, at, seed=np.random.default_rng(4)))
    assert (u != randomised_pit(counts, below, at, seed=5)).all()
    assert nb_pit(counts.reshape(5, 100), 1.0, 1.0).shape == (5, 100)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
@settings(max_examples=80, deadline=None)
def test_distance_equals_scipy_and_coverage_counts(u):
    assert pit_distance(u) == pytest.approx(stats.kstest(u, "uniform").statistic, abs=1e-12)
    assert coverage(u, [0.0, 1.0]).tolist()[1] == 1.0
    for level in (0.2, 0.55):
        inside = np.abs(np.array(u) - 0.5) <= level / 2 + 1e-12
        assert coverage(u, level) == inside.mean()


def test_coverage_keeps_the_shape_of_levels_and_bounds_are_inside():
    assert coverage([0.25, 0.5, 0.75], 0.5) == 1.0
    assert coverage([[0.0, 0.3], [0.5, 0.96]], [0.5, 0.9, 1.0]).tolist() == [0.5, 0.5, 1.0]
    assert interval_coverage([1, 2, 3], [-np.inf, 2, 3.5], np.inf) == 2 / 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: randomised_pit([1, 2], [0.1, 0.2], [0.3]), r"counts \(2,\), cdf_below \(2,\), cdf_at \(1,\)"),
        (lambda: randomised_pit([1], [0.5], [0.2]), "cdf_below exceeds cdf_at in 1 of 1 values"),
        (lambda: randomised_pit([0], [0.1], [0.2]), "cdf_below is not 0 for 1 counts of 0"),
        (lambda: randomised_pit([1], [0.1], [1.2]), "cdf_at holds 1 values"),
        (lambda: randomised_pit([1.5], [0.1], [0.2]), "counts holds 1 values that are not whole"),
        (lambda: nb_pit([-1], 1, 1), "counts holds 1 values"),
        (lambda: gaussian_pit([1], 1, -1), "variance holds 1 values"),
        (lambda: coverage([]), "pit is empty"),
        (lambda: coverage([0.5], 1.5), "levels holds 1 values"),
        (lambda: pit_distance([np.nan]), "pit holds 1 values"),
        (lambda: interval_coverage([], 0, 1), "observed is empty"),
        (lambda: interval_coverage([1], np.nan, 1), "lower holds 1 NaN of 1 bounds"),
        (lambda: interval_coverage([1, 2], [0, 3], [1, 2]), "lower exceeds upper in 1 of 2 intervals"),
        (lambda: interval_coverage([1, 2], [0, 3, 1], 5), r"observed \(2,\), lower \(3,\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
