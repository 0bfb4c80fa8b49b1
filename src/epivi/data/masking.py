"""What a training step hides from a model: whole assays of a sample, and reads of its experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epivi._validate import check_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def hide_assays(available_ba: Tensor, n_hidden: int | None = None) -> Tensor:
    """Choose assays to hide from each sample, at random among those it has.

    One number k ~ U{1, ..., a - 1} is drawn for all samples; a sample hides min(k, available - 1) assays, so that each
    keeps at least one (CANDI, section 4.3).

    Parameters
    ----------
    available_ba
        1 where a sample has an assay, else 0, shape (b, a).
    n_hidden
        The number k; drawn if ``None``.

    Returns
    -------
    1 where an assay is hidden, else 0, shape (b, a). Draws come from the global generator of torch.

    Examples
    --------
    >>> hidden = hide_assays(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), n_hidden=2)
    >>> hidden.sum(1).tolist()
    [2.0, 0.0]
    """
    n_assays = available_ba.shape[1]
    if n_hidden is None:
        n_hidden = int(torch.randint(1, max(n_assays, 2), ()))
    draw_ba = torch.rand(available_ba.shape).to(available_ba.device)
    # unavailable assays come last
    rank_ba = (draw_ba + 2.0 * (available_ba <= 0)).argsort(dim=1).argsort(dim=1)
    n_b1 = (available_ba > 0).sum(1, keepdim=True).sub(1).clamp(min=0, max=n_hidden)
    return ((rank_ba < n_b1) & (available_ba > 0)).to(available_ba.dtype)


def draw_thinning(shape: Sequence[int], factors: Sequence[int], device: torch.device) -> Tensor:
    """Draw the factor by which reads are thinned, one of ``factors`` with equal chance.

    Parameters
    ----------
    shape
        Shape of the result.
    factors
        Whole numbers from 1 on: a read is kept with probability 1 / factor.
    device
        Device of the result; draws are made on the CPU, so that devices agree.

    Raises
    ------
    ConfigError
        If a factor is not a whole number from 1 on.

    Examples
    --------
    >>> draw_thinning((2, 1), (4,), torch.device("cpu")).tolist()
    [[4.0], [4.0]]
    """
    for factor in factors:
        check_number(factor, "thinning factor", low=1, integer=True)
    choice = torch.randint(len(factors), tuple(shape))
    return torch.tensor(factors, dtype=torch.float32)[choice].to(device)
