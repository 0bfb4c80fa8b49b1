"""AnnData and MuData to batch dicts: registry fields, sparse batches, splits and samplers."""
