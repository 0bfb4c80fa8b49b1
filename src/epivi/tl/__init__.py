"""AnnData to AnnData where no trained network is needed: gene activity."""

from __future__ import annotations

from epivi.tl.gene_activity import gene_activity

__all__ = ["gene_activity"]
