from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats

from epivi.objectives.experiments import (
    expected_sinh,
    gaussian_nll,
    masked_mean,
    negative_binomial_moments,
    negative_binomial_nll,
    offset_log_mean,
    thin,
)

COUNTS = np.array([0.0, 1.0, 7.0, 300.0, 20_000.0, 65_535.0])
LOG_MEANS = np.array([-12.0, -3.0, 0.0, 2.0, 6.0, 11.0])
LOG_THETAS = np.array([-5.0, -1.0, 0.0, 3.0, 10.0])
GRID = tuple(x.ravel() for x in np.meshgrid(COUNTS, LOG_MEANS, LOG_THETAS))


def tensors(*arrays, dtype=torch.float32):
    return [torch.as_tensor(x, dtype=dtype) for x in arrays]


def test_negative_binomial_is_that_of_scipy():
    y, log_mean, log_theta = GRID
    # what the function sees: values in single precision
    wide = [x.double().numpy() for x in tensors(y, log_mean, log_theta)]
    theta, mean = np.exp(wide[2]), np.exp(wide[1])
    expected = -stats.nbinom.logpmf(wide[0], theta, theta / (theta + mean))
    # scipy takes p, whose complement is not exact where the mean is far below the dispersion
    exact = (mean / theta > 1e-6) | (y == 0)
    found = negative_binomial_nll(*tensors(y, log_mean, log_theta))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy()[exact], expected[exact], rtol=1e-5)
    by_formula = (
        special.gammaln(theta) + special.gammaln(wide[0] + 1) - special.gammaln(theta + wide[0])
        + theta * np.log1p(mean / theta) + wide[0] * (np.log1p(theta / mean))
    )  # fmt: skip
    np.testing.assert_allclose(found.numpy(), by_formula, rtol=1e-5)


def test_gradients_of_the_negative_binomial_are_closed_forms():
    y, log_mean, log_theta = tensors(*GRID, dtype=torch.float64)
    keep = y < 1000
    y, log_mean, log_theta = (x[keep].clone().requires_grad_() for x in (y, log_mean, log_theta))
    negative_binomial_nll(y.detach(), log_mean, log_theta).sum().backward()
    mean, theta = log_mean.detach().exp(), log_theta.detach().exp()
    torch.testing.assert_close(log_mean.grad, theta * (mean - y) / (theta + mean))
    inner = torch.digamma(theta) - torch.digamma(theta + y) + torch.log1p(mean / theta) + (y - mean) / (theta + mean)
    torch.testing.assert_close(log_theta.grad, theta * inner, rtol=1e-6, atol=1e-8)


def test_gradients_are_those_of_finite_differences_and_sum_over_broadcast_axes():
    torch.manual_seed(0)
    y = torch.poisson(torch.full((2, 4, 3), 5.0, dtype=torch.float64))
    log_mean = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    log_theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: negative_binomial_nll(y, a, b), (log_mean, log_theta))


@pytest.mark.parametrize(("log_mean", "log_theta"), [(50.0, 10.0), (-80.0, -5.0), (-80.0, 10.0), (50.0, -5.0)])
def test_extreme_parameters_stay_finite(log_mean, log_theta):
    y, a, b = (torch.tensor([[0.0, 65_535.0]]), torch.full((1, 2), log_mean), torch.full((1, 2), log_theta))
    a.requires_grad_(), b.requires_grad_()
    loss = negative_binomial_nll(y, a, b)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()
    certain = negative_binomial_nll(torch.zeros(1), torch.tensor([-torch.inf]), torch.zeros(1))
    assert certain.item() == 0.0


def test_gaussian_is_that_of_scipy():
    x, u, v = (a.ravel() for a in np.meshgrid([-3.0, 0.0, 2.5, 40.0], [0.0, 1.3, 9.0], [1e-3, 0.5, 1.0, 100.0]))
    expected = -stats.norm.logpdf(*(np.float32(a).astype(float) for a in (x, u)), np.sqrt(np.float32(v).astype(float)))
    np.testing.assert_allclose(gaussian_nll(*tensors(x, u, v)).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_likelihoods_are_in_single_precision_under_autocast(dtype):
    y, a, b = tensors([3.0, 900.0], [1.0, 6.5], [0.5, 2.0])
    plain = negative_binomial_nll(y, a, b), gaussian_nll(y, a, b)
    with torch.autocast("cpu", dtype=dtype):
        inside = negative_binomial_nll(y, a, b), gaussian_nll(y, a, b)
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))
    half = [x.to(dtype) for x in (y, a, b)]
    for law in (negative_binomial_nll, gaussian_nll):
        assert torch.equal(law(*half), law(*(x.float() for x in half)))


