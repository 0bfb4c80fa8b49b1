"""Files and matrices to AnnData: peaks, genomes and reference embeddings. Nothing here needs torch."""

from __future__ import annotations

from epivi.pp.features import (
    filter_cells,
    filter_peaks,
    order_by_chromosome,
    peak_coordinates,
    peak_names,
    reads_to_fragments,
)
from epivi.pp.genome import (
    chrom_sizes,
    drop_blacklisted,
    natural_chromosome_order,
    overlaps,
    read_bed,
    read_blacklist,
    tile,
)
from epivi.pp.reference import lsi, rna_reference

__all__ = [
    "chrom_sizes",
    "drop_blacklisted",
    "filter_cells",
    "filter_peaks",
    "lsi",
    "natural_chromosome_order",
    "order_by_chromosome",
    "overlaps",
    "peak_coordinates",
    "peak_names",
    "read_bed",
    "read_blacklist",
    "reads_to_fragments",
    "rna_reference",
    "tile",
]
