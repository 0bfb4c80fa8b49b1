"""Pictures of embeddings, training and metrics: each function takes `ax=` and returns Axes."""

from __future__ import annotations

from epivi.pl.confounders import confounders
from epivi.pl.embedding import embedding
from epivi.pl.history import history

__all__ = ["confounders", "embedding", "history"]
