"""Numbers about an embedding of cells: clusters, neighbours, and information about confounders."""
