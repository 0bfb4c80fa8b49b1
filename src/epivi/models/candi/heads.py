"""Heads of CANDI: negative binomial parameters of counts, Gaussian parameters of signal, at each bin and assay.

Legend of shapes: b windows of the batch, l bins, a assays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from torch import Tensor

VARIANCE_FLOOR = 1e-3
LOG_THETA_RANGE = (-5.0, 10.0)
PRIOR_FLOOR = 0.05
# a mean that starts from the prior shall start close to it
PRIOR_WEIGHT_SCALE = 0.1


def prior_link(prior_bla: Tensor, has_prior_ba: Tensor) -> Tensor:
    r"""Return a prior on the scale before the link, :math:`\log(e^{p} - 1)`, and 0 where there is none.

    Softplus of it is the prior, the mean of a signal; its exponential is :math:`e^p - 1`, the count whose log1p is the
    prior. A prior below 0.05 counts as 0.05, so that zeros stay finite.

    Parameters
    ----------
    prior_bla
        Mean signal, or mean of log1p counts, of other biosamples.
    has_prior_ba
        Where it is 0, the prior of the assay is not looked at.

    Examples
    --------
    >>> softplus(prior_link(torch.tensor([[[2.0]]]), torch.ones(1, 1))).item()
    2.0
    """
    has = (has_prior_ba > 0)[:, None]
    known_bla = torch.where(has, prior_bla.to(torch.promote_types(prior_bla.dtype, torch.float32)), 1.0)
    known_bla = known_bla.clamp_min(PRIOR_FLOOR)
    return torch.where(has, known_bla + (-torch.expm1(-known_bla)).log(), 0.0)


class PriorSkip(nn.Module):
    r"""Add :math:`w_a g + c_a` where assay a has a prior, with g from :func:`prior_link`.

    Parameters
    ----------
    n_assays
        Assays A.
    start
        First value of the weights w; the offsets c start at 0.

    Examples
    --------
    >>> PriorSkip(2, start=1.0)(torch.ones(1, 3, 2), torch.tensor([[1.0, 0.0]]))[0, 0].tolist()
    [1.0, 0.0]
    """

    def __init__(self, n_assays: int, *, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((n_assays,), float(start)))
        self.bias = nn.Parameter(torch.zeros(n_assays))

    def forward(self, link_bla: Tensor, has_prior_ba: Tensor) -> Tensor:
        """Return what is added, shape (b, l, a)."""
        return (self.weight * link_bla + self.bias) * (has_prior_ba > 0)[:, None]


class _Mean(nn.Module):
    """Linear map over assays and, if asked for, the prior of the same assay."""

    def __init__(self, n_assays: int, n_features: int, prior_start: float | None) -> None:
        super().__init__()
        self.linear = nn.Linear(n_features * n_assays, n_assays)
        self.prior = None if prior_start is None else PriorSkip(n_assays, start=prior_start)
        if prior_start:
            with torch.no_grad():
                self.linear.weight *= PRIOR_WEIGHT_SCALE
                self.linear.bias.zero_()

    def forward(self, x_bla: Tensor, link_bla: Tensor | None, has_prior_ba: Tensor | None) -> Tensor:
        y_bla = self.linear(x_bla)
        if self.prior is None or link_bla is None or has_prior_ba is None:
            return y_bla
        return y_bla + self.prior(link_bla, has_prior_ba)


class CountHead(nn.Module):
    r"""Log mean before the depth offset and log dispersion of a negative binomial (C8): :math:`\eta = W X + b`.

    Parameters
    ----------
    n_assays
        Assays A.
    n_features
        Features of each assay in X.
    per_bin
        Whether the dispersion is predicted at each bin; otherwise it is one number an assay.
    prior_start
        First weight of the prior in the log mean; there is no prior if ``None``.

    Examples
    --------
    >>> log_mean, log_theta = CountHead(3)(torch.zeros(2, 5, 3))
    >>> log_mean.shape, log_theta.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 5, 3]))
    """

    def __init__(
        self, n_assays: int, *, n_features: int = 1, per_bin: bool = False, prior_start: float | None = None
    ) -> None:
        super().__init__()
        self.mean = _Mean(n_assays, n_features, prior_start)
        self.theta = nn.Linear(n_features * n_assays, n_assays) if per_bin else None
        if not per_bin:
            self.log_theta = nn.Parameter(torch.zeros(n_assays))

    def forward(
        self, x_bla: Tensor, link_bla: Tensor | None = None, has_prior_ba: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log mean and log dispersion, both of shape (b, l, a); the latter lies in [-5, 10]."""
        log_mean_bla = self.mean(x_bla, link_bla, has_prior_ba)
        log_theta_bla = self.log_theta.expand_as(log_mean_bla) if self.theta is None else self.theta(x_bla)
        return log_mean_bla, log_theta_bla.clamp(*LOG_THETA_RANGE)


