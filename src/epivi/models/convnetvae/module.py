"""What the torch modules of ConvNet-VAE and FC-VAE share: covariates, masks, likelihood of tracks, ELBO.

Legend of shapes: b cells of the batch, c channels (modalities), f features (bins of all channels, channel by channel),
o non-zeros, d latent dimensions, k covariates.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput, auto_move_data
from torch import nn
from torch.distributions import Normal

from epivi._keys import BATCH_INDICES, BATCH_INDPTR, BATCH_MASK, BATCH_VALUES
from epivi.models.base_module import EpiModule
from epivi.objectives.invariance import kl_standard_normal
from epivi.objectives.tracks import library_of, multinomial_tracks, negative_binomial_tracks, poisson_constant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from epivi.models.convnetvae.config import TracksConfig
    from epivi.nn.covariates import Covariates


class ChannelGroup(NamedTuple):
    """Non-zero counts of some channels whose logits are computed together; columns count within the group.

    ``channels`` is the channel of each column, counted within the group too.
    """

    first: int
    lengths: tuple[int, ...]
    rows: Tensor
    columns: Tensor
    values: Tensor
    channels: Tensor

    @property
    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values."""
        return self.rows, self.columns, self.values

    def library(self, n_rows: int) -> Tensor:
        """Return the sum of the counts of each cell and channel, shape (b, channels of the group)."""
        return library_of(*self.counts, self.lengths, n_rows, channels_o=self.channels)


