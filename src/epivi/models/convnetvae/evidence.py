"""How well a trained model of tracks explains each modality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from epivi.models.base_likelihood import LikelihoodMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData
    from torch import Tensor

    from epivi.data.grids import TrackLayout


class EvidenceMixin(LikelihoodMixin):
    """Likelihoods of models of multi-channel tracks."""

    layout: TrackLayout

    def _negative_log_likelihood(self, batch: dict[str, Tensor], outputs: dict[str, Any], z_bd: Tensor) -> Tensor:
        inputs = self.module._get_generative_input(batch, outputs)
        hidden = self.module.generative(**inputs | {"z": z_bd})["hidden"]
        return self.module.negative_log_likelihood(hidden, outputs["groups"], outputs["mask_bc"]).sum(1)

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
            As in :meth:`get_latent_representation`.

        Returns
        -------
        The mean over the cells that have it for each modality, and the sum over modalities under ``"total"``.
        """
        loss_nc, mask_nc = self._losses(adata, indices, batch_size)
        per_channel = loss_nc.sum(0) / np.maximum(mask_nc.sum(0), 1)
        named = dict(zip(self.layout.channels, per_channel.tolist(), strict=True))
        return named | {"total": float(loss_nc.sum(1).mean())}

    def _losses(
        self, adata: AnnData | MuData | None, indices: Sequence[int] | None, batch_size: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return negative log-likelihoods at a posterior sample and masks, both (n, c), in float64."""
        _, _, batches = self._batches(adata, indices, batch_size)
        generator = torch.Generator().manual_seed(self.seed)
        losses, masks = [], []
        for batch in batches:
            outputs = self.module.inference(**self.module._get_inference_input(batch), deterministic=True)
            outputs["z"] = self._sample(outputs["qz"], generator)
            hidden = self.module.generative(**self.module._get_generative_input(batch, outputs))["hidden"]
            losses.append(self.module.negative_log_likelihood(hidden, outputs["groups"], outputs["mask_bc"]))
            masks.append(outputs["mask_bc"])
        loss_nc, mask_nc = (torch.cat(parts).double().cpu().numpy() for parts in (losses, masks))
        return loss_nc, mask_nc
