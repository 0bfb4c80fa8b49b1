from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from epivi.nn.experts import expert_shares, product_of_experts


def random_experts(seed=0, b=4, c=3, d=5, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(b, c, d, **draw), scale * torch.randn(b, c, d, **draw), torch.rand(b, c, **draw) > 0.4


def plain(mean_cd, logvar_cd, *, prior=True):
    """The formula as it stands, one cell."""
    precision_d = float(prior) + (1 / logvar_cd.exp()).sum(0)
    return (mean_cd / logvar_cd.exp()).sum(0) / precision_d, (1 / precision_d).log()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
def test_product_is_the_formula_over_the_experts_present(seed, c, d):
    mean_bcd, logvar_bcd, mask_bc = random_experts(seed, 3, c, d)
    mean_bd, logvar_bd = product_of_experts(mean_bcd, logvar_bcd, mask_bc)
    for i in range(3):
        expected = plain(mean_bcd[i, mask_bc[i]], logvar_bcd[i, mask_bc[i]])
        torch.testing.assert_close((mean_bd[i], logvar_bd[i]), expected, rtol=1e-10, atol=1e-12)


def test_without_mask_all_experts_count():
    mean_bcd, logvar_bcd, mask_bc = random_experts(1)
    expected = product_of_experts(mean_bcd, logvar_bcd, torch.ones_like(mask_bc))
    torch.testing.assert_close(product_of_experts(mean_bcd, logvar_bcd), expected, rtol=0, atol=0)


def test_without_prior_one_expert_is_itself_and_two_are_their_product():
    mean_bcd, logvar_bcd, _ = random_experts(2, 4, 2)
    only_first = torch.tensor([[True, False]]).expand(4, 2)
    mean_bd, logvar_bd = product_of_experts(mean_bcd, logvar_bcd, only_first, prior=False)
    torch.testing.assert_close((mean_bd, logvar_bd), (mean_bcd[:, 0], logvar_bcd[:, 0]))
    mean_bd, logvar_bd = product_of_experts(mean_bcd, logvar_bcd, prior=False)
    torch.testing.assert_close((mean_bd[1], logvar_bd[1]), plain(mean_bcd[1], logvar_bcd[1], prior=False))


def test_no_expert_is_exactly_the_prior():
    mean_bcd, logvar_bcd, mask_bc = random_experts(3)
    mask_bc[1] = False
    mean_bd, logvar_bd = product_of_experts(mean_bcd, logvar_bcd, mask_bc)
    assert mean_bd[1].tolist() == [0.0] * 5
    assert logvar_bd[1].tolist() == [0.0] * 5
    assert all(math.copysign(1, x) == 1 for x in logvar_bd[1].tolist())
    assert expert_shares(logvar_bcd, mask_bc)[1].tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e300])
def test_an_absent_expert_reaches_neither_values_nor_gradients(junk):
    mean_bcd, logvar_bcd, _ = random_experts(4)
    mask_bc = torch.tensor([[True, False, True]]).expand(4, 3)
    expected = product_of_experts(mean_bcd[:, [0, 2]], logvar_bcd[:, [0, 2]])
    mean_bcd[:, 1] = junk
    logvar_bcd[:, 1] = junk
    mean_bcd.requires_grad_()
    logvar_bcd.requires_grad_()
    got = product_of_experts(mean_bcd, logvar_bcd, mask_bc)
    torch.testing.assert_close(got, expected)
    (got[0].sum() + got[1].sum() + expert_shares(logvar_bcd, mask_bc).square().sum()).backward()
    for grad in (mean_bcd.grad, logvar_bcd.grad):
        assert torch.isfinite(grad).all()
        assert (grad[:, 1] == 0).all()
        assert (grad[:, [0, 2]] != 0).all()


@pytest.mark.parametrize("prior", [True, False])
def test_gradcheck(prior):
    mean_bcd, logvar_bcd, mask_bc = random_experts(5, 3, 3, 2)
    mask_bc[:, 0] = True
    inputs = (mean_bcd.requires_grad_(), logvar_bcd.requires_grad_())
    assert torch.autograd.gradcheck(lambda m, s: product_of_experts(m, s, mask_bc, prior=prior), inputs)


def test_extreme_variances_stay_finite_in_single_precision():
    mean_bcd = torch.tensor([[[2.0], [-7.0]]])
    for low in (-80.0, 80.0):
        mean, logvar = product_of_experts(mean_bcd, torch.tensor([[[low], [0.0]]]))
        assert torch.isfinite(mean).all()
        assert torch.isfinite(logvar).all()
    mean, logvar = product_of_experts(mean_bcd, torch.tensor([[[-200.0], [0.0]]]))
    assert (mean.item(), logvar.item()) == (2.0, -200.0)


def test_shares_add_up_to_one_and_follow_the_precision():
    _, logvar_bcd, mask_bc = random_experts(6)
    share_bc = expert_shares(logvar_bcd, mask_bc)
    assert share_bc.shape == (4, 4)
    torch.testing.assert_close(share_bc.sum(1), torch.ones(4, dtype=torch.float64))
    precision_bcd = (-logvar_bcd).exp() * mask_bc.unsqueeze(2)
    expected_bcd = precision_bcd / (1 + precision_bcd.sum(1, keepdim=True))
    torch.testing.assert_close(share_bc[:, :3], expected_bcd.mean(2))


def test_permuting_experts_changes_nothing():
    mean_bcd, logvar_bcd, mask_bc = random_experts(7)
    order = [2, 0, 1]
    got = product_of_experts(mean_bcd[:, order], logvar_bcd[:, order], mask_bc[:, order])
    torch.testing.assert_close(got, product_of_experts(mean_bcd, logvar_bcd, mask_bc))


def test_without_prior_it_is_the_normalised_product_of_densities():
    mean, other = torch.tensor([[0.3]], dtype=torch.double), torch.tensor([[-1.1]], dtype=torch.double)
    logvar, other_logvar = torch.tensor([[0.4]], dtype=torch.double), torch.tensor([[-0.7]], dtype=torch.double)
    m, v = product_of_experts(torch.stack([mean, other], 1), torch.stack([logvar, other_logvar], 1), prior=False)
    grid = torch.linspace(-15, 15, 200_001, dtype=torch.double)
    density = (
        Normal(mean[0], (logvar[0] / 2).exp()).log_prob(grid)
        + Normal(other[0], (other_logvar[0] / 2).exp()).log_prob(grid)
    ).exp()
    density = density / density.sum()
    expected = (density * grid).sum()
    assert m.item() == pytest.approx(expected.item(), rel=1e-6)
    assert v.exp().item() == pytest.approx((density * (grid - expected) ** 2).sum().item(), rel=1e-6)
