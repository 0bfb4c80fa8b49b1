"""Recalibration: a monotone map of probabilities, learned from the PIT of held-out data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from epivi._errors import ConfigError, DataError
from epivi.metrics.calibration._arrays import as_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

_MIN_VALUES = 20
# PIT values that should lie beyond the outermost inner knot
_MIN_TAIL = 5
_DECIMALS = 9


@dataclass(frozen=True, eq=False)
class Recalibration:
    """Monotone, invertible, piecewise linear map from predicted to calibrated probabilities.

    If F is the distribution function of the model, R(F(y)) is the calibrated one, and the calibrated quantile of q is
    the model's quantile of R⁻¹(q). Learn the map on data used neither for training nor for scoring.

    Parameters
    ----------
    predicted, calibrated
        Knots of the map, both strictly increasing from 0 to 1, shape (k,), k >= 2.
    n
        PIT values the map was learned from; 0 if unknown.

    Raises
    ------
    DataError
        If the knots are not such arrays.

    References
    ----------
    Kuleshov, Fenner and Ermon, ICML (2018), algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> Recalibration(np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.5, 1.0])).apply([0.1, 0.2])
    array([0.25, 0.5 ])
    """

    predicted: NDArray[np.float64]
    calibrated: NDArray[np.float64]
    n: int = 0

    def __post_init__(self) -> None:
        """Check the knots and keep copies that cannot be changed."""
        for name in ("predicted", "calibrated"):
            # zero-dimensional and nested input fails below
            knots = np.array(as_numbers(getattr(self, name), name, low=0, high=1))
            ends = knots.ndim == 1 and knots.size >= 2 and knots[0] == 0 and knots[-1] == 1
            if not ends or (np.diff(knots) <= 0).any():
                message = f"{name} of shape {knots.shape} is not valid: give at least 2 knots, increasing from 0 to 1."
                raise DataError(message)
            knots.setflags(write=False)
            object.__setattr__(self, name, knots)
        if self.predicted.size != self.calibrated.size:
            message = f"There are {self.predicted.size} predicted and {self.calibrated.size} calibrated knots."
            raise DataError(message)

    @classmethod
    def fit(cls, pit: ArrayLike, *, n_knots: int = 100) -> Recalibration:
        """Learn the map from PIT values of held-out data.

        The map is the isotonic regression of the empirical distribution function of the PIT on the PIT: that function
        itself, as it is monotone. It is kept at quantiles which lie denser towards both ends, (1 - cos(πj/k)) / 2, so
        that wide intervals are calibrated too. Few values get fewer knots: five of them lie beyond the outermost one.

        Parameters
        ----------
        pit
            PIT values (for counts the randomised ones), any shape.
        n_knots
            Largest number k of pieces.

        Returns
        -------
        The map.

        Raises
        ------
        DataError
            If there are fewer than 20 values, one is outside [0, 1], or all are the same.
        ConfigError
            If `n_knots` is not a positive integer.

        Notes
        -----
        What lies exactly at 0 or 1 (a value far outside the prediction) stays there under any map.

        Examples
        --------
        >>> import numpy as np
        >>> u = np.random.default_rng(0).random(10_000)
        >>> R = Recalibration.fit(u**2)
        >>> R.apply([0.25]).round(1)
        array([0.5])
        """
        if isinstance(n_knots, bool) or not isinstance(n_knots, int | np.integer) or n_knots < 1:
            message = f"n_knots is {n_knots!r}, expected a positive integer."
            raise ConfigError(message)
        u = as_numbers(pit, "pit", low=0, high=1).ravel()
        if u.size < _MIN_VALUES:
            message = f"pit has {u.size} values, a map needs at least {_MIN_VALUES}. Hold out more data."
            raise DataError(message)
        if u.min() == u.max():
            message = f"All {u.size} values of pit are {u[0]:g}: there is nothing to calibrate. Is it a PIT?"
            raise DataError(message)
        # the outermost share is about (π / 2k)²
        n_pieces = min(int(n_knots), max(2, int(np.pi / 2 * np.sqrt(u.size / _MIN_TAIL))))
        share = (1 - np.cos(np.pi * np.arange(n_pieces + 1) / n_pieces)) / 2
        knot = np.quantile(u, share)
        knot[0], knot[-1] = 0.0, 1.0
        predicted, calibrated = _strict(knot, share)
        return cls(predicted, calibrated, n=int(u.size))

    def apply(self, probability: ArrayLike) -> NDArray[np.float64]:
        """Return calibrated probabilities R(F) of predicted ones, any shape.

        Raises
        ------
        DataError
            If a value is outside [0, 1].

        Examples
        --------
        >>> import numpy as np
        >>> Recalibration(np.array([0.0, 1.0]), np.array([0.0, 1.0])).apply(0.3).item()
        0.3
        """
        return np.asarray(
            np.interp(as_numbers(probability, "probability", low=0, high=1), self.predicted, self.calibrated)
        )

    def invert(self, probability: ArrayLike) -> NDArray[np.float64]:
        """Return R⁻¹(q): at which probability to take the model's quantile to get the calibrated quantile of q.

        Raises
        ------
        DataError
            If a value is outside [0, 1].

        Examples
        --------
        >>> import numpy as np
        >>> Recalibration(np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.5, 1.0])).invert([0.25, 0.5])
        array([0.1, 0.2])
        """
        return np.asarray(
            np.interp(as_numbers(probability, "probability", low=0, high=1), self.calibrated, self.predicted)
        )

    def interval(self, level: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return at which probabilities to take the model's quantiles for the central interval of a level.

        R⁻¹((1 - level) / 2) and R⁻¹((1 + level) / 2), each of the shape of `level`.

        Raises
        ------
        DataError
            If a level is outside [0, 1].

        Examples
        --------
        >>> import numpy as np
        >>> R = Recalibration(np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.5, 1.0]))
        >>> [round(end.item(), 6) for end in R.interval(0.5)]
        [0.1, 0.6]
        """
        share = as_numbers(level, "level", low=0, high=1)
        return self.invert((1 - share) / 2), self.invert((1 + share) / 2)

    def to_arrays(self) -> dict[str, NDArray]:
        """Return the map as plain arrays, ready to be saved; `from_arrays` makes it anew.

        Examples
        --------
        >>> import numpy as np
        >>> sorted(Recalibration(np.array([0.0, 1.0]), np.array([0.0, 1.0])).to_arrays())
        ['calibrated', 'n', 'predicted']
        """
        return {
            "predicted": self.predicted.copy(),
            "calibrated": self.calibrated.copy(),
            "n": np.array(self.n, dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike]) -> Recalibration:
        """Make the map from what `to_arrays` returned.

        Raises
        ------
        DataError
            If an array is missing or not valid.

        Examples
        --------
        >>> Recalibration.from_arrays({"predicted": [0, 1], "calibrated": [0, 1], "n": 50}).n
        50
        """
        if missing := [name for name in ("predicted", "calibrated", "n") if name not in arrays]:
            message = f"The saved recalibration has no array '{missing[0]}', found {sorted(arrays)}. Is it complete?"
            raise DataError(message)
        predicted, calibrated = (np.asarray(arrays[name]) for name in ("predicted", "calibrated"))
        return cls(predicted, calibrated, n=int(np.asarray(arrays["n"])))


def _strict(knot: NDArray[np.float64], share: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return knots without ties: equal values keep the mean of their shares, but 0 and 1 stay where they are."""
    # quantiles between equal values differ by rounding, and a step so steep could not be inverted
    values, inverse, repeats = np.unique(np.round(knot, _DECIMALS), return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=share) / repeats
    means[0], means[-1] = 0.0, 1.0
    return values, means
