from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch.distributions import Bernoulli
from torch.nn.functional import binary_cross_entropy_with_logits

from epivi.objectives.likelihoods import calibrate, weighted_bernoulli


def random_case(seed=0, n_cells=5, n_peaks=9, dtype=torch.float64, density=0.3):
    rng = np.random.default_rng(seed)
    x_bp = torch.from_numpy((rng.random((n_cells, n_peaks)) < density).astype(float)).to(dtype)
    logits_bp = torch.from_numpy(rng.normal(0, 3, (n_cells, n_peaks))).to(dtype)
    return x_bp, logits_bp


def positions(x_bp):
    rows_o, columns_o = torch.nonzero(x_bp, as_tuple=True)
    return rows_o * x_bp.shape[1] + columns_o, rows_o


def test_unweighted_loss_is_the_bernoulli_likelihood():
    x_bp, logits_bp = random_case()
    expected = -Bernoulli(logits=logits_bp).log_prob(x_bp).sum(1)
    torch.testing.assert_close(weighted_bernoulli(logits_bp, *positions(x_bp)), expected)


@pytest.mark.parametrize(("weight", "closed_weight"), [(20.0, 1.0), (0.5, 1.0), (20.0, 20.0), (3.0, 0.25), (1.0, 0.0)])
def test_weighted_loss_and_gradient_equal_the_dense_computation(weight, closed_weight):
    x_bp, logits_bp = random_case(1)
    logits_bp.requires_grad_()
    entry_weight_bp = torch.where(x_bp > 0, weight, closed_weight).double()
    expected = binary_cross_entropy_with_logits(logits_bp, x_bp, weight=entry_weight_bp, reduction="none").sum(1)
    loss_b = weighted_bernoulli(logits_bp, *positions(x_bp), weight, closed_weight=closed_weight)
    torch.testing.assert_close(loss_b, expected)
    upstream = torch.randn_like(loss_b)
    got = torch.autograd.grad(loss_b, logits_bp, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, logits_bp, upstream))


def test_weight_of_open_entries_is_the_positive_weight_of_torch():
    x_bp, logits_bp = random_case(2)
    weight = torch.tensor(30.0, dtype=torch.float64)
    expected = binary_cross_entropy_with_logits(logits_bp, x_bp, pos_weight=weight, reduction="none").sum(1)
    torch.testing.assert_close(weighted_bernoulli(logits_bp, *positions(x_bp), 30.0), expected)


@pytest.mark.parametrize(("weight", "closed_weight"), [(1.0, 1.0), (20.0, 1.0), (4.0, 0.5)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_gradcheck(weight, closed_weight, density):
    x_bp, logits_bp = random_case(3, 3, 4, density=density)
    open_o, rows_o = positions(x_bp)
    assert torch.autograd.gradcheck(
        lambda logits: weighted_bernoulli(logits, open_o, rows_o, weight, closed_weight=closed_weight),
        logits_bp.requires_grad_(),
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.floats(0.1, 50), st.floats(0, 1))
def test_any_pattern_of_open_peaks_equals_the_dense_computation(seed, n_cells, n_peaks, weight, density):
    x_bp, logits_bp = random_case(seed, n_cells, n_peaks, density=density)
    pos_weight = torch.tensor(weight, dtype=torch.float64)
    expected = binary_cross_entropy_with_logits(logits_bp, x_bp, pos_weight=pos_weight, reduction="none").sum(1)
    torch.testing.assert_close(weighted_bernoulli(logits_bp, *positions(x_bp), weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [30.0, 100.0, 1e4, 1e8])
def test_extreme_logits_stay_finite_and_right(dtype, size):
    x_bp = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=dtype)
    logits_bp = torch.tensor([[size, -size, size, -size]], dtype=dtype, requires_grad=True)
    loss_b = weighted_bernoulli(logits_bp, *positions(x_bp), 20.0)
    loss_b.sum().backward()
    # the confident mistakes cost 20 * size and size, the confident hits nothing
    assert loss_b.item() == pytest.approx(21 * size, rel=1e-5)
    torch.testing.assert_close(
        logits_bp.grad, torch.tensor([[0.0, -20.0, 1.0, 0.0]], dtype=dtype), atol=1e-10, rtol=1e-6
    )


def test_cells_without_open_peaks_and_with_one():
    logits_bp = torch.zeros(2, 4)
    nothing = torch.zeros(0, dtype=torch.long)
    torch.testing.assert_close(
        weighted_bernoulli(logits_bp, nothing, nothing, 7.0), torch.full((2,), 4 * np.log(2)).float()
    )
    loss_b = weighted_bernoulli(logits_bp, torch.tensor([6]), torch.tensor([1]), 7.0)
    torch.testing.assert_close(loss_b, torch.tensor([4.0, 10.0]) * np.log(2))


def test_the_inputs_are_left_as_they_are():
    x_bp, logits_bp = random_case(4)
    before = logits_bp.clone()
    logits_bp.requires_grad_()
    weighted_bernoulli(logits_bp, *positions(x_bp), 5.0, closed_weight=2.0).sum().backward()
    torch.testing.assert_close(logits_bp.detach(), before, rtol=0, atol=0)


@given(st.floats(1e-6, 1 - 1e-6), st.floats(0.01, 100))
def test_calibration_undoes_the_weight(p, weight):
    biased = weight * p / (1 + (weight - 1) * p)
    calibrated = calibrate(torch.tensor(biased, dtype=torch.float64), weight)
    assert calibrated.item() == pytest.approx(p, rel=1e-7)


@pytest.mark.parametrize("p", [0.01, 0.175, 0.5, 0.97])
@pytest.mark.parametrize("weight", [0.5, 1.0, 20.0])
def test_calibrated_minimiser_of_the_weighted_loss_is_the_frequency(p, weight):
    n = 400
    n_open = round(p * n)
    open_o, rows_o = torch.arange(n_open), torch.zeros(n_open, dtype=torch.long)

    def loss(logit):
        return weighted_bernoulli(torch.full((1, n), logit, dtype=torch.float64), open_o, rows_o, weight).item()

    best = minimize_scalar(loss, bounds=(-15, 15), method="bounded", options={"xatol": 1e-10}).x
    assert calibrate(torch.sigmoid(torch.tensor(best)), weight).item() == pytest.approx(n_open / n, rel=1e-4)


def test_calibration_keeps_the_ends_and_the_order():
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    calibrated = calibrate(p, 20.0)
    assert calibrated[0] == 0
    assert calibrated[-1] == pytest.approx(1.0)
    assert (calibrated.diff() > 0).all()
    torch.testing.assert_close(calibrate(p, 1.0), p)


def test_calibration_is_a_shift_of_the_logit_by_the_log_weight():
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    torch.testing.assert_close(calibrate(torch.sigmoid(logits), 20.0), torch.sigmoid(logits - np.log(20.0)))
