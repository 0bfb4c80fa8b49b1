"""Distribution functions, quantiles and the CRPS of the negative binomial and the Gaussian.

The negative binomial has mean m and dispersion t: variance m + m²/t, success probability p = t / (t + m).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from epivi.metrics.calibration._arrays import as_counts, as_numbers, together

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# Gauss-Legendre nodes of the mean difference, and elements taken at once
_NODES, _CHUNK = 128, 8192


def nb_cdf(counts: ArrayLike, mean: ArrayLike, dispersion: ArrayLike) -> NDArray[np.float64]:
    """Return P(Y <= counts) of the negative binomial.

    The regularised incomplete beta function I_p(t, k + 1) with p = t / (t + m); 0 below zero.

    Parameters
    ----------
    counts
        Where to evaluate, any shape; rounded down.
    mean, dispersion
        Mean m >= 0 and dispersion t > 0, of shapes that broadcast with `counts`.

    Returns
    -------
    Probabilities in the common shape.

    Raises
    ------
    DataError
        If a value is not finite, the mean is negative, the dispersion not positive, or shapes do not fit.

    Examples
    --------
    >>> nb_cdf([-1, 0, 1], 1.0, 1.0)
    array([0.  , 0.5 , 0.75])
    """
    count, m, t = together(
        counts=np.floor(as_numbers(counts, "counts")),
        mean=as_numbers(mean, "mean", low=0),
        dispersion=as_numbers(dispersion, "dispersion", low=0, above=True),
    )
    return np.where(count < 0, 0.0, special.betainc(t, np.maximum(count, 0) + 1, t / (t + m)))


def nb_quantile(probability: ArrayLike, mean: ArrayLike, dispersion: ArrayLike) -> NDArray[np.float64]:
    """Return the quantile of the negative binomial: the smallest count with a distribution function >= probability.

    Parameters
    ----------
    probability
        Between 0 and 1, any shape; the quantile of 0 is 0, that of 1 infinite (0 where the mean is 0).
    mean, dispersion
        Mean >= 0 and dispersion > 0, of shapes that broadcast with `probability`.

    Returns
    -------
    Whole numbers, as doubles, in the common shape.

    Raises
    ------
    DataError
        If a value is out of its range or not finite, or shapes do not fit.

    Examples
    --------
    >>> nb_quantile([0.5, 0.51, 0.95], 1.0, 1.0)
    array([0., 1., 4.])
    """
    from scipy import stats

    q, m, t = together(
        probability=as_numbers(probability, "probability", low=0, high=1),
        mean=as_numbers(mean, "mean", low=0),
        dispersion=as_numbers(dispersion, "dispersion", low=0, above=True),
    )
    found = np.maximum(stats.nbinom.ppf(q, t, t / (t + m)), 0.0)
    return np.where(m == 0, 0.0, found)


def gaussian_cdf(values: ArrayLike, mean: ArrayLike, variance: ArrayLike) -> NDArray[np.float64]:
    """Return P(X <= values) of the Gaussian.

    Raises
    ------
    DataError
        If a value is not finite, a variance not positive, or shapes do not fit.

    Examples
    --------
    >>> gaussian_cdf(1.0, 1.0, 4.0).item()
    0.5
    """
    return np.asarray(special.ndtr(_standardised(values, mean, variance)[0]))


def gaussian_quantile(probability: ArrayLike, mean: ArrayLike, variance: ArrayLike) -> NDArray[np.float64]:
    """Return the quantile of the Gaussian, in the common shape; -inf at 0 and inf at 1.

    Raises
    ------
    DataError
        If a probability is outside [0, 1], a value not finite, a variance not positive, or shapes do not fit.

    Examples
    --------
    >>> gaussian_quantile([0.5, 0.975], 1.0, 4.0).round(2)
    array([1.  , 4.92])
    """
    q, m, v = together(
        probability=as_numbers(probability, "probability", low=0, high=1),
        mean=as_numbers(mean, "mean"),
        variance=as_numbers(variance, "variance", low=0, above=True),
    )
    return m + np.sqrt(v) * special.ndtri(q)


def crps_gaussian(values: ArrayLike, mean: ArrayLike, variance: ArrayLike) -> NDArray[np.float64]:
    r"""Return the continuous ranked probability score of Gaussian predictions, element by element; smaller is better.

    With z the standardised value,

    .. math::
        \mathrm{CRPS} = \sigma \left( z (2 \Phi(z) - 1) + 2 \varphi(z) - 1 / \sqrt{\pi} \right).

    Parameters
    ----------
    values
        Observed values, any shape.
    mean, variance
        Of the prediction, of shapes that broadcast with `values`.

    Returns
    -------
    Scores in the unit of `values`.

    Raises
    ------
    DataError
        If a value is not finite, a variance not positive, or shapes do not fit.

    References
    ----------
    Gneiting and Raftery, J. Am. Stat. Assoc. 102, 359 (2007), section 4.2.

    Examples
    --------
    >>> crps_gaussian([0.0, 1.0], 0.0, 1.0).round(4)
    array([0.2337, 0.6024])
    """
    z, sd = _standardised(values, mean, variance)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return sd * (z * (2 * special.ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))


def crps_nb(counts: ArrayLike, mean: ArrayLike, dispersion: ArrayLike) -> NDArray[np.float64]:
    r"""Return the continuous ranked probability score of negative binomial predictions, element by element.

    E|Y - y| - E|Y - Y'| / 2, which is the sum over k of (F(k) - 1[y <= k])². With F of dispersion t and F' that of
    dispersion t + 1 and the same p, and w = 4 (1 - p) / (2 - p)²,

    .. math::
        E|Y - y| = y (2 F(y) - 1) - m (2 F'(y - 1) - 1), \quad
        \tfrac12 E|Y - Y'| = \frac{m}{2 - p} \, {}_2F_1(1 - t, \tfrac12; 2; w).

    Parameters
    ----------
    counts
        Observed counts, any shape.
    mean, dispersion
        Of the prediction, of shapes that broadcast with `counts`.

    Returns
    -------
    Scores in counts.

    Raises
    ------
    DataError
        If a count is negative or not whole, a value not finite, the mean negative, the dispersion not positive, or
        shapes do not fit.

    Notes
    -----
    For t > 1 the hypergeometric function is the integral over φ from 0 to π/2 of (4 / π) cos²φ (1 - w sin²φ)^(t - 1),
    with 128 Gauss-Legendre nodes: the series of SciPy fails for large t, the nodes for t well below 1.

    References
    ----------
    Jordan, Krüger and Lerch, J. Stat. Softw. 90(12) (2019), appendix A, after a transformation of Pfaff.

    Examples
    --------
    >>> crps_nb([0, 2], 1.0, 1.0).round(4)
    array([0.3333, 0.8333])
    """
    count, m, t = together(
        counts=as_counts(counts),
        mean=as_numbers(mean, "mean", low=0),
        dispersion=as_numbers(dispersion, "dispersion", low=0, above=True),
    )
    p = t / (t + m)
    at = special.betainc(t, count + 1, p)
    # the k of F'(y - 1) is y - 1, so that its second parameter is y; 0 below zero
    below = np.where(count > 0, special.betainc(t + 1, np.maximum(count, 1), p), 0.0)
    score = count * (2 * at - 1) - m * (2 * below - 1) - _half_difference(m, t)
    return np.maximum(score, 0.0)


def _half_difference(mean: NDArray[np.float64], dispersion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return half of the mean absolute difference of two draws."""
    m, t = mean.ravel(), dispersion.ravel()
    p = t / (t + m)
    series = t <= 1
    out = np.empty(m.shape)
    out[series] = special.hyp2f1(1 - t[series], 0.5, 2, _w(m[series], t[series]))
    node, weight = np.polynomial.legendre.leggauss(_NODES)
    angle = (node + 1) * np.pi / 4
    cos2, sin2 = np.cos(angle) ** 2, np.sin(angle) ** 2
    rest = np.flatnonzero(~series)
    for start in range(0, rest.size, _CHUNK):
        at = rest[start : start + _CHUNK]
        # 1 - w is (p / (2 - p))²: no cancellation where w is close to 1
        base = cos2 + ((p[at] / (2 - p[at])) ** 2)[:, None] * sin2
        out[at] = np.exp((t[at] - 1)[:, None] * np.log(base)) @ (weight * cos2)
    return (m / (2 - p) * out).reshape(mean.shape)


def _w(m: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 4 (1 - p) / (2 - p)², the argument of the hypergeometric function."""
    return 4 * m * (t + m) / (t + 2 * m) ** 2


def _standardised(
    values: ArrayLike, mean: ArrayLike, variance: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (x - mean) / sd, and sd."""
    x, m, v = together(
        values=as_numbers(values, "values"),
        mean=as_numbers(mean, "mean"),
        variance=as_numbers(variance, "variance", low=0, above=True),
    )
    sd = np.sqrt(v)
    return (x - m) / sd, sd
