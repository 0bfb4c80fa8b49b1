"""Predicted laws of counts and signal: means, quantiles, tail probabilities, from parameters as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import special, stats

from epivi.metrics.calibration import gaussian_cdf, gaussian_quantile, nb_cdf, nb_quantile

if TYPE_CHECKING:
    from collections.abc import Collection

    from epivi.metrics.calibration import Recalibration

ARCSINH: Final = "arcsinh"


@dataclass(frozen=True)
class CountLaw:
    r"""Negative binomial laws of counts, with mean m and dispersion theta: variance :math:`m + m^2/\theta`.

    Attributes
    ----------
    log_mean, log_theta
        Natural logarithms, arrays of one shape.

    Examples
    --------
    >>> law = CountLaw(np.log([4.0]), np.log([2.0]))
    >>> law.mean().tolist(), law.variance().tolist()
    ([4.0], [12.0])
    """

    log_mean: np.ndarray
    log_theta: np.ndarray

    def mean(self) -> np.ndarray:
        """Return the mean."""
        return np.exp(np.asarray(self.log_mean, dtype=np.float64))

    def dispersion(self) -> np.ndarray:
        """Return the dispersion theta."""
        return np.exp(np.asarray(self.log_theta, dtype=np.float64))

    def variance(self) -> np.ndarray:
        """Return the variance."""
        mean = self.mean()
        return mean + mean**2 / self.dispersion()

    def cdf(self, x: np.ndarray | float) -> np.ndarray:
        """Return the probability of at most x."""
        return nb_cdf(x, self.mean(), self.dispersion())

    def cdf_below(self, x: np.ndarray | float) -> np.ndarray:
        """Return the probability of less than x, a whole number."""
        return self.cdf(np.asarray(x, dtype=np.float64) - 1.0)

    def quantile(self, probability: float) -> np.ndarray:
        """Return the smallest count that is not exceeded with this probability."""
        return nb_quantile(probability, self.mean(), self.dispersion())

    def nll(self, x: np.ndarray) -> np.ndarray:
        """Return the negative log-likelihood in nats."""
        theta = self.dispersion()
        return -stats.nbinom.logpmf(x, theta, special.expit(np.log(theta) - self.log_mean))


@dataclass(frozen=True)
class SignalLaw:
    r"""Gaussian laws of the (transformed) signal.

    Attributes
    ----------
    center, spread
        Mean and variance on the scale of the data the model was trained on.
    transform
        ``"arcsinh"`` or ``"none"``: how that scale came from the original one.
    original
        Whether results are on the original scale. Quantiles go through sinh as they are, and with X of mean u and
        variance v, :math:`E[\sinh X] = \sinh(u)\,e^{v/2}`; the variance is
        :math:`\tfrac12(e^{2v}\cosh 2u - 1) - E[\sinh X]^2`.

    Examples
    --------
    >>> law = SignalLaw(np.array([1.0]), np.array([0.0]), "arcsinh", original=True)
    >>> np.round(law.mean(), 4).tolist()
    [1.1752]
    """

    center: np.ndarray
    spread: np.ndarray
    transform: str = "none"
    original: bool = False

    @property
    def _is_sinh(self) -> bool:
        return self.original and self.transform == ARCSINH

    def mean(self) -> np.ndarray:
        """Return the mean."""
        u, v = (np.asarray(x, dtype=np.float64) for x in (self.center, self.spread))
        return np.sinh(u) * np.exp(v / 2) if self._is_sinh else u

    def variance(self) -> np.ndarray:
        """Return the variance."""
        u, v = (np.asarray(x, dtype=np.float64) for x in (self.center, self.spread))
        if not self._is_sinh:
            return v
        return 0.5 * (np.exp(2 * v) * np.cosh(2 * u) - 1.0) - self.mean() ** 2

    def cdf(self, x: np.ndarray | float) -> np.ndarray:
        """Return the probability of at most x."""
        return gaussian_cdf(np.arcsinh(x) if self._is_sinh else x, self.center, self.spread)

    # no single value has a probability above zero
    cdf_below = cdf

    def quantile(self, probability: float) -> np.ndarray:
        """Return the value that is not exceeded with this probability."""
        value = gaussian_quantile(probability, self.center, self.spread)
        return np.sinh(value) if self._is_sinh else value

    def nll(self, x: np.ndarray) -> np.ndarray:
        """Return the negative log-likelihood in nats, of values on the scale of the training data."""
        return -stats.norm.logpdf(x, self.center, np.sqrt(self.spread))


def summarise(
    law: CountLaw | SignalLaw,
    *,
    interval: float | None,
    threshold: float | None,
    recalibration: Recalibration | None = None,
    only: Collection[str] | None = None,
) -> dict[str, np.ndarray]:
    """Return mean, variance and median of laws, and an equal-tailed interval and tail probability where asked for.

    Parameters
    ----------
    law
        The laws.
    interval
        Probability of the interval between ``lower`` and ``upper``; ``None`` leaves it out.
    threshold
        Value whose probability of being exceeded is given as ``exceeds``; ``None`` leaves it out.
    recalibration
        Correction of the laws' probabilities, of median, interval and tail; ``None`` leaves them as they are.
    only
        Names of what to compute; ``None`` for all.

    Examples
    --------
    >>> found = summarise(SignalLaw(np.zeros(1), np.ones(1)), interval=0.9, threshold=0.0)
    >>> round(float(found["upper"][0]), 3), float(found["exceeds"][0])
    (1.645, 0.5)
    """

    def nominal(level: float) -> float:
        return level if recalibration is None else float(recalibration.invert(level))

    def exceeds(threshold: float) -> np.ndarray:
        below = law.cdf(threshold)
        return 1.0 - (below if recalibration is None else recalibration.apply(below))

    ways = {"mean": law.mean, "median": lambda: law.quantile(nominal(0.5)), "var": law.variance}
    if interval is not None:
        ways["lower"] = lambda: law.quantile(nominal(0.5 - interval / 2))
        ways["upper"] = lambda: law.quantile(nominal(0.5 + interval / 2))
    if threshold is not None:
        ways["exceeds"] = lambda: exceeds(threshold)
    return {name: way().astype(np.float32) for name, way in ways.items() if only is None or name in only}
