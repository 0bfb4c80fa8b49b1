from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, MixtureSameFamily, Normal, kl_divergence

from epivi.objectives.invariance import kl_standard_normal, mixture_information, pairwise_kl, pairwise_kl_matrix


def posteriors(n_cells=64, n_latent=10, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    mean_bd, logvar_bd = (torch.randn(n_cells, n_latent, generator=generator, dtype=torch.float64) for _ in range(2))
    return (spread * mean_bd).requires_grad_(), logvar_bd.requires_grad_()


def matrix_of_torch(mean_bd, logvar_bd):
    sd_bd = (0.5 * logvar_bd).exp()
    one = Normal(mean_bd.unsqueeze(1), sd_bd.unsqueeze(1))
    other = Normal(mean_bd.unsqueeze(0), sd_bd.unsqueeze(0))
    return kl_divergence(one, other).sum(2)


def assert_same_value_and_gradient(value, expected, leaves):
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(value, leaves, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, upstream), rtol=1e-9, atol=1e-10)


def test_kl_to_the_prior_is_that_of_torch():
    mean_bd, logvar_bd = posteriors(6, 4)
    expected = kl_divergence(Normal(mean_bd, (0.5 * logvar_bd).exp()), Normal(0.0, 1.0)).sum(1)
    assert_same_value_and_gradient(kl_standard_normal(mean_bd, logvar_bd), expected, (mean_bd, logvar_bd))


def test_kl_to_the_prior_is_zero_at_the_prior_alone():
    zero = torch.zeros(2, 3)
    assert kl_standard_normal(zero, zero).tolist() == [0.0, 0.0]
    mean_bd, logvar_bd = posteriors(50, 3)
    assert (kl_standard_normal(mean_bd, logvar_bd) > 0).all()


@pytest.mark.parametrize(("n_cells", "n_latent", "spread"), [(64, 10, 2.0), (2, 1, 1.0), (1, 3, 1.0), (17, 5, 0.0)])
def test_matrix_and_pairwise_mean_equal_torch_in_value_and_gradient(n_cells, n_latent, spread):
    mean_bd, logvar_bd = leaves = posteriors(n_cells, n_latent, spread=spread)
    for function, expected in (
        (pairwise_kl_matrix, matrix_of_torch(mean_bd, logvar_bd)),
        (pairwise_kl, matrix_of_torch(mean_bd, logvar_bd).mean()),
    ):
        assert_same_value_and_gradient(function(mean_bd, logvar_bd), expected, leaves)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6), st.floats(0, 5))
def test_pairwise_mean_equals_torch_for_random_posteriors(seed, n_cells, n_latent, spread):
    mean_bd, logvar_bd = posteriors(n_cells, n_latent, seed, spread)
    expected = matrix_of_torch(mean_bd, logvar_bd).mean()
    torch.testing.assert_close(pairwise_kl(mean_bd, logvar_bd), expected, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    leaves = posteriors(5, 3)
    for function in (kl_standard_normal, pairwise_kl, pairwise_kl_matrix, mixture_information):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("shift", [1.0, -30.0, 1e4])
def test_a_shift_of_all_means_changes_nothing(shift):
    mean_bd, logvar_bd = posteriors()
    torch.testing.assert_close(
        pairwise_kl(mean_bd + shift, logvar_bd), pairwise_kl(mean_bd, logvar_bd), rtol=1e-9, atol=1e-9
    )


def test_a_shift_costs_no_digits_in_single_precision():
    mean_bd, logvar_bd = (x.detach().float() for x in posteriors())
    # powers of two, so that the shifted means themselves are exact
    mean_bd = (mean_bd * 16).round() / 16
    for function in (pairwise_kl, pairwise_kl_matrix, mixture_information):
        shifted, expected = function(mean_bd + 1024.0, logvar_bd), function(mean_bd, logvar_bd)
        torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-3)


def test_equal_posteriors_carry_no_information():
    mean_bd, logvar_bd = (x.detach()[:1].expand(8, -1) for x in posteriors())
    assert pairwise_kl(mean_bd, logvar_bd).item() == pytest.approx(0.0, abs=1e-12)
    assert mixture_information(mean_bd, logvar_bd).item() == pytest.approx(0.0, abs=1e-12)
    assert pairwise_kl_matrix(mean_bd, logvar_bd).abs().max().item() < 1e-12


def test_permuting_cells_permutes_the_matrix_and_leaves_the_means():
    mean_bd, logvar_bd = posteriors(9, 4)
    order = torch.randperm(9)
    matrix_bb = pairwise_kl_matrix(mean_bd, logvar_bd)
    torch.testing.assert_close(pairwise_kl_matrix(mean_bd[order], logvar_bd[order]), matrix_bb[order][:, order])
    for function in (pairwise_kl, mixture_information):
        torch.testing.assert_close(function(mean_bd[order], logvar_bd[order]), function(mean_bd, logvar_bd))


def test_terms_stay_finite_at_the_clamp_of_the_log_variance():
    mean_bd = torch.tensor([[30.0], [-30.0], [0.0]], requires_grad=True)
    logvar_bd = torch.tensor([[8.0], [-8.0], [0.0]], requires_grad=True)
    for function in (pairwise_kl, mixture_information):
        value = function(mean_bd, logvar_bd)
        assert torch.isfinite(value)
        assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(value, (mean_bd, logvar_bd)))


def test_mixture_estimate_equals_its_formula_in_value_and_gradient():
    mean_bd, logvar_bd = leaves = posteriors(12, 3, spread=0.5)
    expected = -(-matrix_of_torch(mean_bd, logvar_bd)).exp().mean(1).log().mean()
    assert_same_value_and_gradient(mixture_information(mean_bd, logvar_bd), expected, leaves)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 16), st.integers(1, 8), st.floats(0, 20))
def test_mixture_estimate_lies_between_zero_and_both_bounds(seed, n_cells, n_latent, spread):
    mean_bd, logvar_bd = posteriors(n_cells, n_latent, seed, spread)
    estimate = mixture_information(mean_bd, logvar_bd).item()
    assert -1e-9 <= estimate <= math.log(n_cells) + 1e-9
    assert estimate <= pairwise_kl(mean_bd, logvar_bd).item() + 1e-9


def test_order_of_pairwise_mixture_and_true_information():
    mean_bd, logvar_bd = (x.detach() for x in posteriors(64, 10, spread=1.0))
    torch.manual_seed(0)
    cells = Independent(Normal(mean_bd, (0.5 * logvar_bd).exp()), 1)
    aggregate = MixtureSameFamily(torch.distributions.Categorical(torch.ones(64, dtype=torch.float64)), cells)
    z_sbd = cells.sample((300,))
    truth = (cells.log_prob(z_sbd) - aggregate.log_prob(z_sbd)).mean().item()
    mixture, pairwise = mixture_information(mean_bd, logvar_bd).item(), pairwise_kl(mean_bd, logvar_bd).item()
    # 64 random posteriors of ten dimensions: the pairwise bound is loose by an order, the mixture estimate is not
    assert truth <= mixture <= math.log(64) < pairwise
    assert mixture - truth < 1.0
    assert pairwise > 5 * truth
