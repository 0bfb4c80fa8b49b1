"""Pictures of embeddings, training, metrics, calibration and tracks: each function takes `ax=` and returns Axes."""

from __future__ import annotations

from epivi.pl.benchmark import benchmark
from epivi.pl.calibration import calibration, importance
from epivi.pl.confounders import confounders
from epivi.pl.embedding import embedding
from epivi.pl.history import history
from epivi.pl.tracks import tracks

__all__ = ["benchmark", "calibration", "confounders", "embedding", "history", "importance", "tracks"]
