"""Files and matrices to AnnData: peaks, genomes and reference embeddings. Nothing here needs torch."""

from __future__ import annotations

from epivi.pp import bulk
from epivi.pp.counts import collapse_genes, reads_to_fragments
from epivi.pp.features import order_by_chromosome, peak_coordinates
from epivi.pp.filters import drop_blacklisted, filter_cells, filter_multiome, filter_peaks
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
from epivi.pp.project import project_peaks
from epivi.pp.reference import lsi, rna_reference
from epivi.pp.tracks.bins import select_bins
from epivi.pp.tracks.stack import stack_tracks
from epivi.pp.union import union_genes

__all__ = [
    "bulk",
    "chrom_sizes",
    "collapse_genes",
    "drop_blacklisted",
    "filter_cells",
    "filter_multiome",
    "filter_peaks",
    "fragments",
    "lsi",
    "natural_chromosome_order",
    "order_by_chromosome",
    "overlaps",
    "peak_coordinates",
    "peak_names",
    "project_peaks",
    "read_bed",
    "read_blacklist",
    "read_genes",
    "reads_to_fragments",
    "rna_reference",
    "select_bins",
    "stack_tracks",
    "tile",
    "union_genes",
]
