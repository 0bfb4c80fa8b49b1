"""Equations of masked expression: bins relative to a cell's maximum, and means over the hidden genes of cells.

Legend of shapes: b cells, q hidden genes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-3


def masked_cell_mean(error_bq: Tensor, mask_bq: Tensor, *, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    r"""Return the mean over cells of the mean (or sum) over each cell's masked genes, and the means of the cells.

    .. math::
        \frac{1}{|C|} \sum_{i \in C} \frac{1}{|\psi_i|} \sum_{j \in \psi_i} e_{ij}, \qquad
        C = \{i : \psi_i \neq \emptyset\}

    Thesis equation 4.5 is the sum; the mean does not depend on how many genes a cell expresses. Cells without masked
    genes do not count, and where there are no others the result is 0 with zero gradient.

    Parameters
    ----------
    error_bq
        Errors, such as squared differences; those outside the mask have no influence, NaN included.
    mask_bq
        True for masked genes.
    reduction
        ``"mean"`` or ``"sum"`` over the genes of a cell.

    Returns
    -------
    The loss, a number, and the loss of each cell (b,), 0 for cells without masked genes.

    Examples
    --------
    >>> error = torch.tensor([[1.0, 3.0], [5.0, torch.nan], [0.0, 0.0]])
    >>> loss, cells = masked_cell_mean(error, torch.tensor([[True, True], [True, False], [False, False]]))
    >>> loss.item(), cells.tolist()
    (3.5, [2.0, 5.0, 0.0])
    """
    mask_bq = mask_bq.bool()
    sum_b = torch.where(mask_bq, error_bq, 0.0).sum(1)
    n_b = mask_bq.sum(1)
    cell_b = sum_b / n_b.clamp_min(1) if reduction == "mean" else sum_b
    return cell_b.sum() / (n_b > 0).sum().clamp_min(1), cell_b


def inverse_softplus(y: Tensor) -> Tensor:
    r"""Return x with :math:`\log(1 + e^x) = y`; values below 0.001 count as 0.001.

    Examples
    --------
    >>> round(torch.nn.functional.softplus(inverse_softplus(torch.tensor(2.5))).item(), 5)
    2.5
    """
    y = y.clamp_min(_LEAST)
    return y + torch.log(-torch.expm1(-y))
