"""Whether predicted distributions tell the truth: PIT, coverage, CRPS, quantiles and recalibration."""

from __future__ import annotations

from epivi.metrics.calibration.distributions import (
    crps_gaussian,
    crps_nb,
    gaussian_cdf,
    gaussian_quantile,
    nb_cdf,
    nb_quantile,
)
from epivi.metrics.calibration.pit import (
    coverage,
    gaussian_pit,
    interval_coverage,
    nb_pit,
    pit_distance,
    randomised_pit,
)
from epivi.metrics.calibration.recalibration import Recalibration

__all__ = [
    "Recalibration",
    "coverage",
    "crps_gaussian",
    "crps_nb",
    "gaussian_cdf",
    "gaussian_pit",
    "gaussian_quantile",
    "interval_coverage",
    "nb_cdf",
    "nb_pit",
    "nb_quantile",
    "pit_distance",
    "randomised_pit",
]
