"""The latent representation, and how a batch is named to the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scvi import REGISTRY_KEYS

from epivi._errors import ConfigError, nearest
from epivi.models.base import EpiModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from anndata import AnnData
    from mudata import MuData

OBSERVED = "observed"


class LatentMixin(EpiModel):
    """Latent representation of models with a Gaussian posterior of each cell."""

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        return_dist: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the posterior means, one row a cell in the order of the data (or of ``indices``).

        Parameters
        ----------
        adata
            Data to embed; the trained data by default. Features are matched by name.
        indices
            Row numbers or a mask.
        batch_size
            Cells read at once; the result does not depend on it.
        return_dist
            Return means and variances.

        Returns
        -------
        Shape (n, d), float32; with ``return_dist`` a pair of such arrays.
        """
        self._check_if_trained(warn=True)
        _, _, batches = self._batches(adata, indices, batch_size)
        mean_nd, variance_nd = self._posterior(batches)
        return (mean_nd, variance_nd) if return_dist else mean_nd

    def _posterior(self, batches: Iterable[dict[str, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
        """Return means and variances of the posterior over batches, both of shape (n, d)."""
        means, variances = [], []
        for batch in batches:
            qz = self.module.inference(**self.module._get_inference_input(batch), deterministic=True)["qz"]
            means.append(qz.loc.cpu())
            variances.append(qz.scale.square().cpu())
        return torch.cat(means).numpy(), torch.cat(variances).numpy()

    @property
    def batch_categories(self) -> list[str]:
        """Names of the batches, in the order of their codes."""
        return [str(c) for c in self._field_state(REGISTRY_KEYS.BATCH_KEY)["categorical_mapping"]]

    def _named_batch(self, transform_batch: str | None) -> int | None:
        """Return the code of a batch; ``None`` for each cell's own."""
        categories = self.batch_categories
        if transform_batch is None or transform_batch == OBSERVED:
            return None
        if str(transform_batch) not in categories:
            message = (
                f"transform_batch='{transform_batch}' is no batch of the model. {nearest(transform_batch, categories)}"
            )
            raise ConfigError(message)
        return categories.index(str(transform_batch))

    @staticmethod
    def _sample(qz: torch.distributions.Normal, generator: torch.Generator) -> torch.Tensor:
        """Draw from the posterior with a generator of the CPU, so that devices agree."""
        return qz.loc + qz.scale * torch.randn(qz.loc.shape, generator=generator).to(qz.loc.device)