class TracksModule(EpiModule):
    """Encoder of log counts, decoder of latent and covariates, Poisson or negative binomial likelihood of tracks.

    Subclasses build the networks and implement :meth:`groups`, :meth:`encode`, :meth:`decode` and :meth:`logits`.

    Parameters
    ----------
    config
        Choices of network and loss.
    lengths
        Bins of each channel.
    covariates
        Encoder of batch and further covariates.
    library
        Shape (c,): mean total count of each channel over the cells that have it; what imputation assumes.
    """

    config: Any
    library: Tensor
    log_dispersion: Tensor

    def __init__(
        self, config: TracksConfig, lengths: Sequence[int], covariates: Covariates, *, library: Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self.lengths = tuple(int(n) for n in lengths)
        self.covariates = covariates
        self.register_buffer("library", library.float())
        if config.likelihood == "nb":
            self.log_dispersion = nn.Parameter(torch.zeros(sum(self.lengths)))

    @property
    def n_channels(self) -> int:
        """Number of channels c."""
        return len(self.lengths)

    @abstractmethod
    def groups(self, indptr: Tensor, indices: Tensor, values: Tensor) -> list[ChannelGroup]:
        """Cut the non-zeros of a batch into groups of channels."""

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002
        return {
            "indptr": tensors[BATCH_INDPTR],
            "indices": tensors[BATCH_INDICES],
            "values": tensors[BATCH_VALUES],
            "mask_bc": tensors[BATCH_MASK],
            "covariates_bk": self._columns(tensors),
        }

    def _columns(self, tensors: dict[str, Tensor], batch: int | None = None) -> Tensor:
        """Return the covariates of the cells, in a batch of their own or all in one."""
        batch_b = tensors[REGISTRY_KEYS.BATCH_KEY][:, 0]
        if batch is not None:
            batch_b = torch.full_like(batch_b, batch)
        return self.covariates(
            batch_b, tensors.get(REGISTRY_KEYS.CAT_COVS_KEY), tensors.get(REGISTRY_KEYS.CONT_COVS_KEY)
        )

    def _get_generative_input(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        *,
        batch: int | None = None,
        use_z_mean: bool = False,
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        z_bd = inference_outputs["qz"].loc if use_z_mean else inference_outputs["z"]
        return {"z": z_bd, "covariates_bk": self._columns(tensors, batch)}

    @auto_move_data
    def inference(
        self,
        indptr: Tensor,
        indices: Tensor,
        values: Tensor,
        mask_bc: Tensor,
        covariates_bk: Tensor,
        *,
        deterministic: bool = False,
    ) -> dict[str, Any]:
        """Return the posterior ``qz``, a sample ``z`` (the mean if ``deterministic``) and the grouped counts."""
        groups = self.groups(indptr, indices, values)
        seen_bc = self._drop_modalities(mask_bc) if self.training else mask_bc
        mean_bd, logvar_bd = self.encode(log_counts(groups, seen_bc), seen_bc, covariates_bk)
        sd_bd = (0.5 * logvar_bd).exp()
        z_bd = mean_bd if deterministic else mean_bd + sd_bd * torch.randn_like(mean_bd)
        qz = Normal(mean_bd, sd_bd, validate_args=False)
        return {"z": z_bd, "qz": qz, "mean_bd": mean_bd, "logvar_bd": logvar_bd, "groups": groups, "mask_bc": mask_bc}

    def _drop_modalities(self, mask_bc: Tensor) -> Tensor:
        """Hide measured modalities from the encoder at random; the one with the largest draw always stays."""
        rate = self.config.modality_dropout_rate
        if rate == 0:
            return mask_bc
        draw_bc = torch.rand_like(mask_bc) * mask_bc
        is_kept = (draw_bc >= rate) | (draw_bc == draw_bc.max(dim=1, keepdim=True).values)
        return mask_bc * is_kept

    @abstractmethod
    def encode(self, groups: list[ChannelGroup], seen_bc: Tensor, covariates_bk: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log variances of the posterior, both of shape (b, d), from log counts."""

    @auto_move_data
    def generative(self, z: Tensor, covariates_bk: Tensor) -> dict[str, Tensor]:
        """Return the hidden units before the logits; the logits are taken where they are needed."""
        return {"hidden": self.decode(z, covariates_bk.to(z.dtype))}

    @abstractmethod
    def decode(self, z_bd: Tensor, covariates_bk: Tensor) -> Tensor:
        """Return the hidden units from which :meth:`logits` are computed."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> list[Tensor]:
        """Return the logits of each group of channels, shape (b, bins of its channels)."""

    def negative_log_likelihood(self, hidden: Tensor, groups: list[ChannelGroup], mask_bc: Tensor) -> Tensor:
        """Return the negative log-likelihood of each measured modality of each cell, 0 for others, shape (b, c)."""
        return self.likelihood(groups, mask_bc)(hidden)

    def likelihood(self, groups: list[ChannelGroup], mask_bc: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the likelihood of a batch as a function of hidden units.

        What does not depend on them, such as the Poisson constant, is computed once.

        Returns
        -------
        Maps what :meth:`decode` returns to the negative log-likelihood of each measured modality of each cell, 0 for
        others, shape (b, c).
        """
        terms = [self._group_likelihood(group, start, mask_bc.shape[0]) for group, start in self._placed(groups)]

        def of_hidden(hidden: Tensor) -> Tensor:
            parts = [term(logits_bf) for term, logits_bf in zip(terms, self.logits(hidden), strict=True)]
            return torch.where(mask_bc > 0, torch.cat(parts, dim=1), 0.0)

        return of_hidden

    @staticmethod
    def _placed(groups: list[ChannelGroup]) -> Iterator[tuple[ChannelGroup, int]]:
        """Yield groups and the feature at which each begins."""
        return zip(groups, accumulate((sum(group.lengths) for group in groups), initial=0), strict=False)

    def _group_likelihood(self, group: ChannelGroup, start: int, n_rows: int) -> Callable[[Tensor], Tensor]:
        """Return the likelihood of the channels of a group as a function of their logits."""
        counts, lengths, channels_o = group.counts, group.lengths, group.channels
        if self.config.likelihood == "nb":
            library_bc = group.library(n_rows)
            dispersion_f = self.log_dispersion[start : start + sum(lengths)]
            return lambda logits_bf: negative_binomial_tracks(
                logits_bf, dispersion_f, *counts, library_bc, lengths, channels_o=channels_o
            )
        constant_bc = poisson_constant(*counts, lengths, n_rows, channels_o=channels_o)
        return lambda logits_bf: multinomial_tracks(logits_bf, *counts, lengths, channels_o=channels_o) + constant_bc

    def loss(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Tensor],
        *,
        kl_weight: float = 1.0,
    ) -> LossOutput:
        """Return < -sum_m o_m log p(x_m | z) + beta KL >, the negative of equation 3, mean over cells."""
        loss_bc = self.negative_log_likelihood(
            generative_outputs["hidden"], inference_outputs["groups"], inference_outputs["mask_bc"]
        )
        kl_b = kl_standard_normal(inference_outputs["mean_bd"], inference_outputs["logvar_bd"])
        reconstruction_b = loss_bc.sum(1)
        return LossOutput(
            loss=(reconstruction_b + kl_weight * self.config.kl_scale * kl_b).mean(),
            reconstruction_loss=reconstruction_b,
            kl_local=kl_b,
            n_obs_minibatch=kl_b.shape[0],
        )

    def observed_library(self, groups: list[ChannelGroup], mask_bc: Tensor) -> Tensor:
        """Return the total count of each measured modality of each cell, 0 for others, shape (b, c)."""
        parts = [group.library(mask_bc.shape[0]) for group in groups]
        return torch.cat(parts, dim=1) * mask_bc

    @torch.inference_mode()
    def shares(self, hidden: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return the share w of each bin in its channel, shape (b, f), or of chosen features.

        Parameters
        ----------
        hidden
            Output of :meth:`generative`.
        columns
            Numbers of the features; all if ``None``.
        """
        parts = [
            torch.softmax(part, dim=1)
            for logits_bf, lengths in zip(self.logits(hidden), self.group_lengths, strict=True)
            for part in logits_bf.split(lengths, dim=1)
        ]
        shares_bf = torch.cat(parts, dim=1)
        return shares_bf if columns is None else shares_bf[:, columns]

    @property
    @abstractmethod
    def group_lengths(self) -> list[tuple[int, ...]]:
        """Bins of the channels of each group."""


def log_counts(groups: list[ChannelGroup], seen_bc: Tensor) -> list[ChannelGroup]:
    """Return log(x + 1) of the counts, zero where the encoder does not see the modality."""
    is_all_seen = bool((seen_bc > 0).all())
    result = []
    for group in groups:
        values_o = group.values.log1p()
        if not is_all_seen:
            values_o = values_o * seen_bc[group.rows, group.channels + group.first]
        result.append(group._replace(values=values_o))
    return result


def linear_joined(layer: nn.Module, x_bi: Tensor, covariates_bk: Tensor) -> Tensor:
    """Return a linear layer of inputs and covariates side by side, added up part by part.

    So a column of zeros, as a query appends for a new batch, changes no bit of the result.

    Examples
    --------
    >>> layer = nn.Linear(3, 1)
    >>> x = torch.ones(1, 3)
    >>> bool(torch.isclose(linear_joined(layer, x[:, :2], x[:, 2:]), layer(x)))
    True
    """
    weights: Any = layer.weight
    weight_oi, weight_ok = weights.split([x_bi.shape[1], covariates_bk.shape[1]], dim=1)
    out_bo = nn.functional.linear(x_bi, weight_oi, cast("Tensor", layer.bias))
    return out_bo + covariates_bk @ weight_ok.t() if covariates_bk.shape[1] else out_bo
