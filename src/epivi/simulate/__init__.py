"""Seeded generators of epigenomic data with known truth: the oracle of tests, tutorials and the demo."""

from __future__ import annotations

from epivi.simulate.bulk import bulk
from epivi.simulate.linked import linked_multiome, shifted_peaks
from epivi.simulate.multiome import multiome
from epivi.simulate.profiles import inclusion_probability
from epivi.simulate.programs import gene_programs
from epivi.simulate.scatac import accessibility
from epivi.simulate.settings import SETTINGS, standard
from epivi.simulate.tracks.generator import tracks

__all__ = [
    "SETTINGS",
    "accessibility",
    "bulk",
    "gene_programs",
    "inclusion_probability",
    "linked_multiome",
    "multiome",
    "shifted_peaks",
    "standard",
    "tracks",
]
