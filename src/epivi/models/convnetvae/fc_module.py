"""The torch module of FC-VAE: one fully connected expert a modality, joined as a product of Gaussian experts.

Legend of shapes: b cells of the batch, c channels (modalities), f features, h hidden units, d latent dimensions,
k covariates.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from epivi.models.convnetvae.module import ChannelGroup, TracksModule, linear_joined, log_counts
from epivi.nn.covariates import Covariates
from epivi.nn.experts import expert_shares, product_of_experts
from epivi.nn.linear import BlockedRows, BlockLogits, PeakBlocks, SparseLinear
from epivi.nn.mlp import LOGVAR_LIMIT, GroupedLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from epivi.models.convnetvae.config import FcvaeConfig

MIN_SEEN = 2  # cells that statistics need


class PaddedCovariates(Covariates):
    """Covariates with at least one column: the paper counts one batch as one constant column of zeros.

    Examples
    --------
    >>> PaddedCovariates(n_batch=1)(torch.tensor([0, 0])).tolist()
    [[0.0], [0.0]]
    """

    @classmethod
    def of(cls, covariates: Covariates) -> Self:
        """Return the same covariates, with a column of zeros if they have none."""
        return cls(
            n_batch=covariates.n_batch,
            n_cats_per_cov=covariates.n_cats_per_cov,
            n_continuous=covariates.n_continuous,
        )

    @property
    def is_padded(self) -> bool:
        """Whether the one column is constant."""
        return super().n_columns == 0

    @property
    def n_columns(self) -> int:
        """Number of columns k."""
        return max(super().n_columns, 1)

    def columns_of(self, other: Covariates) -> list[int]:
        """As in the base; a constant column becomes that of the first category, which all those cells have."""
        is_padded = isinstance(other, PaddedCovariates) and other.is_padded
        return [0] if is_padded else super().columns_of(other)

    def forward(
        self, batch_b: Tensor, categorical_bi: Tensor | None = None, continuous_bi: Tensor | None = None
    ) -> Tensor:
        """Return the columns, shape (b, k)."""
        columns_bk = super().forward(batch_b, categorical_bi, continuous_bi)
        return columns_bk.new_zeros(len(batch_b), 1) if self.is_padded else columns_bk


class GroupedLayer(nn.Module):
    """One fully connected layer for each modality: linear, batch normalisation, ReLU, dropout.

    Parameters
    ----------
    n_groups, n_units
        Modalities and hidden units of each.
    linear
        Whether a linear map comes first; without it, the input is normalised as it is.
    dropout_rate, momentum, eps
        Of dropout and batch normalisation.
    """

    def __init__(
        self, n_groups: int, n_units: int, *, linear: bool, dropout_rate: float, momentum: float, eps: float
    ) -> None:
        super().__init__()
        self.linear = GroupedLinear(n_groups, n_units, n_units) if linear else nn.Identity()
        self.norm = nn.BatchNorm1d(n_groups * n_units, momentum=momentum, eps=eps)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x_bch: Tensor, seen_bc: Tensor | None = None) -> Tensor:
        """Return the same shape, (b, c, h).

        Parameters
        ----------
        x_bch
            Input of each modality.
        seen_bc
            Which modalities count for the batch statistics; all if ``None``.
        """
        x_bch = self.linear(x_bch)
        if seen_bc is None or not self.norm.training or bool((seen_bc > 0).all()):
            y_bch = self.norm(x_bch.flatten(1)).view_as(x_bch)
        else:
            y_bch = self._norm_of_seen(x_bch, (seen_bc > 0).unsqueeze(2))
        return self.dropout(torch.relu(y_bch))

    def _norm_of_seen(self, x_bch: Tensor, seen_bc1: Tensor) -> Tensor:
        """Batch normalisation with the statistics of the cells that have the modality.

        Absent modalities would enter as cells of zeros and rule the statistics of one that few cells have. A modality
        that fewer than two cells of the minibatch have keeps its running statistics.
        """
        norm: Any = self.norm
        shape = x_bch.shape[1:]
        n_c1 = seen_bc1.sum(0).to(x_bch.dtype)
        mean_ch = torch.where(seen_bc1, x_bch, 0.0).sum(0) / n_c1.clamp_min(1)
        variance_ch = torch.where(seen_bc1, (x_bch - mean_ch).square(), 0.0).sum(0) / n_c1.clamp_min(1)
        is_enough = n_c1 >= MIN_SEEN
        running_mean_ch, running_variance_ch = norm.running_mean.view(shape), norm.running_var.view(shape)
        mean_ch = torch.where(is_enough, mean_ch, running_mean_ch)
        variance_ch = torch.where(is_enough, variance_ch, running_variance_ch)
        y_bch = (x_bch - mean_ch) * (variance_ch + norm.eps).rsqrt() * norm.weight.view(shape) + norm.bias.view(shape)
        with torch.no_grad():
            unbiased_ch = variance_ch * n_c1 / (n_c1 - 1).clamp_min(1)
            rate = norm.momentum * is_enough.to(x_bch.dtype)
            running_mean_ch += rate * (mean_ch - running_mean_ch)
            running_variance_ch += rate * (unbiased_ch - running_variance_ch)
            norm.num_batches_tracked += 1
        return y_bch


class FcvaeModule(TracksModule):
    """FC-VAE: q(z|x) is the product of the prior and one Gaussian expert for each measured modality (equations 4-6).

    The experts of all modalities are computed together, each on its own weights.

    Parameters
    ----------
    config, lengths, covariates, library
        As in :class:`epivi.models.convnetvae.module.TracksModule`.
    """

    def __init__(self, config: FcvaeConfig, lengths: Sequence[int], covariates: Covariates, *, library: Tensor) -> None:
        super().__init__(config, lengths, PaddedCovariates.of(covariates), library=library)
        c, h, d, k = self.n_channels, config.n_hidden, config.n_latent, self.covariates.n_columns
        self.blocks = PeakBlocks(np.repeat(np.arange(c), self.lengths))
        self.first = SparseLinear(self.blocks, h, diagonal=True)
        self.first_covariates = nn.Linear(k, c * h, bias=False)
        options = config.norm_options
        self.encoder = nn.Sequential(*(GroupedLayer(c, h, linear=i > 0, **options) for i in range(config.n_layers)))
        self.mean, self.logvar = GroupedLinear(c, h, d), GroupedLinear(c, h, d)
        self.expand = nn.Linear(d + k, c * h)
        self.decoder = nn.Sequential(*(GroupedLayer(c, h, linear=i > 0, **options) for i in range(config.n_layers)))
        self.output = BlockLogits(self.blocks, h, diagonal=True)
        self._draw_first()

    @torch.no_grad()
    def _draw_first(self) -> None:
        """Draw the first layer of each expert as one linear layer on its bins and the covariates."""
        parts = zip(
            self.first.weight.split(self.lengths),
            self.first.bias,
            self.first_covariates.weight.split(self.config.n_hidden),
            self.lengths,
            strict=True,
        )
        for part_fh, bias_h, covariates_hk, length in parts:
            bound = 1 / math.sqrt(length + self.covariates.n_columns)
            for weights in (part_fh, bias_h, covariates_hk):
                weights.uniform_(-bound, bound)
        if self.covariates.is_padded:
            # nothing is learnt about the constant column; zeros keep the function when a query adds categories
            self.first_covariates.weight.zero_()
            self.expand.weight[:, self.config.n_latent :] = 0.0

    @property
    def condition_weights(self) -> dict[str, int]:
        """The first layers of the experts and of the decoder read the covariates."""
        if self.covariates.is_padded:
            return {}
        return {"first_covariates.weight": 0, "expand.weight": self.config.n_latent}

    @property
    def group_lengths(self) -> list[tuple[int, ...]]:
        """Every channel is a group."""
        return [(n,) for n in self.lengths]

    def groups(self, indptr: Tensor, indices: Tensor, values: Tensor) -> list[ChannelGroup]:
        """Cut the non-zeros of a batch by channel."""
        parts = self.blocks.split(indptr, indices, values)
        values_c: Any = parts.values
        return [
            ChannelGroup(j, (n,), rows, columns - start, part, torch.zeros_like(columns, dtype=torch.long))
            for j, (n, start, rows, columns, part) in enumerate(
                zip(self.lengths, self.blocks.starts, parts.rows, parts.columns, values_c, strict=False)
            )
        ]

    def experts(
        self, groups: list[ChannelGroup], covariates_bk: Tensor, seen_bc: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return means and log variances of every expert, both of shape (b, c, d); those unseen may hold anything."""
        batch = BlockedRows(
            covariates_bk.shape[0],
            [group.rows for group in groups],
            [group.columns + start for group, start in zip(groups, self.blocks.starts, strict=False)],
            [group.values for group in groups],
            self.blocks,
        )
        hidden_bch = self.first(batch)
        hidden_bch = hidden_bch + self.first_covariates(covariates_bk).view_as(hidden_bch)
        for layer in self.encoder:
            hidden_bch = layer(hidden_bch, seen_bc)
        return self.mean(hidden_bch), self.logvar(hidden_bch).clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)

    def encode(self, groups: list[ChannelGroup], seen_bc: Tensor, covariates_bk: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log variances of the product of the experts that were seen, both of shape (b, d)."""
        return product_of_experts(*self.experts(groups, covariates_bk, seen_bc), seen_bc)

    def expert_weights(
        self, indptr: Tensor, indices: Tensor, values: Tensor, mask_bc: Tensor, covariates_bk: Tensor
    ) -> Tensor:
        """Return the share of each expert in the posterior precision, shape (b, c + 1), the prior last."""
        groups = log_counts(self.groups(indptr, indices, values), mask_bc)
        return expert_shares(self.experts(groups, covariates_bk)[1], mask_bc)

    def decode(self, z_bd: Tensor, covariates_bk: Tensor) -> Tensor:
        """Return the hidden units of the decoder of each modality, shape (b, c, h)."""
        hidden = linear_joined(self.expand, z_bd, covariates_bk)
        return self.decoder(hidden.unflatten(1, (self.n_channels, self.config.n_hidden)))

    def logits(self, hidden: Tensor) -> list[Tensor]:
        """Return the logits of each channel."""
        return list(self.output(hidden))
