"""Likelihoods of sparse accessibility, and the calibration of weighted ones.

Legend of shapes: b cells of the batch, p peaks, o non-zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from torch import Tensor


class _WeightedBernoulli(torch.autograd.Function):
    """Dense pass as if every peak were closed, then a correction at the open ones."""

    @staticmethod
    def forward(ctx, logits_bp: Tensor, open_o: Tensor, rows_o: Tensor, weight: float, closed_weight: float) -> Tensor:
        logits_o = logits_bp.reshape(-1)[open_o]
        loss_b = softplus(logits_bp).sum(1)
        if closed_weight != 1.0:
            loss_b = loss_b * closed_weight
        correction_o = (weight - closed_weight) * softplus(logits_o) - weight * logits_o
        ctx.save_for_backward(logits_bp, open_o)
        ctx.weight, ctx.closed_weight = weight, closed_weight
        return loss_b.index_add_(0, rows_o, correction_o)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_bp, open_o = ctx.saved_tensors
        grad_bp = torch.sigmoid(logits_bp)
        if ctx.closed_weight != 1.0:
            grad_bp *= ctx.closed_weight
        flat = grad_bp.view(-1)
        flat[open_o] = ctx.weight * (torch.sigmoid(logits_bp.reshape(-1)[open_o]) - 1.0)
        grad_bp *= grads[0].unsqueeze(1)
        return grad_bp, None, None, None, None


def weighted_bernoulli(
    logits_bp: Tensor, open_o: Tensor, rows_o: Tensor, weight: float = 1.0, *, closed_weight: float = 1.0
) -> Tensor:
    r"""Return the weighted negative log-likelihood of binary accessibility, one value a cell.

    .. math::
        R_i = -\sum_g \left[\omega\, x_{ig} \log \hat x_{ig} + \omega_0 (1 - x_{ig}) \log(1 - \hat x_{ig})\right],
        \qquad \hat x = \mathrm{sigmoid}(a)

    evaluated as :math:`\sum_g \omega_0\,\mathrm{softplus}(a_{ig})` over all peaks plus
    :math:`(\omega - \omega_0)\,\mathrm{softplus}(a_{ig}) - \omega a_{ig}` over the open ones, so that a dense x is
    never needed (SAILER, Cao 2021, the reconstruction term of equation 2.14).

    Parameters
    ----------
    logits_bp
        Logits a, shape (b, p), contiguous.
    open_o
        Shape (o,): row-major positions of the open peaks, row x p + column, each once.
    rows_o
        Shape (o,): rows of the open peaks.
    weight
        Weight omega of the open entries.
    closed_weight
        Weight omega_0 of the closed entries.

    Returns
    -------
    Shape (b,), in nats.

    Examples
    --------
    >>> logits = torch.zeros(1, 4)
    >>> round(weighted_bernoulli(logits, torch.tensor([1]), torch.tensor([0])).item(), 4)
    2.7726
    """
    return _WeightedBernoulli.apply(logits_bp, open_o, rows_o, weight, closed_weight)


def calibrate(probability: Tensor, weight: float) -> Tensor:
    r"""Turn the output of a weighted cross-entropy into a probability.

    The cross-entropy with weight :math:`\omega` on the open entries is smallest at
    :math:`p' = \omega p / (1 + (\omega - 1) p)`; this is the inverse, :math:`p = p' / (\omega - (\omega - 1) p')`.

    Parameters
    ----------
    probability
        Output p' of the sigmoid, any shape.
    weight
        Weight omega that was used in training.

    Examples
    --------
    >>> round(calibrate(torch.tensor(0.9), 9.0).item(), 4)
    0.5
    """
    return probability / (weight - (weight - 1.0) * probability)
