"""Regions and genes: chromosome tables, BED and GTF files, overlaps."""
