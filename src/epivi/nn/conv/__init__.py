"""Convolutions over tracks: layers, how lengths follow from kernels and strides, towers of residual blocks."""