def test_masked_mean_is_the_mean_of_what_is_in():
    loss_bla, mask_b1a = torch.randn(4, 5, 3), (torch.rand(4, 1, 3) > 0.5).float()
    mask_b1a[0, 0, 0] = 1.0
    expected = loss_bla[mask_b1a.bool().expand(4, 5, 3)].mean()
    torch.testing.assert_close(masked_mean(loss_bla, mask_b1a), expected)
    loss_bla[mask_b1a.expand(4, 5, 3) == 0] = torch.nan
    torch.testing.assert_close(masked_mean(loss_bla, mask_b1a), expected)


def test_an_empty_mask_costs_nothing_and_has_gradient_zero():
    mean, variance = torch.randn(2, 3, 4, requires_grad=True), torch.rand(2, 3, 4).requires_grad_()
    log_mean, log_theta = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    empty = torch.zeros(2, 1, 4)
    total = masked_mean(gaussian_nll(torch.randn(2, 3, 4), mean, variance), empty)
    total = total + masked_mean(negative_binomial_nll(torch.ones(2, 3, 4), log_mean, log_theta), empty)
    total.backward()
    assert total.item() == 0.0
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (mean, variance, log_mean, log_theta))


def test_moments_and_offset_are_the_closed_forms():
    log_mean, log_theta = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    mean, variance = negative_binomial_moments(log_mean, log_theta)
    theta = log_theta.exp()
    p = (theta / (theta + log_mean.exp())).numpy()
    expected = stats.nbinom.stats(np.broadcast_to(theta.numpy(), p.shape), p, moments="mv")
    np.testing.assert_allclose([mean, variance], expected)
    ratio_ba = torch.tensor([[2.0, 0.25, 1.0], [1.0, 4.0, torch.nan]], dtype=torch.float64).log()
    moved, _ = negative_binomial_moments(offset_log_mean(log_mean, ratio_ba), log_theta)
    torch.testing.assert_close(moved, mean * ratio_ba.exp().nan_to_num(nan=1.0)[:, None])
    doubled, _ = negative_binomial_moments(offset_log_mean(log_mean, ratio_ba + np.log(2.0)), log_theta)
    torch.testing.assert_close(doubled[~ratio_ba.isnan()[:, None].expand_as(doubled)] / 2.0,
                               moved[~ratio_ba.isnan()[:, None].expand_as(moved)])  # fmt: skip


def test_expected_sinh_is_the_integral():
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    for u, v in [(0.0, 1.0), (0.7, 0.2), (3.0, 0.5), (-1.0, 2.0)]:
        expected = (weights * np.sinh(u + v**0.5 * nodes)).sum() / np.sqrt(2 * np.pi)
        assert expected_sinh(*tensors(u, v, dtype=torch.float64)).item() == pytest.approx(
            expected, rel=1e-10, abs=1e-12
        )


@pytest.mark.parametrize(("mean", "theta", "q"), [(6.0, 1.5, 0.25), (40.0, 8.0, 0.5), (0.8, 0.4, 0.5)])
def test_the_head_is_closed_under_thinning(mean, theta, q):
    n = 20_000
    counts = np.random.default_rng(3).negative_binomial(theta, theta / (theta + mean), n)
    found = thin(torch.as_tensor(counts, dtype=torch.float32), q, torch.Generator().manual_seed(4)).numpy()
    law = stats.nbinom(theta, theta / (theta + q * mean))
    edges = np.unique(law.ppf(np.linspace(0.02, 0.98, 25)))
    expected = n * np.diff([0.0, *law.cdf(edges), 1.0])
    observed = np.bincount(np.searchsorted(edges, found), minlength=len(expected))
    assert stats.chisquare(observed, expected).pvalue > 0.01
    # and it is not the law of another dispersion with the same mean
    other = n * np.diff([0.0, *stats.nbinom(q * theta, theta / (theta + mean)).cdf(edges), 1.0])
    assert stats.chisquare(observed, other).pvalue < 1e-6


def test_thinning_keeps_integers_within_bounds_and_follows_its_seed():
    counts = torch.poisson(torch.full((3, 50, 4), 30.0), generator=torch.Generator().manual_seed(0))
    counts[0, 0, 0] = 65_535.0
    rate_b11 = torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    one, other = (thin(counts, rate_b11, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(one, one.round())
    assert ((one >= 0) & (one <= counts)).all()
    assert torch.equal(one[0], counts[0])
    assert one[2].sum().item() == pytest.approx(0.25 * counts[2].sum().item(), rel=0.05)
    assert thin(torch.zeros(5), 0.5).sum() == 0.0
