"""The torch module of ConvNet-VAE: convolutions over channels of binned tracks.

Legend of shapes: b cells of the batch, c channels (modalities), l bins of the coarsest grid, f features, d latent
dimensions, k covariates.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from epivi.models.convnetvae.module import ChannelGroup, TracksModule, linear_joined
from epivi.nn.conv.layers import ConvDecoder, ConvEncoder, Stem
from epivi.nn.mlp import GaussianHeads, dense_block
from epivi.objectives.tracks import channels_of

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.models.convnetvae.config import ConvNetVaeConfig
    from epivi.models.convnetvae.geometry import ConvGeometry
    from epivi.nn.covariates import Covariates


class ConvNetVaeModule(TracksModule):
    """ConvNet-VAE: the modalities are channels of one signal that strided convolutions read and write.

    The logits of finer modalities come from as many output channels as they have bins in one common bin.

    Parameters
    ----------
    config, covariates, library
        As in :class:`epivi.models.convnetvae.module.TracksModule`.
    geometry
        Bins of each channel, their places on the common grid, and the runs of bins that are convolved apart.
    """

    def __init__(
        self, config: ConvNetVaeConfig, geometry: ConvGeometry, covariates: Covariates, *, library: Tensor
    ) -> None:
        super().__init__(config, geometry.lengths, covariates, library=library)
        self.geometry = geometry
        options: dict[str, Any] = {"kernel_size": config.kernel_size, "stride": config.stride} | config.norm_options
        self.stem = None if geometry.is_common else Stem(geometry.ratios, 2 if config.mask_channels else 1)
        n_inputs = (2 if config.mask_channels else 1) * self.n_channels
        n_inputs = n_inputs if self.stem is None else self.stem.n_channels
        self.encoder = ConvEncoder(n_inputs, geometry.segments, config.filters, **options)
        self.decoder = ConvDecoder(sum(geometry.ratios), geometry.segments, config.filters, **options)
        n_flat = math.prod(self.encoder.out_shape)
        n_joined = n_flat + covariates.n_columns
        self.join = dense_block(n_joined, config.n_hidden, activation=nn.ReLU, **config.norm_options)
        self.heads = GaussianHeads(config.n_hidden, config.n_latent, xavier=False)
        self.expand = nn.Linear(config.n_latent + covariates.n_columns, n_flat)
        self.register_buffer("input_position", torch.from_numpy(geometry.input_positions), persistent=False)
        self.register_buffer("output_position", torch.from_numpy(geometry.output_positions), persistent=False)

    @property
    def condition_weights(self) -> dict[str, int]:
        """The layer after the convolutions and the first one of the decoder read the covariates."""
        if not self.covariates.n_columns:
            return {}
        return {"join.0.weight": self.expand.out_features, "expand.weight": self.config.n_latent}

    @property
    def group_lengths(self) -> list[tuple[int, ...]]:
        """All channels are one group."""
        return [self.lengths]

    def groups(self, indptr: Tensor, indices: Tensor, values: Tensor) -> list[ChannelGroup]:
        """Return the non-zeros of all channels as one group."""
        rows_o = torch.repeat_interleave(torch.arange(indptr.numel() - 1, device=indices.device), indptr.diff())
        return [ChannelGroup(0, self.lengths, rows_o, indices, values, channels_of(indices, self.lengths))]

    def encode(self, groups: list[ChannelGroup], seen_bc: Tensor, covariates_bk: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log variances of the posterior, both of shape (b, d)."""
        group, n_rows = groups[0], seen_bc.shape[0]
        if self.stem is None and not self.config.mask_channels:
            features_bft = self.encoder.forward_sparse(group.rows, group.columns, group.values, n_rows)
        else:
            features_bft = self.encoder(self._channels(group, seen_bc))
        hidden_bh = self.join[1:](linear_joined(self.join[0], features_bft.flatten(1), covariates_bk))
        return self.heads(hidden_bh)

    def _channels(self, group: ChannelGroup, seen_bc: Tensor) -> Tensor:
        """Return log counts of each modality on the common grid, each beside its mask if there is one."""
        n_rows, sizes = seen_bc.shape[0], self.geometry.input_sizes
        x_bf = group.values.new_zeros(n_rows, sum(sizes))
        x_bf[group.rows, self.input_position[group.columns]] = group.values
        parts = [part.unsqueeze(1) for part in x_bf.split(sizes, dim=1)]
        if self.config.mask_channels:
            masks = (seen_bc[:, m].view(-1, 1, 1).expand(-1, 1, size) for m, size in enumerate(sizes))
            parts = [torch.cat([part, mask], dim=1) for part, mask in zip(parts, masks, strict=True)]
        return torch.cat(parts, dim=1) if self.stem is None else self.stem(parts)

    def decode(self, z_bd: Tensor, covariates_bk: Tensor) -> Tensor:
        """Return the features of the last convolution, shape (b, f_n, L_n)."""
        flat = linear_joined(self.expand, z_bd, covariates_bk)
        return flat.view(-1, *self.encoder.out_shape)

    def logits(self, hidden: Tensor) -> list[Tensor]:
        """Return the logits of all channels, shape (b, f)."""
        logits_bf = self.decoder(hidden).flatten(1)
        return [logits_bf if self.stem is None else logits_bf[:, self.output_position]]
