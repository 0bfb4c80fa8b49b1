"""Terms that bound the information between the latent and the confounders (SAILER, Cao 2021).

Legend of shapes: b cells of the batch, d latent dimensions. Every posterior is a diagonal Gaussian with means
``mean_bd`` and log variances ``logvar_bd``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def kl_standard_normal(mean_bd: Tensor, logvar_bd: Tensor) -> Tensor:
    r"""Return KL(q || N(0, I)) of each cell: :math:`\frac12\sum_k (v_k + \mu_k^2 - 1 - \log v_k)`.

    Returns
    -------
    Shape (b,), in nats.

    Examples
    --------
    >>> kl_standard_normal(torch.ones(1, 2), torch.zeros(1, 2)).item()
    1.0
    """
    return 0.5 * (logvar_bd.exp() + mean_bd.square() - 1.0 - logvar_bd).sum(1)


def pairwise_kl(mean_bd: Tensor, logvar_bd: Tensor) -> Tensor:
    r"""Return the mean over all pairs of cells of KL(q_i || q_j), exactly and without a b x b matrix.

    The paper replaces :math:`E\,KL(q(z|x) \| q(z))` of equation 2.14 by the mean over the pairs of a minibatch. All
    logarithms cancel in that mean; with :math:`m = \mu - \langle\mu\rangle` it is

    .. math::
        \tfrac12 \sum_k \left[\langle v_k\rangle \langle 1/v_k\rangle - 1
        + \langle m_k^2\rangle\langle 1/v_k\rangle + \langle m_k^2 / v_k\rangle\right],

    in O(b d) and without negative parts. It is an upper bound of the information between latent and data, and no term
    contains a confounder: invariance comes from this compression together with a decoder that is given the confounders.

    Returns
    -------
    Zero-dimensional, in nats.

    Examples
    --------
    >>> pairwise_kl(torch.ones(3, 2), torch.zeros(3, 2)).item()
    0.0
    """
    variance_bd = logvar_bd.exp()
    precision_bd = (-logvar_bd).exp()
    centred_bd = (mean_bd - mean_bd.mean(0)).square()
    mean_precision_d = precision_bd.mean(0)
    per_dimension_d = (
        variance_bd.mean(0) * mean_precision_d
        - 1.0
        + centred_bd.mean(0) * mean_precision_d
        + (centred_bd * precision_bd).mean(0)
    )
    return 0.5 * per_dimension_d.sum()


def pairwise_kl_matrix(mean_bd: Tensor, logvar_bd: Tensor) -> Tensor:
    r"""Return the matrix of KL(q_i || q_j) over all pairs, shape (b, b), in nats.

    Examples
    --------
    >>> pairwise_kl_matrix(torch.zeros(2, 1), torch.zeros(2, 1)).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    mean_bd = mean_bd - mean_bd.mean(0)  # only differences count; smaller squares cancel with less loss
    variance_bd, precision_bd = logvar_bd.exp(), (-logvar_bd).exp()
    square_bb = (
        mean_bd.square() @ precision_bd.t()
        - 2.0 * mean_bd @ (mean_bd * precision_bd).t()
        + (mean_bd.square() * precision_bd).sum(1)
    )
    log_ratio_bb = logvar_bd.sum(1).unsqueeze(0) - logvar_bd.sum(1).unsqueeze(1)
    return 0.5 * (variance_bd @ precision_bd.t() + square_bb - mean_bd.shape[1] + log_ratio_bb)


def mixture_information(mean_bd: Tensor, logvar_bd: Tensor) -> Tensor:
    r"""Return the estimate of Kolchinsky and Tracey (2017) of the information term.

    :math:`-\frac1b\sum_i \log \frac1b\sum_j \exp(-KL(q_i \| q_j))`: tighter than the pairwise mean, and at most log b.

    Returns
    -------
    Zero-dimensional, in nats.

    Examples
    --------
    >>> mixture_information(torch.zeros(4, 2), torch.zeros(4, 2)).item()
    0.0
    """
    matrix_bb = pairwise_kl_matrix(mean_bd, logvar_bd)
    n = torch.tensor(float(matrix_bb.shape[0]), dtype=matrix_bb.dtype, device=matrix_bb.device)
    return (n.log() - torch.logsumexp(-matrix_bb, dim=1)).mean()
