"""Binned tracks of single cells: their grids, the registry field, and how rows are read."""
