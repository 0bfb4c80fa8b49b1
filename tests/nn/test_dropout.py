from __future__ import annotations

import pytest
import torch

from epivi.nn.dropout import CHUNK, relu_dropout_


def test_without_training_or_rate_it_is_a_relu():
    x = torch.randn(3, 5)
    assert torch.equal(relu_dropout_(x.clone(), 0.5, training=False), x.relu())
    assert torch.equal(relu_dropout_(x.clone(), 0.0, training=True), x.relu())


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_share_and_scale_of_the_values_that_pass(rate):
    torch.manual_seed(0)
    n = 2 * CHUNK + 3  # more than one chunk and no multiple of four
    out = relu_dropout_(torch.ones(n, dtype=torch.float64), rate, training=True)
    kept = out > 0
    assert abs(kept.double().mean().item() - (1 - rate)) < 5 * (rate * (1 - rate) / n) ** 0.5 + 2**-16
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - rate)), rtol=2e-4, atol=0)
    # neighbours, which share a random number, and chunks, which share memory, are independent
    for lag in (1, 2, 3, 4, CHUNK):
        both = (kept[lag:] & kept[:-lag]).double().mean().item()
        assert abs(both - (1 - rate) ** 2) < 0.004


def test_gradient_is_the_scale_where_a_value_passed():
    torch.manual_seed(1)
    x = torch.randn(4, 50, 7, dtype=torch.float64, requires_grad=True)
    out = relu_dropout_(x * 1.0, 0.3, training=True)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, upstream)
    scale = 65536 / (65536 - round(0.3 * 65536))
    torch.testing.assert_close(grad, torch.where(out > 0, upstream * scale, 0.0))
    torch.testing.assert_close(out[out > 0], x[out > 0] * scale)
    assert 0.3 < (out > 0).double().mean() < 0.4  # half of 0.7


def test_one_seed_one_result():
    first, second, third = (
        relu_dropout_(torch.ones(100), 0.5, training=True) for seed in (3, 3, 4) if torch.manual_seed(seed)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
