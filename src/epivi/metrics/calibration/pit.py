"""Probability integral transform: what a calibrated prediction makes uniform, and coverage read off it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from epivi._errors import DataError
from epivi.metrics.calibration._arrays import as_counts, as_numbers, together
from epivi.metrics.calibration.distributions import gaussian_cdf, nb_cdf

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# by how much rounding may put F(y - 1) above F(y)
_ROUNDING = 1e-9


def randomised_pit(
    counts: ArrayLike, cdf_below: ArrayLike, cdf_at: ArrayLike, *, seed: int | np.random.Generator = 0
) -> NDArray[np.float64]:
    """Return the randomised probability integral transform of counts: u = F(y - 1) + V (F(y) - F(y - 1)).

    V is uniform on [0, 1). If the counts follow F, u is uniform: unlike F(y), and unlike equal-tailed intervals, which
    cover more than their level because the law is discrete.

    Parameters
    ----------
    counts
        Observed counts y, any shape.
    cdf_below, cdf_at
        F(y - 1) and F(y) of the prediction, of the same shape.
    seed
        Seed of V, or a generator.

    Returns
    -------
    u in [0, 1], shape of `counts`.

    Raises
    ------
    DataError
        If counts are negative or not whole, probabilities are outside [0, 1], shapes differ, F(y - 1) exceeds F(y), or
        is not 0 where the count is 0.

    References
    ----------
    Czado, Gneiting and Held, Biometrics 65, 1254 (2009), section 2.1.

    Examples
    --------
    >>> u = randomised_pit([0, 1], [0.0, 0.5], [0.5, 0.75])
    >>> bool(0 <= u[0] < 0.5 <= u[1] < 0.75)
    True
    """
    y, below, at = (
        as_counts(counts),
        as_numbers(cdf_below, "cdf_below", low=0, high=1),
        as_numbers(cdf_at, "cdf_at", low=0, high=1),
    )
    if not y.shape == below.shape == at.shape:
        message = f"Shapes differ: counts {y.shape}, cdf_below {below.shape}, cdf_at {at.shape}. Give one shape."
        raise DataError(message)
    if (wrong := below > at + _ROUNDING).any():
        message = f"cdf_below exceeds cdf_at in {int(wrong.sum())} of {y.size} values: it is F(y - 1), cdf_at F(y)."
        raise DataError(message)
    if (wrong := (y == 0) & (below > _ROUNDING)).any():
        message = f"cdf_below is not 0 for {int(wrong.sum())} counts of 0: it is F(y - 1), here P(Y < 0)."
        raise DataError(message)
    v = np.random.default_rng(seed).random(y.shape)
    return np.clip(below + v * (at - below), 0.0, 1.0)


def nb_pit(
    counts: ArrayLike, mean: ArrayLike, dispersion: ArrayLike, *, seed: int | np.random.Generator = 0
) -> NDArray[np.float64]:
    """Return the randomised PIT of counts under negative binomial predictions.

    Parameters
    ----------
    counts
        Observed counts, any shape.
    mean, dispersion
        Mean and dispersion (variance mean + mean² / dispersion), of shapes that broadcast.
    seed
        Seed of the randomisation, or a generator.

    Returns
    -------
    u in [0, 1], in the common shape.

    Raises
    ------
    DataError
        If a count is negative or not whole, a value not finite, the mean negative, the dispersion not positive, or
        shapes do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> counts = np.random.default_rng(0).negative_binomial(2, 0.5, size=2000)
    >>> bool(pit_distance(nb_pit(counts, 2.0, 2.0)) < 0.03)
    True
    """
    y, m, t = together(
        counts=as_counts(counts),
        mean=as_numbers(mean, "mean", low=0),
        dispersion=as_numbers(dispersion, "dispersion", low=0, above=True),
    )
    return randomised_pit(y, nb_cdf(y - 1, m, t), nb_cdf(y, m, t), seed=seed)


def gaussian_pit(values: ArrayLike, mean: ArrayLike, variance: ArrayLike) -> NDArray[np.float64]:
    """Return the PIT of values under Gaussian predictions, F(x); nothing is random.

    Raises
    ------
    DataError
        If a value is not finite, a variance not positive, or shapes do not fit.

    Examples
    --------
    >>> gaussian_pit([1.0, 3.0], 1.0, 1.0).round(3)
    array([0.5  , 0.977])
    """
    return gaussian_cdf(values, mean, variance)


def coverage(pit: ArrayLike, levels: ArrayLike = (0.5, 0.9, 0.95)) -> NDArray[np.float64]:
    """Return the share of observations inside the central intervals of each level: ``|u - 1/2| <= level / 2``.

    With the randomised PIT of counts this is the coverage of randomised intervals, which a calibrated prediction hits
    at every level.

    Parameters
    ----------
    pit
        PIT values u, any shape.
    levels
        Nominal levels in [0, 1], shape (k,) or a number.

    Returns
    -------
    Observed coverage, shape of `levels`.

    Raises
    ------
    DataError
        If there is no PIT value, or a value or level is outside [0, 1].

    Examples
    --------
    >>> coverage([0.1, 0.4, 0.5, 0.8], [0.5, 0.9])
    array([0.5, 1. ])
    """
    distance = np.sort(np.abs(_as_pit(pit) - 0.5))
    level = as_numbers(levels, "levels", low=0, high=1)
    # the tolerance keeps a bound that is hit exactly inside, whatever its rounding
    return np.searchsorted(distance, level / 2 + 1e-12, side="right") / distance.size


def interval_coverage(observed: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> float:
    """Return the share of observations inside [lower, upper], both ends included.

    With equal-tailed quantiles of a discrete law this exceeds the nominal level: see `coverage`.

    Parameters
    ----------
    observed
        Observed values, any shape.
    lower, upper
        Bounds, of shapes that broadcast; they may be infinite.

    Returns
    -------
    The share.

    Raises
    ------
    DataError
        If there is no observation, one is not finite, a bound is NaN, a lower bound exceeds its upper one, or shapes
        do not fit.

    Examples
    --------
    >>> interval_coverage([0, 1, 5], 0, [1, 1, 4])
    0.6666666666666666
    """
    bounds = {"lower": np.asarray(lower, dtype=np.float64), "upper": np.asarray(upper, dtype=np.float64)}
    for name, bound in bounds.items():
        if count := int(np.isnan(bound).sum()):
            message = f"{name} holds {count} NaN of {bound.size} bounds. Leave out what is not available."
            raise DataError(message)
    x, low, high = together(observed=as_numbers(observed, "observed"), **bounds)
    if x.size == 0:
        message = "observed is empty: coverage needs at least one observation."
        raise DataError(message)
    if (wrong := low > high).any():
        message = f"lower exceeds upper in {int(wrong.sum())} of {x.size} intervals. Are they exchanged?"
        raise DataError(message)
    return float(np.mean((x >= low) & (x <= high)))


def pit_distance(pit: ArrayLike) -> float:
    """Return the Kolmogorov distance of the PIT from the uniform law, ``sup |F_n(u) - u|``: 0 is calibrated.

    Raises
    ------
    DataError
        If there is no value, or one is outside [0, 1].

    Examples
    --------
    >>> pit_distance([0.5, 1.0])
    0.5
    """
    u = np.sort(_as_pit(pit))
    step = np.arange(u.size + 1) / u.size
    return float(max((step[1:] - u).max(), (u - step[:-1]).max()))


def _as_pit(pit: ArrayLike) -> NDArray[np.float64]:
    """Return the PIT values in one dimension."""
    u = as_numbers(pit, "pit", low=0, high=1).ravel()
    if u.size == 0:
        message = "pit is empty: at least one value is needed."
        raise DataError(message)
    return u
