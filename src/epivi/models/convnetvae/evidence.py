"""How well a trained model of tracks explains data: reconstruction error, ELBO, marginal likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from epivi import _validate
from epivi.models.base_latent import LatentMixin
from epivi.objectives.invariance import kl_standard_normal
from epivi.objectives.marginal import marginal_log_likelihood

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData

    from epivi.data.grids import TrackLayout


class EvidenceMixin(LatentMixin):
    """Likelihoods of models of multi-channel tracks."""

    layout: TrackLayout

    @staticmethod
    def _sample(qz: torch.distributions.Normal, generator: torch.Generator) -> torch.Tensor:
        """Draw from the posterior with a generator of the CPU, so that devices agree."""
        return qz.loc + qz.scale * torch.randn(qz.loc.shape, generator=generator).to(qz.loc.device)

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
        loss_nc, mask_nc, _ = self._losses(adata, indices, batch_size)
        per_channel = loss_nc.sum(0) / np.maximum(mask_nc.sum(0), 1)
        named = dict(zip(self.layout.channels, per_channel.tolist(), strict=True))
        return named | {"total": float(loss_nc.sum(1).mean())}

    @torch.inference_mode()
    def get_elbo(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> float:
        """Return the mean evidence lower bound of a cell in nats, at one posterior sample a cell.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        """
        loss_nc, _, kl_n = self._losses(adata, indices, batch_size)
        return -float((loss_nc.sum(1) + kl_n).mean())

    def _losses(
        self, adata: AnnData | MuData | None, indices: Sequence[int] | None, batch_size: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return negative log-likelihoods and masks, both (n, c), and KL terms, (n,), in float64."""
        _, _, batches = self._batches(adata, indices, batch_size)
        generator = torch.Generator().manual_seed(self.seed)
        losses, masks, kls = [], [], []
        for batch in batches:
            outputs = self.module.inference(**self.module._get_inference_input(batch), deterministic=True)
            outputs["z"] = self._sample(outputs["qz"], generator)
            hidden = self.module.generative(**self.module._get_generative_input(batch, outputs))["hidden"]
            losses.append(self.module.negative_log_likelihood(hidden, outputs["groups"], outputs["mask_bc"]))
            masks.append(outputs["mask_bc"])
            kls.append(kl_standard_normal(outputs["mean_bd"], outputs["logvar_bd"]))
        loss_nc, mask_nc, kl_n = (torch.cat(parts).double().cpu().numpy() for parts in (losses, masks, kls))
        return loss_nc, mask_nc, kl_n

    @torch.inference_mode()
    def get_marginal_ll(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        *,
        n_mc_samples: int = 1000,
        return_mean: bool = True,
        batch_size: int | None = None,
    ) -> float | np.ndarray:
        r"""Return the marginal log-likelihood by importance sampling from the posterior, in nats.

        .. math:: \log p(x) \approx \log \frac1N \sum_s \frac{p(x|z_s)\,p(z_s)}{q(z_s|x)}, \qquad z_s \sim q(z|x)

        (equations 7-8), with the model's own likelihood of the measured modalities.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`; the result depends on ``batch_size`` through the order of the
            noise only.
        n_mc_samples
            Samples N of each cell.
        return_mean
            Return the mean over cells; otherwise one value a cell.

        Raises
        ------
        ConfigError
            If ``n_mc_samples`` is below one.
        """
        _validate.check_number(n_mc_samples, "n_mc_samples", low=1, integer=True)
        _, _, batches = self._batches(adata, indices, batch_size)
        generator = torch.Generator().manual_seed(self.seed)
        parts = []
        for batch in batches:
            outputs = self.module.inference(**self.module._get_inference_input(batch), deterministic=True)
            covariates_bk = self.module._get_generative_input(batch, outputs)["covariates_bk"]

            def log_likelihood(z: torch.Tensor, outputs: Any = outputs, covariates: Any = covariates_bk) -> Any:
                hidden = self.module.generative(z, covariates)["hidden"]
                return -self.module.negative_log_likelihood(hidden, outputs["groups"], outputs["mask_bc"]).sum(1)

            mean_bd, logvar_bd = outputs["mean_bd"].cpu(), outputs["logvar_bd"].cpu()
            found_b = marginal_log_likelihood(
                lambda z: log_likelihood(z.to(self.device)).cpu(),
                mean_bd,
                logvar_bd,
                n_samples=n_mc_samples,
                generator=generator,
            )
            parts.append(found_b)
        values_n = torch.cat(parts).numpy()
        return float(values_n.mean()) if return_mean else values_n
