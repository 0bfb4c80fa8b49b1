"""Files and matrices to AnnData: peaks, genomes and reference embeddings. Nothing here needs torch."""

from __future__ import annotations

from epivi.pp import bulk
from epivi.pp.bins import select_bins
from epivi.pp.features import (
    drop_blacklisted,
    filter_cells,
    filter_peaks,
    order_by_chromosome,
    peak_coordinates,
    reads_to_fragments,
)
from epivi.pp.fragments import fragments
from epivi.pp.genome.genes import read_genes
from epivi.pp.genome.regions import (
    chrom_sizes,
    natural_chromosome_order,
    overlaps,
    peak_names,
    read_bed,
    read_blacklist,
    tile,
)
from epivi.pp.reference import lsi, rna_reference
from epivi.pp.tracks import stack_tracks

__all__ = [
    "bulk",
    "chrom_sizes",
    "drop_blacklisted",
    "filter_cells",
    "filter_peaks",
    "fragments",
    "lsi",
    "natural_chromosome_order",
    "order_by_chromosome",
    "overlaps",
    "peak_coordinates",
    "peak_names",
    "read_bed",
    "read_blacklist",
    "read_genes",
    "reads_to_fragments",
    "rna_reference",
    "select_bins",
    "stack_tracks",
    "tile",
]
