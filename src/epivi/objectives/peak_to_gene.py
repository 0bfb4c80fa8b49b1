"""The losses of EpiFoundation: masked means over pairs of a cell and a gene, or of a cell and a peak.

Legend of shapes: b cells, g genes (or peaks) scored in a cell, k levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

if TYPE_CHECKING:
    from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values where the mask is true; 0, with gradient 0, where it never is.

    Examples
    --------
    >>> float(masked_mean(torch.tensor([1.0, 5.0]), torch.tensor([True, False])))
    1.0
    """
    # a sum over selected values would give NaN times 0 where a masked value is not finite
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def gene_cross_entropy(logits_bgk: Tensor, level_bg: Tensor, mask_bg: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of the levels of the sampled genes (equation 10); ln k is chance.

    Parameters
    ----------
    logits_bgk
        Logits of the levels.
    level_bg
        True level of each gene.
    mask_bg
        Which entries are no pads.

    Examples
    --------
    >>> mask = torch.ones(1, 4, dtype=torch.bool)
    >>> round(float(gene_cross_entropy(torch.zeros(1, 4, 2), torch.tensor([[0, 1, 0, 1]]), mask)), 4)
    0.6931
    """
    loss_bg = cross_entropy(logits_bgk.flatten(0, 1), level_bg.long().flatten(), reduction="none")
    return masked_mean(loss_bg.view_as(mask_bg), mask_bg)


def balanced_accuracy(logit_bg: Tensor, is_positive_bg: Tensor, mask_bg: Tensor) -> Tensor:
    """Return the mean of the shares of positives and of negatives that are called as such.

    Examples
    --------
    >>> mask = torch.ones(1, 3, dtype=torch.bool)
    >>> float(balanced_accuracy(torch.tensor([[2.0, -1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]]), mask))
    0.75
    """
    is_right_bg = ((logit_bg > 0) == (is_positive_bg > 0)).float()
    positive = masked_mean(is_right_bg, mask_bg & (is_positive_bg > 0))
    negative = masked_mean(is_right_bg, mask_bg & (is_positive_bg <= 0))
    return 0.5 * (positive + negative)


def frequency_logit(log_odds_bg: Tensor, n_expressed_b1: Tensor, n_genes: int) -> Tensor:
    r"""Return the logits of a predictor that knows how often each gene is expressed, and how genes are sampled.

    Of the n expressed genes of a cell and its N - n silent ones equally many are sampled, so that by Bayes' rule the
    logit of gene g with share :math:`p_g` is :math:`\mathrm{logit}\,p_g + \log((N - n) / n)`.

    Parameters
    ----------
    log_odds_bg
        Logit of the share of cells that express each sampled gene.
    n_expressed_b1
        Genes that the cell expresses.
    n_genes
        Genes N of the vocabulary.

    Examples
    --------
    >>> frequency_logit(torch.zeros(1, 2), torch.tensor([[1]]), 2).tolist()
    [[0.0, 0.0]]
    """
    n_b1 = n_expressed_b1.clamp(1, n_genes - 1)
    return log_odds_bg + ((n_genes - n_b1) / n_b1).log()


def open_peak_loss(logit_bh: Tensor, is_open_bh: Tensor, mask_bh: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of hidden open and of closed peaks, each half of the weight.

    Examples
    --------
    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> round(float(open_peak_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), mask)), 4)
    0.6931
    """
    loss_bh = binary_cross_entropy_with_logits(logit_bh, is_open_bh, reduction="none")
    is_open = is_open_bh > 0
    return 0.5 * (masked_mean(loss_bh, mask_bh & is_open) + masked_mean(loss_bh, mask_bh & ~is_open))
