"""Recalibration finds a known distortion, inverts it, and makes intervals cover what they promise."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from epivi._errors import ConfigError, DataError
from epivi.metrics import (
    Recalibration,
    coverage,
    gaussian_pit,
    gaussian_quantile,
    interval_coverage,
    nb_cdf,
    nb_pit,
    pit_distance,
    randomised_pit,
)

GRID = np.linspace(0, 1, 201)
# distribution function of a PIT, and its inverse
DISTORTIONS = {
    "biased": (np.square, np.sqrt),
    "narrow": (lambda u: stats.beta(0.4, 0.4).cdf(u), lambda q: stats.beta(0.4, 0.4).ppf(q)),
    "wide": (lambda u: stats.beta(3, 3).cdf(u), lambda q: stats.beta(3, 3).ppf(q)),
}


@pytest.mark.parametrize("name", DISTORTIONS)
def test_a_known_distortion_is_found(name):
    cdf, inverse = DISTORTIONS[name]
    u = inverse(np.random.default_rng(0).random(50_000))
    found = Recalibration.fit(u)
    np.testing.assert_allclose(found.apply(GRID), cdf(GRID), atol=0.012)
    np.testing.assert_allclose(cdf(found.invert(GRID)), GRID, atol=0.012)
    fresh = inverse(np.random.default_rng(1).random(50_000))
    assert pit_distance(found.apply(fresh)) < 0.012 < 0.1 < pit_distance(fresh)
    assert found.n == 50_000


def test_a_calibrated_model_stays_as_it_is():
    found = Recalibration.fit(np.random.default_rng(0).random(100_000))
    np.testing.assert_allclose(found.apply(GRID), GRID, atol=0.01)


@given(st.integers(20, 3000), st.floats(0.1, 5), st.booleans(), st.integers(0, 100))
@example(709, 2.140625, True, 9)  # quantiles of equal values that differ by rounding
@settings(max_examples=60, deadline=None)
def test_every_map_is_monotone_and_invertible(n, power, rounded, n_knots):
    u = np.random.default_rng(n).random(n) ** power
    u = np.round(u, 1) if rounded else u
    if u.min() == u.max():
        return
    found = Recalibration.fit(u, n_knots=max(n_knots, 1))
    assert (np.diff(found.predicted) > 0).all()
    assert (np.diff(found.calibrated) > 0).all()
    assert found.predicted.size <= max(n_knots, 1) + 1
    np.testing.assert_allclose(found.apply(found.invert(GRID)), GRID, atol=1e-9)
    assert found.apply([0, 1]).tolist() == [0, 1]
    assert found.invert([0, 1]).tolist() == [0, 1]


def test_the_map_is_the_isotonic_regression_of_the_empirical_distribution():
    from sklearn.isotonic import IsotonicRegression

    u = np.random.default_rng(2).beta(2, 1, size=4000)
    rank = np.array([(u <= value).mean() for value in u])
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(u, rank)
    np.testing.assert_allclose(Recalibration.fit(u).apply(GRID[5:]), isotonic.predict(GRID[5:]), atol=0.01)


def test_intervals_of_a_gaussian_cover_their_level():
    rng = np.random.default_rng(3)
    held_out, scored = rng.normal(0.5, 2.0, 50_000), rng.normal(0.5, 2.0, 50_000)
    found = Recalibration.fit(gaussian_pit(held_out, 0.0, 1.0))
    for level in (0.5, 0.9, 0.95):
        low, high = (gaussian_quantile(q, 0.0, 1.0) for q in found.interval(level))
        assert interval_coverage(scored, low, high) == pytest.approx(level, abs=0.012)
        assert coverage(gaussian_pit(scored, 0.0, 1.0), level) < level - 0.1
    low, high = found.interval(np.array([0.5, 0.9]))
    assert low.shape == high.shape == (2,)
    # of a Gaussian the calibrated median is the true one
    assert gaussian_quantile(found.invert(0.5), 0, 1) == pytest.approx(0.5, abs=0.03)


def test_counts_are_recalibrated_through_both_ends_of_their_step():
    rng = np.random.default_rng(4)
    y = rng.negative_binomial(1.0, 1.0 / 5.0, size=(2, 40_000))
    found = Recalibration.fit(nb_pit(y[0], 4.0, 20.0))
    below, at = (found.apply(nb_cdf(y[1] - shift, 4.0, 20.0)) for shift in (1, 0))
    u = randomised_pit(y[1], below, at, seed=1)
    assert pit_distance(u) < 0.015 < 0.1 < pit_distance(nb_pit(y[1], 4.0, 20.0))


def test_values_at_the_ends_stay_there():
    u = np.concatenate([np.zeros(300), np.random.default_rng(0).random(400), np.ones(300)])
    found = Recalibration.fit(u)
    assert found.apply([0, 1]).tolist() == [0, 1]
    np.testing.assert_allclose(found.apply(0.5), 0.5, atol=0.03)
    assert Recalibration.fit([0.0] * 10 + [1.0] * 10).apply(0.3) == 0.3


def test_arrays_hold_the_whole_map(tmp_path):
    found = Recalibration.fit(np.random.default_rng(0).random(1000) ** 2)
    np.savez(tmp_path / "map.npz", **found.to_arrays())
    with np.load(tmp_path / "map.npz", allow_pickle=False) as saved:
        again = Recalibration.from_arrays(saved)
    np.testing.assert_array_equal(again.apply(GRID), found.apply(GRID))
    assert again.n == 1000
    with pytest.raises(ValueError, match="read-only"):
        found.predicted[0] = 0.5
    with pytest.raises(AttributeError):
        found.n = 3


@pytest.mark.parametrize(
    ("predicted", "calibrated", "message"),
    [
        ([0.0, 0.5], [0.0, 1.0], r"predicted of shape \(2,\) is not valid: give at least 2 knots"),
        ([0.0, 0.5, 0.5, 1.0], [0.0, 0.1, 0.2, 1.0], "predicted of shape"),
        ([0.0, 0.5, 1.0], [0.0, 0.0, 1.0], "calibrated of shape"),
        ([[0.0, 1.0]], [0.0, 1.0], r"predicted of shape \(1, 2\)"),
        (0.0, [0.0, 1.0], r"predicted of shape \(\)"),
        ([0.0, np.nan, 1.0], [0.0, 0.5, 1.0], "predicted holds 1 values"),
        ([0.0, 0.5, 1.0], [0.0, 1.0], "There are 3 predicted and 2 calibrated knots"),
    ],
)
def test_bad_knots_are_refused(predicted, calibrated, message):
    with pytest.raises(DataError, match=message):
        Recalibration(np.array(predicted), np.array(calibrated))


def test_bad_input_is_refused():
    u = np.linspace(0, 1, 30)
    with pytest.raises(DataError, match="pit has 5 values, a map needs at least 20"):
        Recalibration.fit(u[:5])
    with pytest.raises(DataError, match=r"All 30 values of pit are 0\.5"):
        Recalibration.fit(np.full(30, 0.5))
    with pytest.raises(DataError, match="pit holds 30 values"):
        Recalibration.fit(u + 2)
    for bad in (0, 2.5, True):
        with pytest.raises(ConfigError, match=f"n_knots is {bad}, expected a positive integer"):
            Recalibration.fit(u, n_knots=bad)
    found = Recalibration.fit(u)
    for call in (found.apply, found.invert):
        with pytest.raises(DataError, match="probability holds 1 values"):
            call(1.5)
    with pytest.raises(DataError, match="level holds 1 values"):
        found.interval(-0.1)
    with pytest.raises(DataError, match="The saved recalibration has no array 'calibrated', found"):
        Recalibration.from_arrays({"predicted": [0, 1], "n": 3})
