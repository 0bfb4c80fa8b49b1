"""Alignment of the cells' similarities to a reference embedding (SAILERX, Cao 2022).

Legend of shapes: b cells of the batch, d latent dimensions, r dimensions of the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

UNIT_EPS = 1e-4


def unit_rows(x_bd: Tensor, eps: float = UNIT_EPS) -> Tensor:
    """Scale rows to length one; a row shorter than ``eps`` is divided by ``eps``, so that its gradient stays finite.

    Examples
    --------
    >>> unit_rows(torch.tensor([[3.0, 4.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    return x_bd / torch.linalg.vector_norm(x_bd, dim=1, keepdim=True).clamp_min(eps)


def alignment_loss(mean_bd: Tensor, reference_br: Tensor, weight_b: Tensor, n_referenced: Tensor) -> Tensor:
    r"""Return the weighted mean squared difference of cosine similarities over pairs of referenced cells.

    .. math::
        L = \frac{1}{n_m^2} \sum_{ij} w_i w_j (S^g_{ij} - S^p_{ij})^2

    where :math:`S^g` are cosine similarities of the reference, :math:`S^p` those of the posterior means,
    :math:`w_i = m_i\gamma_i` and :math:`n_m` the number of referenced cells (equations 3.3-3.5, with the squared
    difference of the released code in place of the distance). With unit rows scaled by :math:`\sqrt{w_i}`, R and Z,
    the sum equals :math:`\|R^TR\|^2 - 2\|R^TZ\|^2 + \|Z^TZ\|^2`, which needs no b x b matrix. That form is taken
    when b is more than four times both widths, and accumulates in float64 because large norms cancel. Gradients flow
    through ``mean_bd`` only.

    Parameters
    ----------
    mean_bd
        Posterior means.
    reference_br
        Reference embedding; rows of cells without reference may hold anything finite.
    weight_b
        Alignment weight gamma of each cell, zero for cells without reference.
    n_referenced
        Number of cells with a reference, zero-dimensional.

    Returns
    -------
    Zero-dimensional; exactly 0 if fewer than two cells have a reference.

    Examples
    --------
    >>> x = torch.eye(3)
    >>> alignment_loss(x, x, torch.ones(3), torch.tensor(3)).item()
    0.0
    """
    reference_br = unit_rows(reference_br.detach())
    latent_bd = unit_rows(mean_bd)
    n_pairs = n_referenced.to(mean_bd.dtype).square().clamp_min(1.0)
    if mean_bd.shape[0] > 4 * max(mean_bd.shape[1], reference_br.shape[1]):
        root_b = weight_b.double().sqrt().unsqueeze(1)
        total = _low_rank_form(root_b * latent_bd.double(), root_b * reference_br.double()).to(mean_bd.dtype)
    else:
        difference_bb = reference_br @ reference_br.t() - latent_bd @ latent_bd.t()
        total = (weight_b.unsqueeze(1) * weight_b * difference_bb.square()).sum()
    return torch.where(n_referenced >= 2, total / n_pairs, total * 0.0)


def _low_rank_form(latent_bd: Tensor, reference_br: Tensor) -> Tensor:
    """Sum of squared differences of two Gram matrices from their small products."""
    return (
        (reference_br.t() @ reference_br).square().sum()
        - 2.0 * (reference_br.t() @ latent_bd).square().sum()
        + (latent_bd.t() @ latent_bd).square().sum()
    )


def alignment_share(mean_bd: Tensor, reference_br: Tensor, weight_b: Tensor, n_referenced: Tensor) -> Tensor:
    """Return each cell's share of :func:`alignment_loss`, shape (b,); the shares add up to the loss.

    Examples
    --------
    >>> x = torch.eye(3)
    >>> alignment_share(x, x, torch.ones(3), torch.tensor(3)).tolist()
    [0.0, 0.0, 0.0]
    """
    reference_br, latent_bd = unit_rows(reference_br), unit_rows(mean_bd)
    difference_bb = reference_br @ reference_br.t() - latent_bd @ latent_bd.t()
    share_b = weight_b * (difference_bb.square() @ weight_b)
    n_pairs = n_referenced.to(mean_bd.dtype).square().clamp_min(1.0)
    return torch.where(n_referenced >= 2, share_b / n_pairs, share_b * 0.0)
