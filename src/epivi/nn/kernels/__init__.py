"""Compiled forms of the layers that touch all peaks, for the CPU; the plain ones of torch stay the reference.

Nothing here is compiled at install: the functions are compiled on first use and kept between runs.
"""

from epivi.nn.kernels.losses import bernoulli_loss, layer_outputs, multinomial_loss
from epivi.nn.kernels.products import (
    GradientBuffer,
    PeakLists,
    count_totals,
    has_half_precision,
    list_by_peak,
    sparse_product,
)

__all__ = [
    "GradientBuffer",
    "PeakLists",
    "bernoulli_loss",
    "count_totals",
    "has_half_precision",
    "layer_outputs",
    "list_by_peak",
    "multinomial_loss",
    "sparse_product",
]
