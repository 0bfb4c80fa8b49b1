from __future__ import annotations

import math

import pytest
import torch
from scipy.special import logsumexp
from torch.distributions import MultivariateNormal, Normal

from epivi._errors import ConfigError
from epivi.objectives.marginal import LogMeanExp, importance_estimate, marginal_log_likelihood


class Toy:
    """z ~ N(0, I), x = A z + unit noise, A with orthogonal columns so that the posterior is diagonal."""

    def __init__(self, b=6, p=5, d=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        q, _ = torch.linalg.qr(torch.randn(p, d, generator=generator, dtype=torch.float64))
        self.a_pd = q * torch.tensor([1.5, 0.7], dtype=torch.float64)
        self.x_bp = torch.randn(b, p, generator=generator, dtype=torch.float64) * 1.5
        precision_d = 1 + (self.a_pd**2).sum(0)
        self.mean_bd = self.x_bp @ self.a_pd / precision_d
        self.logvar_bd = (-precision_d.log()).expand(b, d)
        covariance = self.a_pd @ self.a_pd.t() + torch.eye(p, dtype=torch.float64)
        self.truth_b = MultivariateNormal(torch.zeros(p, dtype=torch.float64), covariance).log_prob(self.x_bp)

    def log_likelihood(self, z_bd):
        x_bp = self.x_bp.repeat(len(z_bd) // len(self.x_bp), 1)
        return Normal(z_bd @ self.a_pd.t(), 1.0).log_prob(x_bp).sum(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_exact_posterior_gives_the_truth_with_one_sample():
    toy = Toy()
    got_b = marginal_log_likelihood(toy.log_likelihood, toy.mean_bd, toy.logvar_bd, n_samples=1, generator=seeded())
    torch.testing.assert_close(got_b, toy.truth_b, rtol=0, atol=1e-9)
    many = importance_estimate(toy.log_likelihood, toy.mean_bd, toy.logvar_bd, n_samples=20, generator=seeded())
    torch.testing.assert_close(many.log_likelihood_b, toy.truth_b, rtol=0, atol=1e-9)
    torch.testing.assert_close(many.elbo_b, toy.truth_b, rtol=0, atol=1e-9)
    torch.testing.assert_close(many.effective_sample_size_b, torch.full_like(toy.truth_b, 20.0))


def test_wider_posterior_converges_from_below():
    toy = Toy()
    wide_bd = toy.logvar_bd + math.log(2.0)
    run = {"log_likelihood": toy.log_likelihood, "mean_bd": toy.mean_bd, "logvar_bd": wide_bd, "chunk_size": 100}
    fine = importance_estimate(**run, n_samples=5000, generator=seeded(1))
    assert (fine.log_likelihood_b - toy.truth_b).abs().max() < 0.05
    assert (fine.elbo_b < fine.log_likelihood_b).all()
    assert ((fine.effective_sample_size_b > 1000) & (fine.effective_sample_size_b < 5000)).all()
    # the ELBO of a Gaussian family is known: truth less KL(q || posterior)
    kl = 2 * 0.5 * (2.0 - 1.0 - math.log(2.0))
    torch.testing.assert_close(fine.elbo_b, toy.truth_b - kl, rtol=0, atol=0.06)
    means = [
        torch.stack([marginal_log_likelihood(**run, n_samples=n, generator=seeded(i)) for i in range(40)]).mean()
        for n in (1, 10, 100)
    ]
    assert means[0] < means[1] < means[2] < toy.truth_b.mean() + 0.01


def test_chunk_size_changes_nothing():
    toy = Toy(b=3)
    run = {"mean_bd": toy.mean_bd, "logvar_bd": toy.logvar_bd + 0.5, "n_samples": 10}
    expected = importance_estimate(toy.log_likelihood, **run, generator=seeded(2))
    for chunk_size in (3, 10, 64):
        got = importance_estimate(toy.log_likelihood, **run, chunk_size=chunk_size, generator=seeded(2))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_streaming_equals_scipy_over_any_range():
    log_weights_sb = torch.randn(50, 7, dtype=torch.float64) * torch.logspace(-2, 3, 7, dtype=torch.float64)
    log_weights_sb[:, 0] -= 5000.0
    running = LogMeanExp()
    for part in log_weights_sb.split([1, 9, 30, 10]):
        running.update(part)
    log_mean_b, elbo_b, effective_b = running.estimate()
    expected = torch.from_numpy(logsumexp(log_weights_sb.numpy(), axis=0)) - math.log(50)
    torch.testing.assert_close(log_mean_b, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(elbo_b, log_weights_sb.mean(0))
    share_sb = torch.softmax(log_weights_sb, 0)
    torch.testing.assert_close(effective_b, 1 / share_sb.square().sum(0))


def test_impossible_samples_count_as_weight_zero():
    running = LogMeanExp()
    running.update(torch.tensor([[-math.inf, -math.inf]]))
    running.update(torch.tensor([[-math.inf, 3.0]]))
    log_mean_b, elbo_b, effective_b = running.estimate()
    assert log_mean_b.tolist() == [-math.inf, pytest.approx(3.0 - math.log(2))]
    assert elbo_b.tolist() == [-math.inf, -math.inf]
    assert effective_b.tolist() == [0.0, 1.0]


def test_nothing_to_estimate_is_refused():
    with pytest.raises(ConfigError, match="No sample was added; an estimate needs at least one"):
        LogMeanExp().estimate()
    zero = torch.zeros(1, 1)
    for sizes in ({"n_samples": 0}, {"chunk_size": 0}):
        with pytest.raises(ConfigError, match=r"n_samples is \d+ and chunk_size \d+; both must be at least 1"):
            marginal_log_likelihood(lambda z: z.sum(1), zero, zero, **sizes)


def test_single_precision_and_no_graph():
    toy = Toy()
    weight = toy.a_pd.float().requires_grad_()
    got_b = marginal_log_likelihood(
        lambda z: Normal(z @ weight.t(), 1.0).log_prob(toy.x_bp.float()).sum(1),
        toy.mean_bd.float(),
        toy.logvar_bd.float(),
        n_samples=3,
        generator=seeded(),
    )
    assert not got_b.requires_grad
    torch.testing.assert_close(got_b, toy.truth_b, rtol=0, atol=1e-4)
