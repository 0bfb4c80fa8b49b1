"""Simulated multi-channel tracks of single cells."""

from __future__ import annotations

from epivi.simulate.tracks.generator import tracks

__all__ = ["tracks"]
