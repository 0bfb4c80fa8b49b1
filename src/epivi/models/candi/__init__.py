"""CANDI: missing and noisy bulk tracks from those that exist, the DNA and the covariates of the experiments."""

from __future__ import annotations

from epivi.models.candi.model import CANDI

__all__ = ["CANDI"]
