"""Simulated multiome in which peaks drive genes, and the same cells on another set of peaks."""

from __future__ import annotations

from epivi.simulate.linked.generator import linked_multiome
from epivi.simulate.linked.peaks import shifted_peaks

__all__ = ["linked_multiome", "shifted_peaks"]
