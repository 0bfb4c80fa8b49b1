"""How well a trained model explains data: ELBO and marginal likelihood of models with a Gaussian latent."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from epivi import _validate
from epivi.models.base_latent import LatentMixin
from epivi.objectives.invariance import kl_standard_normal
from epivi.objectives.marginal import marginal_log_likelihood

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from anndata import AnnData
    from mudata import MuData
    from torch import Tensor


class LikelihoodMixin(LatentMixin):
    """ELBO and importance-sampled marginal likelihood, with the model's own likelihood."""

    @abstractmethod
    def _negative_log_likelihood(self, batch: dict[str, Tensor], outputs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """Return the function from a latent to -log p(x | z) of each cell, shape (b,).

        What does not depend on the latent is computed once, not for every sample of it.

        Parameters
        ----------
        batch, outputs
            A minibatch, and what ``inference`` returned of it.
        """

    @torch.inference_mode()
    def get_elbo(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> float:
        """Return the mean evidence lower bound of a cell in nats, at one posterior sample a cell; NaN for no cell.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`. The noise of a cell depends on the model's seed and its row alone.
        """
        _, rows, batches = self._trained_batches(adata, indices, batch_size)
        total = 0.0
        for batch in batches:
            outputs = self.module.inference(**self.module._get_inference_input(batch), deterministic=True)
            loss_b = self._negative_log_likelihood(batch, outputs)(self._sample(batch, outputs["qz"]))
            total -= float((loss_b + kl_standard_normal(outputs["mean_bd"], outputs["logvar_bd"])).double().sum())
        return total / rows.size if rows.size else float("nan")

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
            As in :meth:`get_latent_representation`. The noise of a cell depends on the model's seed and its row alone.
        n_mc_samples
            Samples N of each cell.
        return_mean
            Return the mean over cells, NaN if there are none; otherwise one value a cell, shape (n,).

        Raises
        ------
        ConfigError
            If ``n_mc_samples`` is below one.
        """
        _validate.check_number(n_mc_samples, "n_mc_samples", low=1, integer=True)
        _, _, batches = self._trained_batches(adata, indices, batch_size)
        parts = []
        for batch in batches:
            outputs = self.module.inference(**self.module._get_inference_input(batch), deterministic=True)
            loss = self._negative_log_likelihood(batch, outputs)

            def log_likelihood(z_bd: Tensor, loss: Any = loss) -> Tensor:
                return -loss(z_bd.to(self.device)).cpu()

            noise, n_latent = self._noise(batch), outputs["mean_bd"].shape[1]
            found_b = marginal_log_likelihood(
                log_likelihood,
                outputs["mean_bd"].cpu(),
                outputs["logvar_bd"].cpu(),
                n_samples=n_mc_samples,
                draw=partial(noise.draw, n_latent),
            )
            parts.append(found_b)
        values_n = torch.cat(parts).numpy()
        if not return_mean:
            return values_n
        return float(values_n.mean()) if values_n.size else float("nan")
