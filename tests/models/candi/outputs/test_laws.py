from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, stats

from epivi.metrics.calibration import Recalibration
from epivi.models.candi.outputs.laws import CountLaw, SignalLaw, summarise

RNG = np.random.default_rng(0)
LOG_MEAN, LOG_THETA = RNG.normal(1, 1, (3, 20)), RNG.normal(0.5, 1, (3, 20))
CENTER, SPREAD = RNG.normal(1, 0.7, 12), RNG.uniform(0.05, 0.6, 12)


@pytest.fixture
def counts():
    theta, mean = np.exp(LOG_THETA), np.exp(LOG_MEAN)
    return CountLaw(LOG_MEAN, LOG_THETA), stats.nbinom(theta, theta / (theta + mean))


def test_counts_follow_the_negative_binomial_of_scipy(counts):
    law, expected = counts
    y = expected.rvs(random_state=1)
    np.testing.assert_allclose(law.mean(), expected.mean(), rtol=1e-10)
    np.testing.assert_allclose(law.variance(), expected.var(), rtol=1e-9)
    np.testing.assert_allclose(law.cdf(y), expected.cdf(y), rtol=1e-9)
    np.testing.assert_allclose(law.cdf_below(y), expected.cdf(y - 1), atol=1e-12)
    np.testing.assert_allclose(law.nll(y), -expected.logpmf(y), rtol=1e-9)
    for q in (0.05, 0.5, 0.95):
        np.testing.assert_array_equal(law.quantile(q), expected.ppf(q))


def test_moments_of_counts_are_those_of_draws(counts):
    law, expected = counts
    draws = expected.rvs(size=(20_000, 3, 20), random_state=2)
    standard_error = np.sqrt(law.variance() / 20_000)
    assert (np.abs(draws.mean(0) - law.mean()) < 5 * standard_error).all()


def test_signals_follow_the_gaussian_of_scipy():
    law, expected = SignalLaw(CENTER, SPREAD, "arcsinh"), stats.norm(CENTER, np.sqrt(SPREAD))
    np.testing.assert_allclose(law.mean(), CENTER)
    np.testing.assert_allclose(law.variance(), SPREAD)
    np.testing.assert_allclose(law.cdf(0.7), expected.cdf(0.7), rtol=1e-10)
    np.testing.assert_allclose(law.cdf_below(0.7), expected.cdf(0.7), rtol=1e-10)
    np.testing.assert_allclose(law.quantile(0.9), expected.ppf(0.9), rtol=1e-10)
    np.testing.assert_allclose(law.nll(np.full(12, 0.3)), -expected.logpdf(0.3), rtol=1e-10)


def test_on_the_original_scale_sinh_is_taken_of_the_variable_and_not_of_its_mean():
    law = SignalLaw(CENTER, SPREAD, "arcsinh", original=True)
    np.testing.assert_allclose(law.mean(), np.sinh(CENTER) * np.exp(SPREAD / 2))
    for at in range(3):
        normal = stats.norm(CENTER[at], np.sqrt(SPREAD[at]))
        first = integrate.quad(lambda x, n=normal: np.sinh(x) * n.pdf(x), -10, 12)[0]
        second = integrate.quad(lambda x, n=normal: np.sinh(x) ** 2 * n.pdf(x), -10, 12)[0]
        assert law.mean()[at] == pytest.approx(first, rel=1e-6)
        assert law.variance()[at] == pytest.approx(second - first**2, rel=1e-6)
    np.testing.assert_allclose(law.quantile(0.5), np.sinh(CENTER))
    np.testing.assert_allclose(law.cdf(law.quantile(0.3)), 0.3)


def test_a_scale_that_is_no_arcsinh_is_left_as_it_is():
    for transform in ("none", ""):
        law = SignalLaw(CENTER, SPREAD, transform, original=True)
        np.testing.assert_allclose(law.mean(), CENTER)
        np.testing.assert_allclose(law.quantile(0.5), CENTER)


def test_a_summary_holds_what_is_asked_for(counts):
    law, expected = counts
    found = summarise(law, interval=0.8, threshold=3.0)
    assert list(found) == ["mean", "median", "var", "lower", "upper", "exceeds"]
    np.testing.assert_array_equal(found["lower"], expected.ppf(0.1).astype(np.float32))
    np.testing.assert_array_equal(found["upper"], expected.ppf(0.9).astype(np.float32))
    np.testing.assert_allclose(found["exceeds"], expected.sf(3), rtol=1e-5)
    assert all(values.dtype == np.float32 for values in found.values())
    assert list(summarise(law, interval=None, threshold=None)) == ["mean", "median", "var"]
    some = summarise(law, interval=0.8, threshold=3.0, only=["upper", "mean"])
    assert list(some) == ["mean", "upper"]
    np.testing.assert_array_equal(some["upper"], found["upper"])


def test_a_correction_moves_quantiles_and_tails_but_not_moments():
    law = SignalLaw(CENTER, SPREAD)
    # the data lie lower than predicted: F = 0.2 is the calibrated median
    correction = Recalibration(np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.5, 1.0]))
    plain = summarise(law, interval=0.5, threshold=1.0)
    found = summarise(law, interval=0.5, threshold=1.0, recalibration=correction)
    np.testing.assert_array_equal(found["mean"], plain["mean"])
    np.testing.assert_array_equal(found["var"], plain["var"])
    np.testing.assert_allclose(found["median"], law.quantile(0.2), rtol=1e-5)
    np.testing.assert_allclose(found["lower"], law.quantile(0.1), rtol=1e-5)
    np.testing.assert_allclose(found["upper"], law.quantile(0.6), rtol=1e-5)
    np.testing.assert_allclose(found["exceeds"], 1 - correction.apply(law.cdf(1.0)), rtol=1e-5)
