"""Small questions about weights and monitored values, asked by the training plan and by what is kept of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def weights_are_finite(module: nn.Module) -> bool:
    """Whether all weights and buffers of a module are finite.

    Examples
    --------
    >>> import torch
    >>> weights_are_finite(torch.nn.Linear(1, 1))
    True
    """
    return all(bool(value.isfinite().all()) for value in module.state_dict().values())


def is_better(value: float, best: float, min_delta: float) -> bool:
    """Whether a monitored value is lower than the best by more than ``min_delta``; NaN never is.

    Examples
    --------
    >>> is_better(1.0, 2.0, 0.5), is_better(math.nan, 2.0, 0.0)
    (True, False)
    """
    return not math.isnan(value) and value < best - min_delta
