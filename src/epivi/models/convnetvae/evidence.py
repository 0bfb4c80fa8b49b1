"""How well a trained model of tracks explains each modality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from epivi.models.base_likelihood import LikelihoodMixin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData
    from mudata import MuData
    from torch import Tensor

    from epivi.data.tracks.grids import TrackLayout


class EvidenceMixin(LikelihoodMixin):
    """Likelihoods of models of multi-channel tracks."""

    layout: TrackLayout

    def _negative_log_likelihood(self, batch: dict[str, Tensor], outputs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        per_channel = self._channel_losses(batch, outputs)
        return lambda z_bd: per_channel(z_bd).sum(1)

    def _channel_losses(self, batch: dict[str, Tensor], outputs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """Return the function from a latent to -log p(x | z) of each modality, shape (b, c)."""
        inputs = self.module._get_generative_input(batch, outputs)
        likelihood = self.module.likelihood(outputs["groups"], outputs["mask_bc"])
        return lambda z_bd: likelihood(self.module.generative(**inputs | {"z": z_bd})["hidden"])

    @torch.inference_mode()
    def get_reconstruction_error(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """Return the mean negative log-likelihood of a cell at a posterior sample, in nats.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`. The noise of a cell depends on the model's seed and its row alone.

        Returns
        -------
        The mean over the cells that have it for each modality, and the sum over modalities under ``"total"``; NaN where
        no cell has it.
        """
        loss_nc, mask_nc = self._losses(adata, indices, batch_size)
        n_c = np.append(mask_nc.sum(0), len(loss_nc))
        sums_c = np.append(loss_nc.sum(0), loss_nc.sum())
        means_c = np.divide(sums_c, n_c, out=np.full(n_c.shape, np.nan), where=n_c > 0)
        return dict(zip([*self.layout.channels, "total"], means_c.tolist(), strict=True))

    def _losses(
        self, adata: AnnData | MuData | None, indices: Sequence[int] | None, batch_size: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return negative log-likelihoods at a posterior sample and masks, both (n, c), in float64."""
        _, _, batches = self._trained_batches(adata, indices, batch_size)
        losses, masks = [], []
        for batch in batches:
            outputs = self.module.inference(**self.module._get_inference_input(batch), deterministic=True)
            losses.append(self._channel_losses(batch, outputs)(self._sample(batch, outputs["qz"])))
            masks.append(outputs["mask_bc"])
        loss_nc, mask_nc = (torch.cat(parts).double().cpu().numpy() for parts in (losses, masks))
        return loss_nc, mask_nc
