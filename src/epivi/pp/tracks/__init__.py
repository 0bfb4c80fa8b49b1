"""Tracks of single cells from modalities: stacked as channels, and bins chosen among them."""
