"""Product of Gaussian experts with a standard normal prior (ConvNet-VAE, Gao and Welch 2025).

Legend of shapes: b cells of the batch, c experts (modalities), d latent dimensions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def _log_shares(logvar_bcd: Tensor, mask_bc: Tensor | None, *, prior: bool) -> tuple[Tensor, Tensor]:
    """Return the log share of each expert in the precision, (b, c, d), and the log precision, (b, d)."""
    log_precision_bcd = -logvar_bcd
    if mask_bc is not None:
        # filled, not multiplied: whatever a missing expert holds reaches neither values nor gradients
        log_precision_bcd = log_precision_bcd.masked_fill(~mask_bc.bool().unsqueeze(2), -math.inf)
    experts_bcd = log_precision_bcd
    if prior:
        experts_bcd = torch.cat([torch.zeros_like(log_precision_bcd[:, :1]), log_precision_bcd], dim=1)
    total_bd = torch.logsumexp(experts_bcd, dim=1)
    return log_precision_bcd - total_bd.unsqueeze(1), total_bd


def product_of_experts(
    mean_bcd: Tensor, logvar_bcd: Tensor, mask_bc: Tensor | None = None, *, prior: bool = True
) -> tuple[Tensor, Tensor]:
    r"""Return the Gaussian proportional to the product of the experts and the prior N(0, I).

    .. math::
        \frac1{v_k} = 1 + \sum_m \frac{o_m}{v_{mk}}, \qquad \mu_k = v_k \sum_m o_m \frac{\mu_{mk}}{v_{mk}}

    (equations 4-5; equation 6 as printed omits the prior and misprints the mean). The log precision is the
    logsumexp of 0 and of the negative log variances of the experts that are present.

    Parameters
    ----------
    mean_bcd, logvar_bcd
        Means and log variances of the experts.
    mask_bc
        Which experts are present; ``None`` stands for all. An absent expert may hold anything, NaN included.
    prior
        Whether N(0, I) is one of the experts. Without it, at least one expert of each cell must be present.

    Returns
    -------
    Mean and log variance, both of shape (b, d); exactly 0 and 0 where no expert is present beside the prior.

    Examples
    --------
    >>> mean, logvar = product_of_experts(torch.tensor([[[3.0], [0.0]]]), torch.zeros(1, 2, 1))
    >>> round(mean.item(), 4), round(logvar.exp().item(), 4)
    (1.0, 0.3333)
    """
    log_share_bcd, log_precision_bd = _log_shares(logvar_bcd, mask_bc, prior=prior)
    if mask_bc is not None:
        mean_bcd = mean_bcd.masked_fill(~mask_bc.bool().unsqueeze(2), 0.0)
    return (log_share_bcd.exp() * mean_bcd).sum(1), 0.0 - log_precision_bd


def expert_shares(logvar_bcd: Tensor, mask_bc: Tensor | None = None) -> Tensor:
    """Return the share of each expert in the posterior precision, averaged over the latent dimensions.

    Returns
    -------
    Shape (b, c + 1): the experts, then the prior; rows add up to one.

    Examples
    --------
    >>> expert_shares(torch.zeros(1, 1, 4)).tolist()
    [[0.5, 0.5]]
    """
    log_share_bcd, log_precision_bd = _log_shares(logvar_bcd, mask_bc, prior=True)
    return torch.cat([log_share_bcd.exp().mean(2), (-log_precision_bd).exp().mean(1, keepdim=True)], dim=1)
