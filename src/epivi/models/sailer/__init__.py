"""SAILER: accessibility latents invariant to depth and batch (Cao et al., Bioinformatics 2021)."""

from epivi.models.sailer.model import SAILER

__all__ = ["SAILER"]
