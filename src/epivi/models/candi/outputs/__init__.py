"""What users get from a trained CANDI."""
