"""What users get from a trained EpiFoundation."""
