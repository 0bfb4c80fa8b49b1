"""SAILERX: multiome latents aligned to a reference embedding (Cao et al., Nucleic Acids Research 2022)."""

from epivi.models.sailerx.model import SAILERX

__all__ = ["SAILERX"]
