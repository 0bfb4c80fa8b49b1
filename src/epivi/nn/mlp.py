"""Encoders and decoders of the SAILER family, for sparse peaks.

Legend of shapes: b cells of the batch, c chromosomes (blocks of peaks), h hidden units, d latent dimensions,
k covariates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from epivi.nn.linear import BlockLogits, SparseLinear

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.nn.kernels import PeakLists
    from epivi.nn.linear import BlockedRows, PeakBlocks

LOGVAR_LIMIT = 8.0
SLOPE = 0.2


class GroupedLinear(nn.Module):
    """One linear layer for each chromosome, computed as one batched product.

    Parameters
    ----------
    n_groups, n_in, n_out
        Number of chromosomes, inputs and outputs of each.
    """

    def __init__(self, n_groups: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_groups, n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_groups, 1, n_out))
        with torch.no_grad():
            for part_io in self.weight:
                nn.init.xavier_uniform_(part_io)

    def forward(self, x_bch: Tensor) -> Tensor:
        """Return shape (b, c, n_out)."""
        return torch.baddbmm(self.bias, x_bch.transpose(0, 1), self.weight).transpose(0, 1)


class PReLU(nn.PReLU):
    """The activation of torch, as sums of two parts: on the CPU its gradient then takes a third of the time.

    Examples
    --------
    >>> PReLU()(torch.tensor([-4.0, 3.0])).tolist()
    [-1.0, 3.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape; with several slopes, axis 1 has one each."""
        slope = self.weight.view(-1, *[1] * (x.ndim - 2)) if self.num_parameters > 1 else self.weight
        return torch.relu(x) + slope * x.clamp_max(0.0)


class GroupedNorm(nn.Module):
    """Batch normalisation of every hidden unit, then a PReLU with one slope a chromosome, then dropout.

    Parameters
    ----------
    n_groups, n_hidden
        Number of chromosomes and hidden units of each.
    dropout_rate
        Share of units set to zero in training.
    momentum, eps
        Of the batch normalisation.
    """

    def __init__(self, n_groups: int, n_hidden: int, *, dropout_rate: float, momentum: float, eps: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(n_groups * n_hidden, momentum=momentum, eps=eps)
        self.activation = PReLU(n_groups)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x_bch: Tensor) -> Tensor:
        """Return the same shape, (b, c, h)."""
        return self.dropout(self.activation(self.norm(x_bch.flatten(1)).view_as(x_bch)))


def dense_block(
    n_in: int,
    n_out: int,
    *,
    dropout_rate: float,
    momentum: float,
    eps: float,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    """Return Linear, batch normalisation, activation and dropout.

    Parameters
    ----------
    n_in, n_out
        Inputs and outputs.
    dropout_rate, momentum, eps
        Of dropout and batch normalisation.
    activation
        Kind of the activation; LeakyReLU(0.2) if ``None``.

    Examples
    --------
    >>> dense_block(3, 2, dropout_rate=0.0, momentum=0.1, eps=1e-5)(torch.zeros(4, 3)).shape
    torch.Size([4, 2])
    """
    return nn.Sequential(
        nn.Linear(n_in, n_out),
        nn.BatchNorm1d(n_out, momentum=momentum, eps=eps),
        nn.LeakyReLU(SLOPE) if activation is None else activation(),
        nn.Dropout(dropout_rate),
    )


class GaussianHeads(nn.Module):
    """Two linear heads: mean and log variance of the posterior, the log variance clamped to [-8, 8]."""

    def __init__(self, n_in: int, n_latent: int, *, xavier: bool) -> None:
        super().__init__()
        self.mean = nn.Linear(n_in, n_latent)
        self.logvar = nn.Linear(n_in, n_latent)
        if xavier:
            for head in (self.mean, self.logvar):
                nn.init.xavier_uniform_(head.weight)
                nn.init.zeros_(head.bias)

    def forward(self, hidden_bh: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log variances, both of shape (b, d)."""
        return self.mean(hidden_bh), self.logvar(hidden_bh).clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)


