"""Likelihoods of counts and signal of bulk experiments, their closed forms, and thinning of reads (CANDI).

Legend of shapes: b windows of the batch, l bins, a assays.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from torch import Tensor

_LOG_2_PI = math.log(2.0 * math.pi)


def _wide(x: Tensor) -> Tensor:
    """Return at least single precision: half precision is not enough for a likelihood."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _widest(x: Tensor) -> Tensor:
    """Return double precision, single where the device has no other."""
    return x.float() if x.device.type == "mps" else x.double()


class _NegativeBinomial(torch.autograd.Function):
    """Evaluated in double precision: the log Gammas of large counts and dispersions cancel."""

    @staticmethod
    def forward(ctx, counts: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
        ctx.save_for_backward(counts, log_mean, log_theta)
        y, log_theta_wide = _widest(counts), _widest(log_theta)
        theta, ratio = log_theta_wide.exp(), _widest(log_mean) - log_theta_wide
        nll = torch.lgamma(theta) + torch.lgamma(y + 1.0) - torch.lgamma(theta + y)
        # an infinite log mean of a count of 0 costs 0, not 0 x infinity
        ratio_of_counts = torch.where(y > 0, ratio, 0.0)
        return (nll + theta * softplus(ratio) + y * softplus(-ratio_of_counts)).to(log_mean.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        counts, log_mean, log_theta = ctx.saved_tensors
        y, log_theta_wide = _widest(counts), _widest(log_theta)
        theta, ratio = log_theta_wide.exp(), _widest(log_mean) - log_theta_wide
        mean_slope = theta * torch.sigmoid(ratio) - y * torch.sigmoid(-ratio)
        grad_mean, grad_theta = grads[0] * mean_slope, None
        if ctx.needs_input_grad[2]:
            gamma = torch.digamma(theta) - torch.digamma(theta + y)
            grad_theta = (grads[0] * (theta * (gamma + softplus(ratio)) - mean_slope)).to(log_theta.dtype)
        return None, grad_mean.to(log_mean.dtype), grad_theta


def negative_binomial_nll(counts: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    r"""Return the negative log-likelihood of counts under a negative binomial, entry by entry.

    .. math::
        \ln\Gamma(\theta) + \ln\Gamma(y + 1) - \ln\Gamma(\theta + y) + \theta\,\mathrm{softplus}(r)
        + y\,\mathrm{softplus}(-r), \qquad r = \ln\mu - \ln\theta

    which is (C6) with :math:`n = \theta` and :math:`p = \theta / (\theta + \mu)`; neither p nor 1 - p is formed.

    Parameters
    ----------
    counts
        Counts y, finite and at least 0; no gradient flows to them.
    log_mean, log_theta
        Logarithms of mean and dispersion; the three shapes broadcast.

    Returns
    -------
    In nats, all constants included, in single precision at least.

    Examples
    --------
    >>> loss = negative_binomial_nll(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0))
    >>> round(loss.exp().item(), 4)
    4.0
    """
    counts, log_mean, log_theta = torch.broadcast_tensors(counts, _wide(log_mean), _wide(log_theta))
    return cast("Tensor", _NegativeBinomial.apply(counts, log_mean, log_theta))


def gaussian_nll(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    r"""Return the negative log-likelihood of a Gaussian, :math:`\frac12 [\ln 2\pi v + (x - u)^2 / v]`, entry by entry.

    Parameters
    ----------
    x
        Observations, finite.
    mean, variance
        Mean u and variance v > 0; the three shapes broadcast.

    Returns
    -------
    In nats, in single precision at least.

    Examples
    --------
    >>> round(gaussian_nll(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)).item(), 4)
    1.4189
    """
    x, mean, variance = _wide(x), _wide(mean), _wide(variance)
    return 0.5 * (_LOG_2_PI + variance.log() + (x - mean).square() / variance)


def masked_mean(loss_bla: Tensor, mask_bla: Tensor) -> Tensor:
    r"""Return the mean over the entries of a mask, :math:`\sum_i m_i f_i / \max(\sum_i m_i, 1)`; 0 if it is empty.

    Parameters
    ----------
    loss_bla
        Values; those under mask 0 have no influence, NaN included.
    mask_bla
        0 or 1; broadcasts against the values.

    Examples
    --------
    >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([1, 1, 0])).item()
    2.0
    >>> masked_mean(torch.ones(3), torch.zeros(3)).item()
    0.0
    """
    loss_bla = _wide(loss_bla)
    is_in = (mask_bla > 0).expand_as(loss_bla)
    return torch.where(is_in, loss_bla, 0.0).sum() / is_in.sum().clamp_min(1)


def offset_log_mean(log_mean_bla: Tensor, log_depth_ratio_ba: Tensor) -> Tensor:
    r"""Return the log mean at a depth (C8), :math:`\ln\mu = \eta + \ln(\mathrm{depth} / \mathrm{depth\ ref}_a)`.

    Parameters
    ----------
    log_mean_bla
        Log mean at the reference depth.
    log_depth_ratio_ba
        Logarithm of depth over reference depth; an unknown one (NaN) counts as 0.

    Examples
    --------
    >>> offset_log_mean(torch.zeros(1, 3, 1), torch.tensor([[2.0]]).log()).exp()[0, :, 0].tolist()
    [2.0, 2.0, 2.0]
    """
    return _wide(log_mean_bla) + log_depth_ratio_ba.nan_to_num(nan=0.0)[:, None, :]


def negative_binomial_moments(log_mean: Tensor, log_theta: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return mean :math:`\mu` and variance :math:`\mu + \mu^2 / \theta` of a negative binomial.

    Parameters
    ----------
    log_mean, log_theta
        Logarithms of mean and dispersion.

    Examples
    --------
    >>> [x.item() for x in negative_binomial_moments(torch.tensor(2.0).log(), torch.tensor(0.0))]
    [2.0, 6.0]
    """
    log_mean, log_theta = _wide(log_mean), _wide(log_theta)
    mean = log_mean.exp()
    return mean, mean * (1.0 + (log_mean - log_theta).exp())


def expected_sinh(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Return :math:`E[\sinh X] = \sinh(u)\, e^{v/2}` of a Gaussian X: the mean of a signal kept as arcsinh.

    The median on the same scale is sinh(u).

    Parameters
    ----------
    mean, variance
        Mean u and variance v of X.

    Examples
    --------
    >>> expected_sinh(torch.tensor(1.0), torch.tensor(0.0)).item() == torch.tensor(1.0).sinh().item()
    True
    """
    return _wide(mean).sinh() * (0.5 * _wide(variance)).exp()


def thin(counts: Tensor, probability: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
    r"""Keep each read with a probability: :math:`y' \sim \mathrm{Binomial}(y, q)`.

    If :math:`y \sim \mathrm{NB}(\mu, \theta)`, then :math:`y' \sim \mathrm{NB}(q \mu, \theta)`.

    Parameters
    ----------
    counts
        Counts y, integers of at least 0 in a floating type.
    probability
        Probability q of keeping a read, at most 1; broadcasts against the counts.
    generator
        Source of random numbers, on the device of the counts; that of torch if ``None``.

    Returns
    -------
    Counts of the same shape and type.

    Examples
    --------
    >>> thin(torch.tensor([0.0, 5.0]), 1.0).tolist()
    [0.0, 5.0]
    """
    probability = torch.as_tensor(probability, dtype=counts.dtype, device=counts.device)
    return torch.binomial(counts, probability.expand_as(counts).contiguous(), generator=generator)
