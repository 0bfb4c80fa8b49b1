from __future__ import annotations

import math

import pytest
import torch

from epivi.train.weights import is_better, weights_are_finite


@pytest.mark.parametrize(
    ("value", "best", "min_delta", "expected"),
    [
        (1.0, 2.0, 0.0, True),
        (2.0, 2.0, 0.0, False),
        (1.5, 2.0, 0.5, False),
        (1.4, 2.0, 0.5, True),
        (math.nan, 2.0, 0.0, False),
        (5.0, math.inf, 1.0, True),
    ],
)
def test_better_is_lower_by_more_than_the_least_change(value, best, min_delta, expected):
    assert is_better(value, best, min_delta) is expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_a_weight_or_a_buffer_may_be_what_is_not_finite(name, value):
    module = torch.nn.BatchNorm1d(3)
    assert weights_are_finite(module)
    with torch.no_grad():
        getattr(module, name)[1] = value
    assert not weights_are_finite(module)
