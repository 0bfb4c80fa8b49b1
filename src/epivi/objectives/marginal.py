"""Importance-sampled marginal likelihood (ConvNet-VAE, Gao and Welch 2025, equations 7-8).

Legend of shapes: b cells of the batch, d latent dimensions, s samples.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from epivi._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class MarginalEstimate(NamedTuple):
    """What importance samples tell about each cell, all of shape (b,), in float64.

    ``log_likelihood_b`` and ``elbo_b`` are in nats; ``effective_sample_size_b`` lies between one and the number of
    samples.
    """

    log_likelihood_b: Tensor
    elbo_b: Tensor
    effective_sample_size_b: Tensor


class LogMeanExp:
    """Running mean of exponentials, kept in logarithms.

    Only the largest log weight seen, the sums of weights and squared weights relative to it and the sum of log weights
    are held, in float64, so any number of samples costs the memory of one.

    Examples
    --------
    >>> running = LogMeanExp()
    >>> for log_weight in (1000.0, 1000.0):
    ...     running.update(torch.tensor([[log_weight]]))
    >>> running.estimate().log_likelihood_b.item()
    1000.0
    """

    def __init__(self) -> None:
        self.n_samples = 0

    def update(self, log_weights_sb: Tensor) -> None:
        """Add samples of log weights, shape (s, b)."""
        log_weights_sb = log_weights_sb.double()
        if not self.n_samples:
            zeros_b = torch.zeros_like(log_weights_sb[0])
            self._top_b = torch.full_like(zeros_b, -math.inf)
            self._sum_b, self._square_b, self._log_b = zeros_b, zeros_b, zeros_b
        self.n_samples += log_weights_sb.shape[0]
        top_b = torch.maximum(self._top_b, log_weights_sb.amax(0))
        # while all weights are zero there is nothing to scale by
        base_b = torch.where(top_b.isneginf(), 0.0, top_b)
        weights_sb = (log_weights_sb - base_b).exp()
        scale_b = (self._top_b - base_b).exp()
        self._sum_b = self._sum_b * scale_b + weights_sb.sum(0)
        self._square_b = self._square_b * scale_b.square() + weights_sb.square().sum(0)
        self._log_b = self._log_b + log_weights_sb.sum(0)
        self._top_b = top_b

    def estimate(self) -> MarginalEstimate:
        r"""Return log mean weight, mean log weight and effective sample size :math:`(\sum w)^2 / \sum w^2`.

        Raises
        ------
        ConfigError
            If no sample was added.
        """
        if not self.n_samples:
            message = "No sample was added; an estimate needs at least one."
            raise ConfigError(message)
        log_mean_b = self._top_b + self._sum_b.log() - math.log(self.n_samples)
        effective_b = torch.where(self._square_b > 0, self._sum_b.square() / self._square_b, 0.0)
        return MarginalEstimate(log_mean_b, self._log_b / self.n_samples, effective_b)


@torch.no_grad()
def importance_estimate(
    log_likelihood: Callable[[Tensor], Tensor],
    mean_bd: Tensor,
    logvar_bd: Tensor,
    *,
    n_samples: int = 1000,
    chunk_size: int = 1,
    generator: torch.Generator | None = None,
    draw: Callable[[], Tensor] | None = None,
) -> MarginalEstimate:
    r"""Estimate marginal likelihood, ELBO and effective sample size of each cell from the same samples.

    .. math::
        \log p(x) \approx \log \frac1{N} \sum_s \exp\left[\log p(x | z_s) + \log N(z_s; 0, I)
        - \log q(z_s | x)\right], \qquad z_s \sim q(z | x) = N(\mu, v)

    (equations 7-8). The mean of the same log weights is an estimate of the ELBO.

    Parameters
    ----------
    log_likelihood
        Maps latents, shape (chunk x b, d), sample by sample, to log p(x | z), shape (chunk x b,), in nats. With a
        chunk of one, row i is cell i.
    mean_bd, logvar_bd
        Mean and log variance of the posterior.
    n_samples
        Samples of each cell.
    chunk_size
        Samples handed to ``log_likelihood`` at once; noise is drawn sample by sample, so it does not change the
        result.
    generator
        Source of noise, on the device of ``mean_bd``.
    draw
        Gives the standard normal noise of one sample of all cells, shape (b, d), instead of ``generator``.

    Raises
    ------
    ConfigError
        If ``n_samples`` or ``chunk_size`` is below one.

    Examples
    --------
    >>> zero = torch.zeros(2, 3)
    >>> importance_estimate(lambda z: z.new_zeros(len(z)), zero, zero, n_samples=4).effective_sample_size_b.tolist()
    [4.0, 4.0]
    """
    if min(n_samples, chunk_size) < 1:
        message = f"n_samples is {n_samples} and chunk_size {chunk_size}; both must be at least 1."
        raise ConfigError(message)
    if draw is None:
        options = {"generator": generator, "dtype": mean_bd.dtype, "device": mean_bd.device}
        draw = partial(torch.randn, mean_bd.shape, **options)
    running = LogMeanExp()
    for start in range(0, n_samples, chunk_size):
        n = min(chunk_size, n_samples - start)
        noise_sbd = torch.stack([draw() for _ in range(n)])
        latent_sbd = mean_bd + (0.5 * logvar_bd).exp() * noise_sbd
        # log p(z) - log q(z | x): the constants of the two Gaussians cancel
        ratio_sb = 0.5 * (noise_sbd.double().square() + logvar_bd - latent_sbd.double().square()).sum(2)
        running.update(log_likelihood(latent_sbd.flatten(0, 1)).view(n, -1).double() + ratio_sb)
    return running.estimate()


def marginal_log_likelihood(
    log_likelihood: Callable[[Tensor], Tensor],
    mean_bd: Tensor,
    logvar_bd: Tensor,
    *,
    n_samples: int = 1000,
    chunk_size: int = 1,
    generator: torch.Generator | None = None,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return the importance-sampled marginal log-likelihood of each cell, shape (b,), in nats.

    Parameters
    ----------
    log_likelihood, mean_bd, logvar_bd, n_samples, chunk_size, generator, draw
        As in :func:`importance_estimate`.

    Raises
    ------
    ConfigError
        If ``n_samples`` or ``chunk_size`` is below one.

    Examples
    --------
    >>> zero = torch.zeros(2, 3)
    >>> marginal_log_likelihood(lambda z: z.new_full((len(z),), -5.0), zero, zero, n_samples=3).tolist()
    [-5.0, -5.0]
    """
    return importance_estimate(
        log_likelihood,
        mean_bd,
        logvar_bd,
        n_samples=n_samples,
        chunk_size=chunk_size,
        generator=generator,
        draw=draw,
    ).log_likelihood_b
