"""Seeded generators of epigenomic data with known truth: the oracle of tests, tutorials and the demo."""

from __future__ import annotations

from epivi.simulate.bulk import bulk
from epivi.simulate.multiome import multiome
from epivi.simulate.profiles import inclusion_probability
from epivi.simulate.scatac import accessibility
from epivi.simulate.settings import SETTINGS, standard
from epivi.simulate.tracks.generator import tracks

__all__ = ["SETTINGS", "accessibility", "bulk", "inclusion_probability", "multiome", "standard", "tracks"]
