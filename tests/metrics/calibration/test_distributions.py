"""Negative binomial and Gaussian against SciPy, the CRPS against sums and integrals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from epivi._errors import DataError
from epivi.metrics import (
    crps_gaussian,
    crps_nb,
    gaussian_cdf,
    gaussian_quantile,
    nb_cdf,
    nb_quantile,
)

MEANS, DISPERSIONS = (0.01, 0.7, 5.0, 300.0), (0.01, 0.3, 1.0, 2.5, 100.0, 22026.0)
GRID = np.array([(m, t) for m in MEANS for t in DISPERSIONS])


def law(mean, dispersion):
    return stats.nbinom(dispersion, dispersion / (dispersion + mean))


def test_nb_cdf_equals_scipy_and_is_zero_below_zero():
    for m, t in GRID:
        k = np.unique(law(m, t).ppf([0.001, 0.3, 0.5, 0.9, 0.9999]))
        np.testing.assert_allclose(nb_cdf(k, m, t), law(m, t).cdf(k), rtol=1e-10)
        # an independent sum of the mass function
        assert nb_cdf(3, m, t) == pytest.approx(law(m, t).pmf(np.arange(4)).sum(), rel=1e-8)
    assert nb_cdf([-1, -0.5, 0, 0.9], 0.0, 1.0).tolist() == [0, 0, 1, 1]


@given(st.floats(0, 1, exclude_max=True), st.floats(1e-3, 2000), st.floats(1e-2, 1e4))
@settings(max_examples=150, deadline=None)
def test_nb_quantile_is_the_smallest_count_that_reaches_the_probability(q, m, t):
    k = nb_quantile(q, m, t)
    assert k == np.floor(k) >= 0
    assert nb_cdf(k, m, t) >= q - 1e-12
    assert k == 0 or nb_cdf(k - 1, m, t) < q + 1e-12


def test_nb_quantile_equals_scipy_and_broadcasts():
    q = np.linspace(0.01, 0.99, 23)
    found = nb_quantile(q[:, None], GRID[:, 0], GRID[:, 1])
    assert found.shape == (23, len(GRID))
    np.testing.assert_array_equal(found, law(*GRID.T).ppf(q[:, None]))
    assert nb_quantile([0, 1, 0, 1], [2, 2, 0, 0], 1.0).tolist() == [0, np.inf, 0, 0]
    # exactly at a step, the step itself
    assert nb_quantile(nb_cdf([0, 3, 7], 2.0, 1.5), 2.0, 1.5).tolist() == [0, 3, 7]


def test_gaussian_equals_scipy():
    x, m, v = np.array([-3.0, 0.2, 9.0]), np.array([0.0, 1.0, 2.0]), np.array([0.5, 1.0, 9.0])
    np.testing.assert_allclose(gaussian_cdf(x, m, v), stats.norm(m, np.sqrt(v)).cdf(x), rtol=1e-12)
    q = np.array([0.01, 0.5, 0.975])
    np.testing.assert_allclose(gaussian_quantile(q, m, v), stats.norm(m, np.sqrt(v)).ppf(q), rtol=1e-12)
    assert gaussian_quantile([0, 1], 0, 1).tolist() == [-np.inf, np.inf]


@pytest.mark.parametrize(("x", "mean", "variance"), [(0.3, 0.0, 1.0), (-4.0, 1.0, 0.25), (12.0, 2.0, 30.0)])
def test_crps_gaussian_equals_the_integral(x, mean, variance):
    cdf = stats.norm(mean, np.sqrt(variance)).cdf
    below = integrate.quad(lambda z: cdf(z) ** 2, -100, x, limit=200, points=[mean])[0]
    above = integrate.quad(lambda z: (1 - cdf(z)) ** 2, x, 200, limit=200, points=[mean])[0]
    assert crps_gaussian(x, mean, variance) == pytest.approx(below + above, rel=1e-7)


def test_crps_nb_equals_the_sum():
    for m, t in GRID:
        k = np.arange(min(law(m, t).ppf(1 - 1e-13), 4e5) + 1)
        cdf = law(m, t).cdf(k)
        y = np.unique(np.append(law(m, t).ppf([0.1, 0.5, 0.99]), [0, 2]))
        direct = [((cdf - (count <= k)) ** 2).sum() for count in y]
        np.testing.assert_allclose(crps_nb(y, m, t), direct, rtol=1e-6, atol=1e-9)


def test_crps_of_certainty_is_the_absolute_error():
    assert crps_nb([0, 3, 7], 0.0, 2.0).tolist() == [0, 3, 7]
    np.testing.assert_allclose(crps_gaussian([1.0, -4.0], 0.0, 1e-16), [1, 4], atol=1e-7)


def test_crps_rewards_the_truth():
    rng = np.random.default_rng(0)
    y = rng.negative_binomial(2.0, 2.0 / 7.0, size=20_000)
    truth = crps_nb(y, 5.0, 2.0).mean()
    assert all(crps_nb(y, m, t).mean() > truth for m, t in [(4.0, 2.0), (6.0, 2.0), (5.0, 0.8), (5.0, 20.0)])
    x = rng.normal(1.0, 2.0, size=20_000)
    truth = crps_gaussian(x, 1.0, 4.0).mean()
    assert all(crps_gaussian(x, m, v).mean() > truth for m, v in [(0.5, 4.0), (1.0, 2.0), (1.0, 8.0)])


def test_many_elements_are_taken_in_chunks():
    y = np.arange(20_000) % 13
    many = crps_nb(y.reshape(2, -1), 4.0, 3.0)
    assert many.shape == (2, 10_000)
    np.testing.assert_array_equal(many.ravel()[:13], crps_nb(np.arange(13), 4.0, 3.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nb_cdf([np.nan], 1, 1), "counts holds 1 values"),
        (lambda: nb_cdf(1, -1, 1), "mean holds 1 values that are not finite numbers of at least 0"),
        (lambda: nb_quantile(1.2, 1, 1), "probability holds 1 values that are not finite numbers between 0 and 1"),
        (lambda: nb_quantile(0.2, 1, 0), "dispersion holds 1 values that are not finite numbers above 0"),
        (lambda: crps_nb([1, 2], [1, 2, 3], 1), r"counts \(2,\), mean \(3,\), dispersion \(\)"),
        (lambda: crps_nb(0.5, 1, 1), "not whole numbers"),
        (lambda: crps_gaussian(0.5, 1, 0), "variance holds 1 values that are not finite numbers above 0"),
        (lambda: gaussian_cdf(np.inf, 1, 1), "values holds 1 values"),
        (lambda: gaussian_quantile(-0.1, 1, 1), "probability holds 1 values"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
