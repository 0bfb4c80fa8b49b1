"""Bulk experiments: BAM, bigWig and FASTA files to arrays along the genome, one by one or many into a zarr store."""

from __future__ import annotations

from epivi.pp.bulk.bam import BamCounts, ReadRule, count_bam
from epivi.pp.bulk.bigwig import BigWigSignal, BigWigWriter, read_bigwig, write_bigwig
from epivi.pp.bulk.dna import read_dna
from epivi.pp.bulk.store import CountOverflowError, StoreOptions, ingest, open_store

__all__ = [
    "BamCounts",
    "BigWigSignal",
    "BigWigWriter",
    "CountOverflowError",
    "ReadRule",
    "StoreOptions",
    "count_bam",
    "ingest",
    "open_store",
    "read_bigwig",
    "read_dna",
    "write_bigwig",
]
