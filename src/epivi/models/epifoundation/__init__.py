"""EpiFoundation: a cell as the set of its open peaks, aligned with expression."""

from epivi.models.epifoundation.model import EpiFoundation

__all__ = ["EpiFoundation"]