class DenseEncoder(nn.Module):
    """Encoder p - h1 - h2 - d of the thesis: linear, batch normalisation, LeakyReLU(0.2), twice, then two heads.

    Parameters
    ----------
    blocks
        Tiles of peaks.
    hidden
        Hidden units (h1, h2).
    n_latent
        Latent dimensions d.
    dropout_rate, momentum, eps
        Dropout after each activation; momentum and eps of the batch normalisation.
    """

    def __init__(
        self,
        blocks: PeakBlocks,
        hidden: tuple[int, int],
        n_latent: int,
        *,
        dropout_rate: float = 0.0,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.first = SparseLinear(blocks, hidden[0], diagonal=False)
        self.first_norm = nn.Sequential(
            nn.BatchNorm1d(hidden[0], momentum=momentum, eps=eps), nn.LeakyReLU(SLOPE), nn.Dropout(dropout_rate)
        )
        self.second = dense_block(*hidden, dropout_rate=dropout_rate, momentum=momentum, eps=eps)
        self.heads = GaussianHeads(hidden[1], n_latent, xavier=False)

    def forward(self, batch: BlockedRows | PeakLists) -> tuple[Tensor, Tensor]:
        """Return means and log variances of the posterior, both of shape (b, d)."""
        return self.heads(self.second(self.first_norm(self.first(batch))))


class DenseDecoder(nn.Module):
    """Decoder d + k - h2 - h1 - p; covariates enter at the first layer only.

    Parameters
    ----------
    blocks
        Tiles of peaks.
    hidden
        Hidden units (h1, h2), as given to the encoder.
    n_latent, n_covariates
        Latent dimensions d and covariates k.
    dropout_rate, momentum, eps
        As in the encoder.
    """

    def __init__(
        self,
        blocks: PeakBlocks,
        hidden: tuple[int, int],
        n_latent: int,
        n_covariates: int,
        *,
        dropout_rate: float = 0.0,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout_rate": dropout_rate, "momentum": momentum, "eps": eps}
        self.first = dense_block(n_latent + n_covariates, hidden[1], **options)
        self.second = dense_block(hidden[1], hidden[0], **options)
        self.logits = BlockLogits(blocks, hidden[0], diagonal=False)

    @property
    def condition_layer(self) -> nn.Linear:
        """The layer that reads latent and covariates."""
        return cast("nn.Linear", self.first[0])

    def forward(self, latent_bd: Tensor, covariates_bk: Tensor) -> Tensor:
        """Return the input of the logit layer, shape (b, h1)."""
        return self.second(self.first(torch.cat([latent_bd, covariates_bk], dim=1)))


class ChromosomeEncoder(nn.Module):
    """Encoder with one network a chromosome, p_j - h1 - h2, concatenated before two common heads (SAILERX).

    Parameters
    ----------
    blocks
        Chromosomes as blocks of peaks.
    hidden
        Hidden units (h1, h2) of each chromosome.
    n_latent
        Latent dimensions d.
    dropout_rate, momentum, eps
        Dropout after each activation; momentum and eps of the batch normalisation.
    """

    def __init__(
        self,
        blocks: PeakBlocks,
        hidden: tuple[int, int],
        n_latent: int,
        *,
        dropout_rate: float = 0.0,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        options = {"dropout_rate": dropout_rate, "momentum": momentum, "eps": eps}
        n_groups = len(blocks.sizes)
        self.first = SparseLinear(blocks, hidden[0], diagonal=True)
        self.first_norm = GroupedNorm(n_groups, hidden[0], **options)
        self.second = GroupedLinear(n_groups, *hidden)
        self.second_norm = GroupedNorm(n_groups, hidden[1], **options)
        self.heads = GaussianHeads(n_groups * hidden[1], n_latent, xavier=True)

    def forward(self, batch: BlockedRows | PeakLists) -> tuple[Tensor, Tensor]:
        """Return means and log variances of the posterior, both of shape (b, d)."""
        hidden_bch = self.second_norm(self.second(self.first_norm(self.first(batch))))
        return self.heads(hidden_bch.flatten(1))


class ChromosomeDecoder(nn.Module):
    """Decoder d + k - c h2, then one network h2 - h1 - p_j a chromosome; covariates enter at the first layer only.

    Parameters
    ----------
    blocks
        Chromosomes as blocks of peaks.
    hidden
        Hidden units (h1, h2) of each chromosome, as given to the encoder.
    n_latent, n_covariates
        Latent dimensions d and covariates k.
    dropout_rate, momentum, eps
        As in the encoder.
    """

    def __init__(
        self,
        blocks: PeakBlocks,
        hidden: tuple[int, int],
        n_latent: int,
        n_covariates: int,
        *,
        dropout_rate: float = 0.0,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        n_groups = len(blocks.sizes)
        self.shape = (n_groups, hidden[1])
        self.first = nn.Linear(n_latent + n_covariates, n_groups * hidden[1])
        nn.init.xavier_uniform_(self.first.weight)
        nn.init.zeros_(self.first.bias)
        self.first_norm = nn.Sequential(
            nn.BatchNorm1d(n_groups * hidden[1], momentum=momentum, eps=eps), PReLU(), nn.Dropout(dropout_rate)
        )
        self.second = GroupedLinear(n_groups, hidden[1], hidden[0])
        self.second_norm = GroupedNorm(n_groups, hidden[0], dropout_rate=dropout_rate, momentum=momentum, eps=eps)
        self.logits = BlockLogits(blocks, hidden[0], diagonal=True)

    @property
    def condition_layer(self) -> nn.Linear:
        """The layer that reads latent and covariates."""
        return self.first

    def forward(self, latent_bd: Tensor, covariates_bk: Tensor) -> Tensor:
        """Return the input of the logit layer, shape (b, c, h1)."""
        hidden_bh = self.first_norm(self.first(torch.cat([latent_bd, covariates_bk], dim=1)))
        return self.second_norm(self.second(hidden_bh.view(-1, *self.shape)))


class LinearEncoder(nn.Module):
    """Linear map from peaks to mean and log variance; nothing hidden, so that few cells suffice to fit it.

    Parameters
    ----------
    blocks
        Tiles of peaks.
    hidden
        Not used; taken so that all encoders are built alike.
    n_latent
        Latent dimensions d.
    dropout_rate, momentum, eps
        Not used.
    """

    def __init__(
        self,
        blocks: PeakBlocks,
        hidden: tuple[int, int],  # noqa: ARG002
        n_latent: int,
        *,
        dropout_rate: float = 0.0,  # noqa: ARG002
        momentum: float = 0.1,  # noqa: ARG002
        eps: float = 1e-5,  # noqa: ARG002
    ) -> None:
        super().__init__()
        self.n_latent = n_latent
        self.first = SparseLinear(blocks, 2 * n_latent, diagonal=False)

    def forward(self, batch: BlockedRows | PeakLists) -> tuple[Tensor, Tensor]:
        """Return means and log variances of the posterior, both of shape (b, d)."""
        mean_bd, logvar_bd = self.first(batch).split(self.n_latent, dim=1)
        return mean_bd, logvar_bd.clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)


class LinearDecoder(nn.Module):
    """Logits as a linear map of latent and covariates.

    Parameters
    ----------
    blocks
        Tiles of peaks.
    hidden
        Not used; taken so that all decoders are built alike.
    n_latent, n_covariates
        Latent dimensions d and covariates k.
    dropout_rate, momentum, eps
        Not used.
    """

    def __init__(
        self,
        blocks: PeakBlocks,
        hidden: tuple[int, int],  # noqa: ARG002
        n_latent: int,
        n_covariates: int,
        *,
        dropout_rate: float = 0.0,  # noqa: ARG002
        momentum: float = 0.1,  # noqa: ARG002
        eps: float = 1e-5,  # noqa: ARG002
    ) -> None:
        super().__init__()
        self.logits = BlockLogits(blocks, n_latent + n_covariates, diagonal=False)
        nn.init.normal_(self.logits.weight, std=0.01)

    @property
    def condition_layer(self) -> BlockLogits:
        """The layer that reads latent and covariates."""
        return self.logits

    def forward(self, latent_bd: Tensor, covariates_bk: Tensor) -> Tensor:
        """Return latent and covariates side by side, shape (b, d + k): the input of the logit layer."""
        return torch.cat([latent_bd, covariates_bk], dim=1)


class ReferenceExpert(nn.Module):
    """Gaussian expert on a reference embedding: r - 128 - d, rows scaled to length one first.

    Parameters
    ----------
    n_reference
        Dimensions of the reference r.
    n_latent
        Latent dimensions d.
    n_hidden
        Hidden units.
    """

    def __init__(self, n_reference: int, n_latent: int, n_hidden: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(n_reference, n_hidden), nn.LeakyReLU(SLOPE))
        self.heads = GaussianHeads(n_hidden, n_latent, xavier=True)

    def forward(self, reference_br: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log variances, both of shape (b, d)."""
        length_b1 = torch.linalg.vector_norm(reference_br, dim=1, keepdim=True).clamp_min(1e-4)
        return self.heads(self.hidden(reference_br / length_b1 * reference_br.shape[1] ** 0.5))
