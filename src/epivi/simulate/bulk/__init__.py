"""Simulated bulk experiments: biosamples by assays by bins, for models that impute tracks."""

from __future__ import annotations

from epivi.simulate.bulk.generator import bulk

__all__ = ["bulk"]
