"""Covariates as inputs of a network.

Legend of shapes: b cells of the batch, k columns of covariates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import one_hot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

DEPTH_LIMIT = 5.0


class Covariates(nn.Module):
    """Continuous and categorical covariates, and the batch last, side by side.

    A categorical covariate with a single category carries nothing and gets no column; from two categories on it is
    one-hot. The batch comes last, so that new batches of a query append columns at the end.

    Parameters
    ----------
    n_batch
        Number of batches.
    n_cats_per_cov
        Number of categories of each further categorical covariate.
    n_continuous
        Number of continuous covariates.

    Examples
    --------
    >>> Covariates(n_batch=2)(torch.tensor([1])).tolist()
    [[0.0, 1.0]]
    """

    n_leading = 0  # columns before the continuous covariates

    def __init__(self, *, n_batch: int = 1, n_cats_per_cov: Sequence[int] = (), n_continuous: int = 0) -> None:
        super().__init__()
        self.n_batch = int(n_batch)
        self.n_cats_per_cov = tuple(int(n) for n in n_cats_per_cov)
        self.n_continuous = int(n_continuous)

    @property
    def n_columns(self) -> int:
        """Number of columns k."""
        return self.n_leading + self.n_continuous + sum(self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each categorical covariate and, last, of the batch."""
        return tuple(_width(n) for n in (*self.n_cats_per_cov, self.n_batch))

    def columns_of(self, other: Covariates) -> list[int]:
        """Where the columns of covariates with fewer categories stand among these; categories are only appended.

        Examples
        --------
        >>> old = Covariates(n_batch=2, n_cats_per_cov=[2])
        >>> Covariates(n_batch=3, n_cats_per_cov=[3]).columns_of(old)
        [0, 1, 3, 4]
        """
        start = self.n_leading + self.n_continuous
        columns = list(range(start))
        for width, other_width in zip(self.widths, other.widths, strict=True):
            columns += range(start, start + other_width)
            start += width
        return columns

    def known_columns(self, other: Covariates) -> list[int]:
        """Columns that stand for categories of covariates with fewer of them, those without a column there included.

        Examples
        --------
        >>> Covariates(n_batch=3).known_columns(Covariates(n_batch=1))
        [0]
        """
        start = self.n_leading + self.n_continuous
        columns = list(range(start))
        known = (*other.n_cats_per_cov, other.n_batch)
        for width, n_known in zip(self.widths, known, strict=True):
            columns += range(start, start + min(n_known, width))
            start += width
        return columns

    def forward(
        self, batch_b: Tensor, categorical_bi: Tensor | None = None, continuous_bi: Tensor | None = None
    ) -> Tensor:
        """Return the columns, shape (b, k).

        Parameters
        ----------
        batch_b
            Codes of the batch.
        categorical_bi, continuous_bi
            Codes and values of the further covariates, one column each.
        """
        columns = []
        if self.n_continuous and continuous_bi is not None:
            columns.append(continuous_bi)
        for i, n in enumerate(self.n_cats_per_cov):
            if _width(n) and categorical_bi is not None:
                columns.append(one_hot(categorical_bi[:, i].long(), n).float())
        if _width(self.n_batch):
            columns.append(one_hot(batch_b.long(), self.n_batch).float())
        return torch.cat(columns, dim=1) if columns else torch.zeros(batch_b.shape[0], 0, device=batch_b.device)


class DecoderCovariates(Covariates):
    """Standardised log depth before the columns of :class:`Covariates`.

    Parameters
    ----------
    log_depth_mean, log_depth_sd
        Mean and standard deviation of log depth over the training cells, kept as buffers: training, imputation and
        queries use the same standardisation. The standardised value is clamped to [-5, 5].
    n_batch, n_cats_per_cov, n_continuous
        As in :class:`Covariates`.
    """

    log_depth_mean: Tensor
    log_depth_sd: Tensor
    n_leading = 1

    def __init__(self, log_depth_mean: float, log_depth_sd: float, **covariates: Any) -> None:
        super().__init__(**covariates)
        self.register_buffer("log_depth_mean", torch.tensor(float(log_depth_mean)))
        self.register_buffer("log_depth_sd", torch.tensor(float(log_depth_sd)))

    def standardise(self, depth_b: Tensor) -> Tensor:
        """Return the standardised log depth, shape (b,); a depth below one counts as one."""
        z_b = (depth_b.clamp_min(1.0).log() - self.log_depth_mean) / self.log_depth_sd
        return z_b.clamp(-DEPTH_LIMIT, DEPTH_LIMIT)

    def forward(  # type: ignore[override]
        self,
        depth_b: Tensor,
        batch_b: Tensor,
        categorical_bi: Tensor | None = None,
        continuous_bi: Tensor | None = None,
    ) -> Tensor:
        """Return the columns, shape (b, k).

        Parameters
        ----------
        depth_b
            Depth (number of open peaks, or what the user gave), not standardised.
        batch_b, categorical_bi, continuous_bi
            As in :class:`Covariates`.
        """
        others_bk = super().forward(batch_b, categorical_bi, continuous_bi)
        return torch.cat([self.standardise(depth_b).unsqueeze(1), others_bk.to(depth_b.dtype)], dim=1)


def _width(n_categories: int) -> int:
    """Columns of a one-hot covariate: none if there is one category only."""
    return n_categories if n_categories > 1 else 0