class SignalHead(nn.Module):
    r"""Mean and variance of a Gaussian (C9): softplus of linear maps, the variance with 1e-3 added.

    Parameters
    ----------
    n_assays
        Assays A.
    n_features
        Features of each assay in X.
    prior_start
        First weight of the prior in the mean; its weight in the variance starts at 0. There is no prior if ``None``.

    Examples
    --------
    >>> mean, variance = SignalHead(3)(torch.zeros(2, 5, 3))
    >>> mean.shape, variance.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 5, 3]))
    """

    def __init__(self, n_assays: int, *, n_features: int = 1, prior_start: float | None = None) -> None:
        super().__init__()
        self.mean = _Mean(n_assays, n_features, prior_start)
        self.variance = _Mean(n_assays, n_features, None if prior_start is None else 0.0)

    def forward(
        self, x_bla: Tensor, link_bla: Tensor | None = None, has_prior_ba: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean and variance, both of shape (b, l, a)."""
        mean_bla = softplus(self.mean(x_bla, link_bla, has_prior_ba))
        return mean_bla, softplus(self.variance(x_bla, link_bla, has_prior_ba)) + VARIANCE_FLOOR


class _Normalised(nn.Module):
    """Layer normalisation over assays of a linear map."""

    def __init__(self, n_assays: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_assays, n_assays)
        self.norm = nn.LayerNorm(n_assays)

    def forward(self, x_bla: Tensor) -> Tensor:
        return self.norm(self.linear(x_bla))


class PaperCountHead(nn.Module):
    r"""Head of the paper (C5): :math:`p = \sigma(\mathrm{LN}(W_p X + b_p))`, n = softplus(LN(W_n X + b_n)).

    Given as :math:`\theta = n` and :math:`\log\mu = \log n - \mathrm{LN}(W_p X + b_p)`, which is n (1 - p) / p. The
    normalisation removes the level of X: scaling W X + b changes nothing.

    Parameters
    ----------
    n_assays
        Assays A.

    Examples
    --------
    >>> log_mean, log_theta = PaperCountHead(3)(torch.zeros(2, 5, 3))
    >>> log_mean.shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, n_assays: int) -> None:
        super().__init__()
        self.success = _Normalised(n_assays)
        self.number = _Normalised(n_assays)

    def forward(
        self,
        x_bla: Tensor,
        link_bla: Tensor | None = None,  # noqa: ARG002
        has_prior_ba: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Return log mean and log dispersion, both of shape (b, l, a); a prior is not used."""
        number_bla = softplus(self.number(x_bla))
        log_number_bla = number_bla.clamp_min(torch.finfo(number_bla.dtype).tiny).log()
        return log_number_bla - self.success(x_bla), log_number_bla


class PaperSignalHead(nn.Module):
    """Head of the paper (C5): softplus of a layer normalisation over assays for mean and variance.

    The variance has 1e-3 added, which the paper does not: without it the likelihood has no lower bound.

    Parameters
    ----------
    n_assays
        Assays A.

    Examples
    --------
    >>> mean, variance = PaperSignalHead(3)(torch.zeros(2, 5, 3))
    >>> mean.shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, n_assays: int) -> None:
        super().__init__()
        self.mean = _Normalised(n_assays)
        self.variance = _Normalised(n_assays)

    def forward(
        self,
        x_bla: Tensor,
        link_bla: Tensor | None = None,  # noqa: ARG002
        has_prior_ba: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Return mean and variance, both of shape (b, l, a); a prior is not used."""
        return softplus(self.mean(x_bla)), softplus(self.variance(x_bla)) + VARIANCE_FLOOR
