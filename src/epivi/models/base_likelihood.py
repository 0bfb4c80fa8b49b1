"""How well a trained model explains data: ELBO and marginal likelihood of models with a Gaussian latent."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from epivi import _validate
from epivi.models.base_latent import LatentMixin
from epivi.objectives.invariance import kl_standard_normal
from epivi.objectives.marginal import marginal_log_likelihood

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from anndata import AnnData
    from mudata import MuData
    from torch import Tensor


class LikelihoodMixin(LatentMixin):
    """ELBO and importance-sampled marginal likelihood, with the model's own likelihood."""

    @abstractmethod
    def _negative_log_likelihood(self, batch: dict[str, Tensor], outputs: dict[str, Any], z_bd: Tensor) -> Tensor:
        """Return -log p(x | z) of each cell, shape (b,), from what ``inference`` returned."""

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
        _, rows, batches = self._batches(adata, indices, batch_size)
        generator = torch.Generator().manual_seed(self.seed)
        total = 0.0
        for batch in batches:
            outputs = self.module.inference(**self.module._get_inference_input(batch), deterministic=True)
            loss_b = self._negative_log_likelihood(batch, outputs, self._sample(outputs["qz"], generator))
            total -= float((loss_b + kl_standard_normal(outputs["mean_bd"], outputs["logvar_bd"])).double().sum())
        return total / max(rows.size, 1)

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

        (equations 7-8 of the paper of ConvNet-VAE), with the model's own likelihood.

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

            def log_likelihood(z_bd: Tensor, batch: Any = batch, outputs: Any = outputs) -> Tensor:
                return -self._negative_log_likelihood(batch, outputs, z_bd.to(self.device)).cpu()

            # noise is drawn on the CPU, so that devices agree
            found_b = marginal_log_likelihood(
                log_likelihood,
                outputs["mean_bd"].cpu(),
                outputs["logvar_bd"].cpu(),
                n_samples=n_mc_samples,
                generator=generator,
            )
            parts.append(found_b)
        values_n = torch.cat(parts).numpy()
        return float(values_n.mean()) if return_mean else values_n
